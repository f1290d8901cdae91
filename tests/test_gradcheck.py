# SPDX-License-Identifier: BSD-3-Clause
"""First and second derivatives against finite differences, and second ones against eager's.

gradcheck and gradgradcheck run in float64 on tiny shapes whose pre-activations are all farther from
ReLU's kink than the differences step. The second order goes through the differentiable reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import cases
import oracle
import pytest
import torch
from cases import Case, word
from layouts import lay
from oracle import eager_batch_norm_act
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

STEP = 1e-6  # of the finite differences
SHAPE = (3, 2, 1, 3)


def _cases() -> list[Case]:
    joins = (("none", "relu"), ("none", None), ("tensor", "relu"), ("tensor", None), ("same", None))
    cases = [
        Case(shape=SHAPE, training=t, residual=r, activation=a, layout=lay)
        for t, (r, a), lay in product(
            (True, False), joins, ("contiguous", "channels_last", "permuted")
        )
    ]
    cases += [
        Case(shape=SHAPE, training=t, affine=a, residual=r)
        for t, a, r in product((True, False), ("none", "weight", "bias"), ("none", "tensor"))
    ]
    cases += [Case(shape=s) for s in ((4, 3), (3, 2, 4), (2, 2, 2, 2, 2), (5, 1, 1, 1))]
    return [replace(c, dtype=torch.float64) for c in dict.fromkeys(cases)]


def _smooth(case: Case) -> cases.Inputs:
    """Inputs of the first seed whose pre-activations keep away from 0, on both sides of it."""
    for seed in range(100):
        case = replace(case, seed=seed)
        inputs = cases.make(case)
        z = cases.preactivation(inputs, case)
        mixed = 0.25 < (z > 0).double().mean() < 0.75
        if case.activation is None or (mixed and z.abs().min() > 1e4 * STEP):
            return inputs
    raise AssertionError(f"no seed keeps {case} away from the kink")


def _function(
    op: Callable[..., Tensor], inputs: cases.Inputs, case: Case
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as a function of its differentiable tensors, and these."""
    names = ["x", "weight", "bias"] + (["residual"] if case.residual == "tensor" else [])
    names = [n for n in names if getattr(inputs, n) is not None]

    def function(*tensors: Tensor) -> Tensor:
        given = {"weight": None, "bias": None, "residual": None} | dict(
            zip(names, tensors, strict=True)
        )
        if case.residual == "same":
            given["residual"] = given["x"]
        stats = [t.clone() for t in (inputs.running_mean, inputs.running_var)]
        return op(
            given["x"],
            given["weight"],
            given["bias"],
            *stats,
            residual=given["residual"],
            training=case.training,
            eps=case.eps,
            activation=case.activation,
        )

    return function, [getattr(inputs, n).detach().requires_grad_() for n in names]


@pytest.mark.slow_for("plain")
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_batch_norm_act_first_order(impl, case: Case) -> None:
    function, tensors = _function(impl.batch_norm_act, _smooth(case), case)
    assert gradcheck(function, tensors, eps=STEP, check_undefined_grad=True)


@pytest.mark.slow_for("plain")
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_batch_norm_act_second_order(impl, case: Case) -> None:
    function, tensors = _function(impl.batch_norm_act, _smooth(case), case)
    if impl.name == "reference" and case.affine == "bias":
        # PyTorch's own: F.batch_norm with a bias and no weight forgets the bias in second order.
        with pytest.raises(GradcheckError, match="analytical"):
            gradgradcheck(function, tensors, eps=STEP, fast_mode=True)
        return
    assert gradgradcheck(function, tensors, eps=STEP, fast_mode=True)


@pytest.mark.slow
@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_batch_norm_act_second_order_in_full(impl, case: Case) -> None:
    """Every element of the second derivative, where the test above takes random projections."""
    function, tensors = _function(impl.batch_norm_act, _smooth(case), case)
    assert gradgradcheck(function, tensors, eps=STEP)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("shape", [SHAPE, (5,), (3, 4), (2, 2, 2, 2, 2)], ids=word)
def test_add_relu(impl, layout: str, shape: tuple[int, ...]) -> None:
    draw = torch.randn(2, *shape, dtype=torch.float64)
    draw[1] += torch.where(draw.sum(0) > 0, 0.1, -0.1)
    x, residual = (lay(t, layout) if t.dim() > 1 else t.clone() for t in draw)
    tensors = (x.requires_grad_(), residual.requires_grad_())
    assert gradcheck(impl.add_relu, tensors, eps=STEP)
    assert gradgradcheck(impl.add_relu, tensors, eps=STEP, fast_mode=True)


# ---- against eager -------------------------------------------------------------------------------
def _penalty(op: Callable[..., Tensor], inputs: cases.Inputs, case: Case) -> list[Tensor]:
    """First gradients of a loss, and the gradients of the loss plus their squared norm."""
    function, tensors = _function(op, inputs, case)
    grad = inputs.grad.detach().requires_grad_()
    y = function(*tensors)
    loss = (y * grad).sum() + y.square().mean()
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    total = loss + sum(g.square().sum() for g in first)
    return [*first, *torch.autograd.grad(total, [*tensors, grad])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=word)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual", ["none", "tensor", "same"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_penalty_equals_eager(
    impl, dtype: torch.dtype, training: bool, residual: str, layout: str
) -> None:
    case = Case(dtype=dtype, training=training, residual=residual, layout=layout)
    inputs = cases.make(case)
    ours = _penalty(impl.batch_norm_act, inputs, case)
    eager = _penalty(eager_batch_norm_act, inputs, case)
    exact = _penalty(oracle.exact_batch_norm_act, inputs.to(torch.float64), case)
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        # The terms of a second derivative are of the size of the largest of its results.
        size = torch.full_like(c, 8 * c.detach().abs().max().item())
        oracle.check(f"result {i}", a, b, c, magnitude=size, context=case)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_create_graph_changes_no_first_gradient(impl, training: bool) -> None:
    """The differentiable backward gives what the fused one gives, to rounding."""
    case = Case(dtype=torch.float64, training=training, residual="tensor")
    inputs = cases.make(case)
    function, tensors = _function(impl.batch_norm_act, inputs, case)
    plain = torch.autograd.grad(function(*tensors), tensors, inputs.grad)
    graph = torch.autograd.grad(function(*tensors), tensors, inputs.grad, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)


def test_add_relu_penalty_equals_eager(impl) -> None:
    values = torch.randn(3, 2, 7, 5, 3)

    def penalty(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, residual, grad = (t.detach().clone().requires_grad_() for t in values)
        loss = (op(x, residual).square() * grad).sum()
        first = torch.autograd.grad(loss, (x, residual), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, residual, grad))

    ours, eager = penalty(impl.add_relu), penalty(lambda x, r: torch.relu(x + r))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_third_order(impl, training: bool) -> None:
    """Against the plain formula: F.batch_norm's own third order is wrong in training (its second
    takes the batch statistics for constants), so neither eager nor our reference is asked."""
    case = Case(shape=(3, 2, 2, 2), dtype=torch.float64, residual="tensor", training=training)
    inputs = _smooth(case)

    def third(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        function, tensors = _function(op, inputs, case)
        g = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors, create_graph=True)
        h = torch.autograd.grad(sum(t.pow(2).sum() for t in g), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.sum() for t in h), tensors)

    ours, exact = third(impl.batch_norm_act), third(oracle.exact_batch_norm_act)
    for a, b in zip(ours, exact, strict=True):
        assert b.abs().max() > 1
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
