# SPDX-License-Identifier: BSD-3-Clause
"""The stem's max-pooling: PyTorch's numbers, and less kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_opcheck import opcheck
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import _max_pool
from resnet_fast._max_pool import max_pool

OPS = torch.ops.resnet_fast
STEM: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
SETTINGS: list[dict[str, Any]] = [
    STEM,
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (1, 2), "ceil_mode": True},
]
ORDERS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Odd and even sizes, one pixel, one line, channels in whole packs, in part, and one.
SHAPES = [(2, 16, 8, 9), (1, 37, 7, 6), (3, 5, 1, 1), (2, 64, 1, 12), (2, 1, 5, 2), (0, 4, 3, 3)]
built = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_max_pool, "_SMALL", 0)


def draw(order: torch.memory_format, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2, 5, 13, 11, dtype=dtype).contiguous(memory_format=order)
    return x.requires_grad_()


# ---- the module ----------------------------------------------------------------------------------
def test_small_inputs_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pool = nn.MaxPool2d(2)
    for width, own in ((2, True), (_max_pool._SMALL // 32, False)):
        x = torch.randn(1, 4, 8, width).requires_grad_()
        assert ("MaxPool2D" in type(max_pool(pool, x).grad_fn).__name__) == own


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_module(
    settings: dict[str, Any], order: torch.memory_format, dtype: torch.dtype
) -> None:
    pool, x = nn.MaxPool2d(**settings), draw(order, dtype)
    ours, theirs = max_pool(pool, x), pool(x)
    exact = pool(wide := x.detach().double().requires_grad_())
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
    with torch.no_grad():
        assert torch.equal(max_pool(pool, x), theirs)
    for grad in (torch.randn_like(ours), torch.ones((), dtype=dtype).expand_as(ours)):
        (got,) = torch.autograd.grad(ours, x, grad, retain_graph=True)
        (want,) = torch.autograd.grad(theirs, x, grad, retain_graph=True)
        if dtype in (torch.float64, torch.float32):
            assert torch.equal(got, want)
            continue
        (oracle,) = torch.autograd.grad(exact, wide, grad.double(), retain_graph=True)
        assert (got - oracle).abs().max() <= (want - oracle).abs().max()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_first_and_second_order(order: torch.memory_format) -> None:
    pool, x = nn.MaxPool2d(3, 2, 1), draw(order)
    assert torch.autograd.gradcheck(lambda t: max_pool(pool, t), (x,))
    assert torch.autograd.gradgradcheck(lambda t: max_pool(pool, t), (x,))


@built
@pytest.mark.parametrize(("order", "kept"), [(ORDERS[0], torch.int32), (ORDERS[1], torch.uint8)])
def test_keeps_places_alone(order: torch.memory_format, kept: torch.dtype) -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = max_pool(nn.MaxPool2d(3, 2, 1), draw(order))
    assert [(t.dtype, t.shape) for t in saved] == [(kept, y.shape)]


def test_memory_of_odd_order_is_pytorchs_own() -> None:
    x = torch.randn(2, 4, 9, 16)[..., ::2].requires_grad_()
    assert torch.equal(max_pool(nn.MaxPool2d(3, 2, 1), x), F.max_pool2d(x, 3, 2, 1))


# ---- the raw operators ---------------------------------------------------------------------------
def pictures(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With equal values, infinities and NaNs among them."""
    x = torch.randint(-3, 3, shape).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    where = torch.rand(shape)
    for i, value in enumerate(special):
        x[(where > 0.1 * i) & (where < 0.1 * (i + 1))] = value
    return x.contiguous(memory_format=torch.channels_last)


@built
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw(instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = pictures(shape, dtype)
    y, place = OPS.max_pool_forward(x, True)
    want, indices = torch.ops.aten.max_pool2d_with_indices(x, *_max_pool._STEM)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(_max_pool._indices(place, shape[2:]), indices)
    assert torch.equal(place, _max_pool.max_pool_forward(x, True)[1])
    grad = torch.randn(y.shape).to(dtype)
    got = OPS.max_pool_backward(grad, place, *shape[2:])
    assert torch.equal(got, _max_pool.max_pool_backward(grad, place, *shape[2:]))
    assert got.stride() == _max_pool.fake_backward(grad, place, *shape[2:]).stride()


@built
def test_large_outputs_are_streamed() -> None:
    """16 MiB and more, past the caches; the thread's lines and their ends are where they belong."""
    x = torch.randn(2, 32, 259, 260).contiguous(memory_format=torch.channels_last)
    assert x.numel() * 4 > 16 << 20
    x.requires_grad_()
    y, want = max_pool(nn.MaxPool2d(**STEM), x), F.max_pool2d(x, 3, 2, 1)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, want))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(order: torch.memory_format, dtype: torch.dtype) -> None:
    traced = dtype is torch.float32
    x = draw(order, dtype).detach()
    for save_place in (True, False):
        opcheck(OPS.max_pool_forward, (x, save_place), traced=traced)
    y, place = OPS.max_pool_forward(x, True)
    opcheck(OPS.max_pool_backward, (torch.randn_like(y), place, *x.shape[2:]), traced=traced)


@pytest.mark.parametrize("backend", [_max_pool, OPS], ids=["plain", "registered"])
def test_raw_operators_refuse(backend: Any) -> None:
    x = torch.randn(2, 3, 8, 6)
    y, place = backend.max_pool_forward(x, True)
    bad: list[tuple[Any, tuple[Any, ...], str]] = [
        (backend.max_pool_forward, (x[0], True), "x must have 4 dimensions"),
        (backend.max_pool_backward, (y[0], place, 8, 6), "grad must have 4 dimensions"),
        (backend.max_pool_backward, (y, place[:1], 8, 6), "place must be uint8 of grad's shape"),
        (backend.max_pool_backward, (y, place.long(), 8, 6), "place must be uint8"),
        (backend.max_pool_backward, (y, place, 9, 6), "height and width must be those"),
        (backend.max_pool_backward, (y, place, 8, 0), "height and width must be those"),
    ]
    for f, args, sentence in bad:
        with pytest.raises(RuntimeError, match=sentence):
            f(*args)


@built
def test_places_that_no_window_has_are_passed_over() -> None:
    grad = torch.ones(1, 16, 2, 2)
    nowhere = torch.full(grad.shape, 9, dtype=torch.uint8)
    assert not OPS.max_pool_backward(grad, nowhere, 4, 4).any()
