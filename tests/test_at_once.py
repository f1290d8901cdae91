# SPDX-License-Identifier: BSD-3-Clause
"""The common call's short way to the CPU kernels: the same bits, and nothing skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import word
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _plain, dispatch, functional

OPS = torch.ops.resnet_fast
pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))

# Planes below, at and above the size that is walked as columns; one image, several; odd channels.
SHAPES = ((1, 5, 1, 1), (1, 6, 2, 2), (3, 5, 3, 5), (2, 7, 4, 4), (1, 3, 5, 5), (4, 3), (2, 3, 9))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameters(c: int, dtype: torch.dtype, kind: str) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(2)
    step = 2 if kind == "strided" else 1
    made = [torch.randn(step * c, generator=generator).to(dtype)[::step] for _ in range(3)]
    var = (torch.rand(step * c, generator=generator) + 0.5).to(dtype)[::step]
    weight, bias, mean = made
    return (None, None, mean, var) if kind == "no affine" else (weight, bias, mean, var)


# ---- the ops without anything saved --------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("kind", ["affine", "no affine", "strided", "half"])
@pytest.mark.parametrize("joined", [True, False], ids=["residual", "alone"])
def test_inference_gives_the_forwards_bits(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, joined: bool
) -> None:
    if kind == "half" and dtype in (torch.float32, torch.float64):
        pytest.skip("half parameters are for half inputs")
    x = torch.randn(shape).to(dtype)
    residual = torch.randn(shape).to(dtype) if joined else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = parameters(shape[1], dtype if kind == "half" else wide, kind)
    layouts: list[Callable[[Tensor], Tensor]] = [lambda t: t]
    if len(shape) == 4:
        layouts.append(lambda t: t.contiguous(memory_format=torch.channels_last))
    for lay in layouts:
        laid = None if residual is None else lay(residual)
        for relu in (True, False):
            args = (lay(x), weight, bias, laid, mean, var)
            forward = OPS.batch_norm_act_forward(*args, False, 0.0, 1e-5, relu, False)[0]
            y = OPS.batch_norm_act_inference(*args, 1e-5, relu)
            assert torch.equal(y, forward)
            assert y.stride() == forward.stride()
        if laid is not None:
            y, _ = OPS.add_relu_forward(lay(x), laid, False)
            assert torch.equal(OPS.add_relu_inference(lay(x), laid), y)


@pytest.mark.parametrize("shape", SHAPES, ids=word)
def test_small_planes_against_the_plain_op(shape: tuple[int, ...]) -> None:
    """Statistics, mask and gradients of planes that go as columns, about a large mean."""
    x = (torch.randn(shape) + 100).double()
    grad, residual = torch.randn(shape).double(), torch.randn(shape).double()
    weight, bias, mean, var = parameters(shape[1], torch.float64, "affine")
    results = []
    for ops in (OPS, _plain):
        running = mean.clone(), var.clone()  # type: ignore[union-attr]
        args = (x, weight, bias, residual, *running, True, 0.1, 1e-5, True, True)
        if x.numel() == x.size(1):
            args = (*args[:6], False, *args[7:])
        y, m, invstd, mask = ops.batch_norm_act_forward(*args)
        saved = (grad, x, m, invstd, weight, bias, mask, args[6], True, [True] * 4)
        results.append([y, m, invstd, *running, *ops.batch_norm_act_backward(*saved)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


# ---- which calls take it -------------------------------------------------------------------------
@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops without anything saved, as they are called."""
    calls: list[str] = []

    def watch(name: str) -> None:
        op = getattr(functional, f"_{name}")

        def watched(*args: Any) -> Any:
            calls.append(name)
            return op(*args)

        monkeypatch.setattr(functional, f"_{name}", watched)

    watch("add_relu_inference")
    watch("batch_norm_act_inference")
    return calls


def test_calls_without_gradient_save_nothing(short: list[str]) -> None:
    x, (w, b, m, v) = torch.randn(2, 3, 4, 5), parameters(3, torch.float32, "affine")
    with dispatch.recording() as events:
        rf.functional.add_relu(x, x)
        rf.functional.batch_norm_act(x, w, b, m, v)
        with torch.no_grad():
            rf.functional.batch_norm_act(x.clone().requires_grad_(), w, b, m, v)
    assert short == ["add_relu_inference", *["batch_norm_act_inference"] * 2]
    assert [(e.op, e.impl, e.reason) for e in events] == [
        ("add_relu", "cpu", ""), ("batch_norm_act", "cpu", ""), ("batch_norm_act", "cpu", ""),
    ]  # fmt: skip


def test_calls_that_choose_do_not(short: list[str]) -> None:
    x, (w, b, m, v) = torch.randn(2, 3, 4, 5), parameters(3, torch.float32, "affine")
    with rf.use_backend("reference"):
        rf.functional.add_relu(x, x)
    rf.functional.add_relu(x, x[:, :1])
    rf.functional.batch_norm_act(x, w, b, m, v, residual=x[:1])
    rf.functional.add_relu(x.to_mkldnn().to_dense().requires_grad_(), x)
    rf.functional.batch_norm_act(x[:0], w, b, m, v)
    torch.func.vmap(lambda t: rf.functional.add_relu(t, t))(x)
    assert short == []


def test_a_tensor_left_over_from_a_transform(short: list[str]) -> None:
    left: list[Tensor] = []
    x = torch.randn(2, 3, 4, 5)

    def keep(t: Tensor) -> Tensor:
        left.append(t)
        return t.sum()

    torch.func.grad(keep)(x)
    assert torch.equal(rf.functional.add_relu(left[0], x), torch.relu(x + x))
    other = torch.zeros_like(x).requires_grad_()
    rf.functional.add_relu(other, left[0]).sum().backward()
    assert torch.equal(other.grad, (x > 0).float())
    assert short == []


def test_a_refusal_names_the_argument_and_touches_nothing() -> None:
    x, (w, b, m, v) = torch.randn(2, 3, 4, 5), parameters(3, torch.float32, "affine")
    assert m is not None
    before = m.clone()
    for training in (True, False):
        with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
            rf.functional.batch_norm_act(x, w, torch.zeros(4), m, v, training=training)
        with pytest.raises(TypeError, match="weight must be of dtype"):
            rf.functional.batch_norm_act(x, w.double(), b, m, v, training=training)
    assert torch.equal(m, before)


def test_an_error_of_somebody_elses_is_passed_on_and_the_op_runs_once() -> None:
    """A saved-tensor hook that raises: the statistics have moved once, as PyTorch's would."""
    x, (w, b, m, v) = torch.randn(2, 3, 4, 5), parameters(3, torch.float32, "affine")
    assert m is not None
    assert v is not None
    expected = m.clone(), v.clone()
    torch.nn.functional.batch_norm(x, *expected, w, b, training=True)

    def refuse(t: Tensor) -> Tensor:
        raise RuntimeError("not to be saved")

    x.requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(RuntimeError, match="not to be saved"),
    ):
        rf.functional.batch_norm_act(x, w, b, m, v, training=True)
    torch.testing.assert_close((m, v), expected)
