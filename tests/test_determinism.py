# SPDX-License-Identifier: BSD-3-Clause
"""The same call gives the same bits: run after run, and with one thread or two."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import oracle
import pytest
import torch
from cases import HALF, Case, word
from layouts import lay
from torch import Tensor

pytestmark = pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
DTYPES = (torch.float64, torch.float32, *HALF)
SHAPES = ((8, 67, 29, 31), (64, 3, 33, 33), (512, 130), (2, 300, 7, 7), (1, 64, 112, 112))


@pytest.fixture(autouse=True)
def _threads_back() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def assert_same(first: dict[str, Tensor], again: dict[str, Tensor], what: str) -> None:
    assert first.keys() == again.keys()
    for name, result in first.items():
        assert torch.equal(result, again[name]), f"{name} differs {what}"


@pytest.mark.slow_for("plain")
@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", ["none", "tensor"])
def test_batch_norm_act(impl, shape: tuple[int, ...], layout: str, residual: str) -> None:
    """NOTE: the plain implementation's sums are PyTorch's, which differ with the thread count."""
    for dtype in DTYPES if shape == SHAPES[0] else (torch.float32,):
        case = Case(shape=shape, dtype=dtype, layout=layout, residual=residual)
        inputs = cases.make(case)
        torch.set_num_threads(2)
        first = oracle.run(impl.batch_norm_act, inputs, case)
        for _ in range(3):
            assert_same(first, oracle.run(impl.batch_norm_act, inputs, case), "run by run")
        if impl.name != "plain":
            torch.set_num_threads(1)
            alone = oracle.run(impl.batch_norm_act, inputs, case)
            assert_same(first, alone, "between one thread and two")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_add_relu_mask(impl, layout: str) -> None:
    x, residual = (lay(torch.randn(8, 67, 29, 31), layout) for _ in range(2))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y, mask = impl.raw.add_relu_forward(x, residual, True)
        results.append({"y": y, "mask": mask})
    for again in results[1:]:
        assert_same(results[0], again, "by threads")


def test_a_call_does_not_depend_on_the_call_before(impl) -> None:
    """Scratch memory of a larger call leaves nothing behind."""
    small = Case(shape=(2, 5, 3, 3), residual="tensor")
    large = Case(shape=(8, 67, 29, 31), residual="tensor", values="outlier")
    small_inputs, large_inputs = cases.make(small), cases.make(large)
    first = oracle.run(impl.batch_norm_act, small_inputs, small)
    oracle.run(impl.batch_norm_act, large_inputs, large)
    assert_same(first, oracle.run(impl.batch_norm_act, small_inputs, small), "after a large call")


def test_where_a_tensor_lies_does_not_matter(impl) -> None:
    """An x that starts at any byte a float may start at gives the same bits."""
    case = Case(shape=(4, 17, 9, 7), residual="tensor")
    inputs = cases.make(case)
    first = oracle.run(impl.batch_norm_act, inputs, case)
    for offset in range(1, 17):
        for name in ("x", "residual", "grad"):
            t = getattr(inputs, name)
            room = torch.empty(t.numel() + offset)
            setattr(inputs, name, room[offset:].view(t.shape).copy_(t))
        assert_same(first, oracle.run(impl.batch_norm_act, inputs, case), f"at offset {offset}")
