# SPDX-License-Identifier: BSD-3-Clause
"""convolution.conv2d under autograd: wanted gradients, second order, hooks, saving, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from convolutions import (
    HALVES,
    ONE,
    SMALLER,
    STRIDED,
    WINOGRAD,
    Conv,
    eager,
    magnitudes,
    run,
    way_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast as rf
from resnet_fast import convolution, dispatch

pytestmark = [
    pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable())),
    pytest.mark.usefixtures("every_convolution"),
]


# ---- autograd ------------------------------------------------------------------------------------
class Seen(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_only_what_is_wanted() -> None:
    kernels = {"conv_winograd", "conv_winograd_weight"}
    for x_wants, weight_wants in ((True, True), (True, False), (False, True)):
        x, weight, grad = WINOGRAD.make()
        y = convolution.conv2d(
            x.requires_grad_(x_wants), weight.requires_grad_(weight_wants), *WINOGRAD.arguments()
        )
        with Seen() as seen:
            y.backward(grad)
        wanted = [x_wants, weight_wants]
        assert kernels & set(seen.names) == {
            name for name, want in zip(sorted(kernels), wanted, strict=True) if want
        }
        assert [x.grad is not None, weight.grad is not None] == wanted
    for conv in (ONE, STRIDED):
        x, weight, grad = conv.make()
        y = convolution.conv2d(x.requires_grad_(), weight, *conv.arguments())
        with Seen() as seen:
            y.backward(grad)
        assert not {"addmm_", "addmm"} & set(seen.names)
        assert seen.names.count("mm") <= 1
    x, weight, _ = WINOGRAD.make()
    with torch.no_grad():
        assert convolution.conv2d(x, weight.requires_grad_(), *WINOGRAD.arguments()).is_leaf
    with torch.inference_mode():
        assert convolution.conv2d(x, weight, *WINOGRAD.arguments()).is_inference()


@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_second_order(conv: Conv) -> None:
    x, weight, grad = conv.make()
    grad.requires_grad_()
    results = []
    for conv2d in (convolution.conv2d, eager):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = conv2d(*leaves, *conv.arguments())
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, [*leaves, grad])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_outputs_change_in_place(conv: Conv, dtype: torch.dtype) -> None:
    """As those of F.conv2d do: no views of something else."""
    x, weight, grad = conv.make(dtype)
    results = []
    for conv2d in (convolution.conv2d, eager):
        w = weight.clone().requires_grad_()
        y = conv2d(x.clone().requires_grad_(), w, *conv.arguments())
        assert not y._is_view()
        y += 1
        y.mul_(2)
        y.backward(grad)
        assert w.grad is not None
        w.grad += w  # with the graph on, as a penalty might
        results.append(w.grad)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_batched_gradients(conv: Conv) -> None:
    x, weight, grad = conv.make()
    grads = torch.stack([grad, 2 * grad])
    x.requires_grad_()
    weight.requires_grad_()
    y = convolution.conv2d(x, weight, *conv.arguments())
    ours = torch.autograd.grad(y, (x, weight), grads, is_grads_batched=True)
    y = eager(x, weight, *conv.arguments())
    theirs = torch.autograd.grad(y, (x, weight), grads, is_grads_batched=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_hooks_on_tensors() -> None:
    x, weight, grad = WINOGRAD.make()
    x.requires_grad_()
    weight.requires_grad_()
    right = run(convolution.conv2d, x, weight, 2 * grad, WINOGRAD)
    seen: list[str] = []
    y = convolution.conv2d(x, weight, *WINOGRAD.arguments())
    y.retain_grad()
    y.register_hook(lambda g: seen.append("y") or 2 * g)
    x.register_hook(lambda g: seen.append("x") or -g)
    weight.register_post_accumulate_grad_hook(lambda w: seen.append("weight"))
    y.backward(grad)
    assert sorted(seen) == ["weight", "x", "y"]
    assert y.grad is not None
    assert torch.equal(y.grad, 2 * grad)
    assert torch.equal(x.grad, -right["dx"])  # type: ignore[arg-type]
    assert torch.equal(weight.grad, right["dw"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved(dtype: torch.dtype) -> None:
    for conv in (WINOGRAD, STRIDED, ONE, SMALLER):
        x, weight, _ = conv.make(dtype)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, id):
            convolution.conv2d(x, weight.requires_grad_(), *conv.arguments())
        assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]


# ---- autocast ------------------------------------------------------------------------------------
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_autocast(conv: Conv, dtype: torch.dtype, inside: bool) -> None:
    x, weight, grad = conv.make(dtype)

    def step(conv2d: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = x.float().requires_grad_(), weight.float().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = conv2d(*leaves, *conv.arguments())
            if inside:
                y.backward(grad)
        if not inside:
            y.backward(grad)
        assert torch.is_autocast_enabled("cpu") is False
        dx, dw = (t.grad for t in leaves)
        assert dx is not None
        assert dw is not None
        assert (y.dtype, dx.dtype, dw.dtype) == (dtype, torch.float32, torch.float32)
        # Rounded to dtype on the way: back in it nothing is lost, and the rule knows its floor.
        return {"y": y.detach(), "dx": dx.to(dtype), "dw": dw.to(dtype)}

    with dispatch.recording() as events:
        ours = step(convolution.conv2d)
    assert [e.op for e in events] == ["conv2d"]
    theirs = step(eager)
    exact = run(eager, x.double(), weight.double(), grad.double(), conv)
    terms = magnitudes(x, weight, grad, conv, way_of(conv, x, weight))
    for name, result in ours.items():
        oracle.check(
            name,
            result,
            theirs[name],
            exact[name],
            magnitude=terms[name],
            channel=int(name != "dw"),
        )


def test_a_way_under_autocast_is_none_without() -> None:
    """x in 16 bits and weight in 32: cast under autocast, PyTorch's error otherwise."""
    x, weight, _ = WINOGRAD.make()
    x = x.bfloat16()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="should be the same"):
            convolution.conv2d(x, weight, *WINOGRAD.arguments())
        with torch.autocast("cpu", torch.bfloat16), dispatch.recording() as events:
            y = convolution.conv2d(x, weight, *WINOGRAD.arguments())
        assert y.dtype is torch.bfloat16
        assert [e.op for e in events] == ["conv2d"]
