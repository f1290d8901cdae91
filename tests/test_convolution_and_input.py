# SPDX-License-Identifier: BSD-3-Clause
"""convolution.conv2d_and_input: the input's other gradient, and the convolution's added into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from convolutions import CONVS, ONE, SMALLER, STRIDED, WINOGRAD, Conv, eager, magnitudes, way_of
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv_kernels, _reuse, convolution, dispatch

pytestmark = [
    pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable())),
    pytest.mark.usefixtures("every_convolution"),
]
EACH = [WINOGRAD, STRIDED, ONE, SMALLER]
SQUARE = Conv(kernel=1, padding=0, channels=(32, 32))  # y is of x's shape


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reuse, "SMALL", 0)


@pytest.fixture
def onto(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every backward by our kernels, whether it added into a gradient that was there."""
    calls: list[bool] = []
    plain = _conv_kernels.backward

    def watched(*args: Any, onto: Tensor | None = None) -> Any:
        calls.append(onto is not None)
        return plain(*args, onto=onto)

    monkeypatch.setattr(_conv_kernels, "backward", watched)
    return calls


def both(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return eager(x, weight, *arguments), x


def apart(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Our kernels, with the sum of the gradients left to autograd."""
    return convolution.conv2d(x, weight, *arguments), x


Both = Callable[..., tuple[Tensor, Tensor]]


def run(f: Both, conv: Conv, x: Tensor, weight: Tensor, grad: Tensor, other: Tensor) -> list[Any]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y, same = f(x, weight, *conv.arguments())
    loss = (same * other).sum() + (y * grad).sum()
    return [y.detach(), same.detach(), *torch.autograd.grad(loss, (x, weight))]


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [c for c, _ in CONVS], ids=str)
def test_against_float64(conv: Conv, dtype: torch.dtype, onto: list[bool]) -> None:
    x, weight, grad = conv.make(dtype)
    other = torch.randn_like(x)
    way = way_of(conv, x, weight)
    with dispatch.recording() as events:
        _, same, *ours = run(convolution.conv2d_and_input, conv, x, weight, grad, other)
    assert [e.op for e in events] == (["conv2d"] if way else [])
    assert onto == ([True] if way else [])
    assert torch.equal(same, x)
    theirs = run(both, conv, x, weight, grad, other)[2:]
    exact = run(both, conv, *(t.double() for t in (x, weight, grad, other)))[2:]
    terms = magnitudes(x, weight, grad, conv, way)
    terms["dx"] = terms["dx"] + other.double().abs()
    for i, name in enumerate(("dx", "dw")):
        oracle.check(
            name,
            ours[i],
            theirs[i],
            exact[i],
            magnitude=terms[name],
            accumulated=torch.float32,
            channel=1 - i,
            context=conv,
        )


@pytest.mark.parametrize("conv", EACH, ids=str)
def test_the_same_input(conv: Conv) -> None:
    """Storage and values of x, and a result that others may use as they use x."""
    x, weight, _ = conv.make()
    x.requires_grad_()
    _, same = convolution.conv2d_and_input(x, weight, *conv.arguments())
    assert same.data_ptr() == x.data_ptr()
    assert same.stride() == x.stride()
    assert same.requires_grad


def test_x_itself_where_it_needs_no_gradient() -> None:
    x, weight, _ = ONE.make()
    weight.requires_grad_()
    assert convolution.conv2d_and_input(x, weight, *ONE.arguments())[1] is x
    with torch.no_grad():
        assert convolution.conv2d_and_input(x, weight, *ONE.arguments())[1] is x


# ---- whose gradient may be written over ----------------------------------------------------------
def test_not_where_a_hook_kept_it(onto: list[bool]) -> None:
    x, weight, grad = ONE.make()
    x.requires_grad_()
    other, kept = torch.randn_like(x), []
    y, same = convolution.conv2d_and_input(x, weight, *ONE.arguments())
    same.register_hook(kept.append)
    ((same * other).sum() + (y * grad).sum()).backward()
    assert onto == [False]
    assert torch.equal(kept[0], other)


def test_not_where_both_have_the_same_gradient(onto: list[bool]) -> None:
    """y + x hands one tensor to both: written over, it would be wrong for the weight."""
    x, weight, grad = SQUARE.make()
    leaves = x.requires_grad_(), weight.requires_grad_()
    ours, want = (
        torch.autograd.grad(sum(f(*leaves, *SQUARE.arguments())), leaves, grad)
        for f in (convolution.conv2d_and_input, apart)
    )
    assert onto == [False, False]
    assert all(map(torch.equal, ours, want))


@pytest.mark.parametrize("used", ["y", "x"])
def test_one_of_both_unused(used: str, onto: list[bool]) -> None:
    x, weight, grad = ONE.make()
    other = torch.randn_like(x)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y, same = convolution.conv2d_and_input(*leaves, *ONE.arguments())
    loss = (y * grad).sum() if used == "y" else (same * other).sum()
    dx, dw = torch.autograd.grad(loss, leaves, allow_unused=True)
    if used == "x":
        assert torch.equal(dx, other)
        assert dw is None
    else:
        assert onto == [False]
        want = torch.autograd.grad(apart(*leaves, *ONE.arguments())[0], leaves, grad)
        assert all(map(torch.equal, (dx, dw), want))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_what_is_wanted(wanted: str) -> None:
    x, weight, grad = WINOGRAD.make()
    leaf = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}[wanted]
    other = torch.randn_like(x)
    got, want = (
        torch.autograd.grad((y * grad).sum() + (same * other).sum(), leaf)[0]
        for y, same in (
            f(x, weight, *WINOGRAD.arguments()) for f in (convolution.conv2d_and_input, both)
        )
    )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---- other ways through the graph ----------------------------------------------------------------
@pytest.mark.parametrize("conv", EACH, ids=str)
def test_second_order(conv: Conv) -> None:
    x, weight, grad = conv.make()
    results = []
    for f in (convolution.conv2d_and_input, both):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y, same = f(*leaves, *conv.arguments())
        loss = (y * grad).sum() + same.pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batched_gradients() -> None:
    x, weight, grad = ONE.make()
    grads = torch.stack([grad, 2 * grad]), torch.randn(2, *x.shape)
    leaves = x.requires_grad_(), weight.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(*leaves, *ONE.arguments()), leaves, grads, is_grads_batched=True)
        for f in (convolution.conv2d_and_input, both)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_second_backward_gives_the_same() -> None:
    x, weight, grad = ONE.make()
    leaves, other = (x.requires_grad_(), weight.requires_grad_()), torch.randn_like(x)
    y, same = convolution.conv2d_and_input(*leaves, *ONE.arguments())
    loss = (y * grad).sum() + (same * other).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


def test_hooks_on_the_input() -> None:
    """What x's hooks see and retain_grad keeps is the whole gradient."""
    x, weight, grad = ONE.make()
    other = torch.randn_like(x)
    results = []
    for f in (convolution.conv2d_and_input, both):
        seen: list[Tensor] = []
        inner = x.detach().requires_grad_() * 1
        inner.retain_grad()
        inner.register_hook(seen.append)
        y, same = f(inner, weight, *ONE.arguments())
        ((y * grad).sum() + (same * other).sum()).backward()
        results.append([*seen, inner.grad])
    torch.testing.assert_close(*results)
