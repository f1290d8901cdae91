# SPDX-License-Identifier: BSD-3-Clause
"""The tolerance rule of every numeric test, the oracle, and running a case by both.

The rule. With the same inputs, rounded to the dtype first,

    oracle = the formula on these values in float64, with a corrected mean
    eager  = PyTorch's own operators in the dtype under test
    require  max |ours - oracle|  <=  2 * max |eager - oracle|  +  rounding floor

with the maximum taken over each channel by itself, so that a channel of large values cannot hide
an error in another. The floor is what correct rounding alone may cost. Nothing in it is chosen:

    floor = eps(dtype) * max |oracle|  +  eps(accumulation dtype) * max magnitude

The first term is twice the error of rounding the oracle once to the result's dtype (as in
flash-attention's tests); the second is the same for the terms that the formula adds up:
`magnitude` is the formula of the result with every term replaced by its absolute value (first-order
running error analysis). In it a sum of n terms counts log2(n) times, the roundings of pairwise
summation (Higham 1993); x - mean carries the rounding of the mean; and a variance carries its
condition number sqrt(1 + mean^2 / variance), which a sound one-pass algorithm pays once and
E[x^2] - E[x]^2 pays squared (Chan, Golub, LeVeque 1983).

(F.batch_norm in float64 is no oracle for float64: its sequential sums lose two digits.)

NaN and infinities must be exactly where eager has them.

ReLU's gradient jumps at 0, where two orders of rounding may honestly disagree. Such elements are
found from the float64 values (cases.kink) and get an incoming gradient of 0: then no result depends
on what was decided there, and nothing is loosened or left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case, Inputs, Results, accumulate_dtype, magnitudes, make
from layouts import assert_layout
from torch import Tensor


# ---- the rule ------------------------------------------------------------------------------------
def check(
    name: str,
    ours: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    magnitude: Tensor | None = None,
    accumulated: torch.dtype | None = None,
    channel: int | None = None,
    context: object = "",
) -> None:
    """Assert the rule for one result.

    `magnitude` (float64, the oracle's shape; by default |oracle|): sum of the absolute terms.
    `accumulated`: dtype the terms were added up in, by default the one that belongs to ours.
    `channel`: dimension whose slices are judged one by one; None judges the whole at once.
    Raises AssertionError naming shape, strides, dtype, errors and the first five bad elements.
    """
    where = f"{name}: {tuple(ours.shape)} {ours.dtype} strides {ours.stride()} [{context}]"
    assert ours.shape == oracle.shape, f"{where}\n  shape must be {tuple(oracle.shape)}"
    assert ours.dtype == eager.dtype, f"{where}\n  dtype must be {eager.dtype}"
    out = torch.finfo(ours.dtype)
    acc = torch.finfo(accumulated or accumulate_dtype(ours.dtype))
    ours, eager, oracle = (t.detach().double().cpu() for t in (ours, eager, oracle))
    magnitude = oracle.abs() if magnitude is None else magnitude.detach().double().cpu()

    elsewhere = ~_same_kind(ours, eager)
    if elsewhere.any():
        what = "NaN or infinity not where eager has it"
        raise AssertionError(f"{where}\n  {what}\n{_first(elsewhere, ours, eager, oracle)}")

    judged = eager.isfinite() & oracle.isfinite() & magnitude.isfinite()
    error, baseline, size, terms = (
        torch.where(judged, t, 0.0)
        for t in ((ours - oracle).abs(), (eager - oracle).abs(), oracle.abs(), magnitude)
    )
    floor = out.eps * (_peak(size, channel) + out.smallest_normal) + acc.eps * _peak(terms, channel)
    bad = error > 2 * _peak(baseline, channel) + floor
    if bad.any():
        raise AssertionError(
            f"{where}\n  {int(bad.sum())} of {bad.numel()} elements are off:"
            f" max error {error.max():.3g} (eager {baseline.max():.3g}), mean {error.mean():.3g}"
            f" (eager {baseline.mean():.3g}), largest floor {floor.max():.3g}\n"
            + _first(bad, ours, eager, oracle)
        )


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    """True where both are finite, both NaN, or the same infinity."""
    return (a.isfinite() & b.isfinite()) | (a.isnan() & b.isnan()) | (a == b)


def _peak(t: Tensor, channel: int | None) -> Tensor:
    """Maximum over everything but `channel`, shaped to broadcast against t."""
    if t.numel() == 0 or t.dim() == 0:
        return t
    dims = [d for d in range(t.dim()) if d != channel]
    return t.amax(dims, keepdim=True) if dims else t


def _first(bad: Tensor, ours: Tensor, eager: Tensor, oracle: Tensor) -> str:
    rows = []
    for index in bad.nonzero()[:5].tolist():
        at = tuple(index)
        values = f"{ours[at]:.9g} (eager {eager[at]:.9g}, oracle {oracle[at]:.9g})"
        rows.append(f"  at {list(at)}: {values}")
    return "\n".join(rows)


# ---- running a case ------------------------------------------------------------------------------
def eager_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """PyTorch's own three operators; the package's reference is not asked."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if activation == "relu" else y


def exact_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """The formula in float64: each step correct to a few of its roundings, on any values."""
    assert x.dtype == torch.float64
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *([1] * (x.dim() - 2))]
    if training:
        first = x.mean(dims, keepdim=True)
        mean = first + (x - first).mean(dims, keepdim=True)  # the second term corrects the first
        var = (x - mean).square().mean(dims, keepdim=True)
        count = x.numel() // x.size(1)
        for running, batch in ((running_mean, mean), (running_var, var * count / (count - 1))):
            if running is not None:
                running.copy_((1 - momentum) * running + momentum * batch.detach().flatten())
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.view(shape), running_var.view(shape)
    y = (x - mean) / torch.sqrt(var + eps)
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    y = y if residual is None else y + residual
    return torch.relu(y) if activation == "relu" else y


def run(op: Callable[..., Tensor], inputs: Inputs, case: Case) -> Results:
    """Forward and backward of batch_norm_act by `op`: every output, gradient and statistic."""

    def leaf(t: Tensor | None, needs: bool = True) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_(needs)

    x = leaf(inputs.x)
    same = inputs.residual is inputs.x
    residual = x if same else leaf(inputs.residual, case.residual != "frozen")
    weight, bias = leaf(inputs.weight), leaf(inputs.bias)
    stats = [None if t is None else t.clone() for t in (inputs.running_mean, inputs.running_var)]
    y = op(
        x,
        weight,
        bias,
        *stats,
        residual=residual,
        training=case.training,
        momentum=case.momentum,
        eps=case.eps,
        activation=case.activation,
    )
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    if not same:
        leaves["dresidual"] = residual
    leaves = {k: t for k, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    results = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    named = zip(("running_mean", "running_var"), stats, strict=True)
    return results | {k: t for k, t in named if t is not None}


def compare(
    case: Case, op: Callable[..., Tensor], device: str = "cpu", *, layout_rule: bool = False
) -> None:
    """Run a case by `op`, by eager and by the oracle, and check every result by the rule.

    `layout_rule`: the output's layout too (the reference's is whatever PyTorch makes of it).
    """
    inputs = make(case, device)
    ours = run(op, inputs, case)
    eager = run(eager_batch_norm_act, inputs, case)
    oracle = run(exact_batch_norm_act, inputs.to(torch.float64), case)
    sizes = magnitudes(inputs, case)
    assert ours.keys() == eager.keys()
    if layout_rule:
        assert_layout(ours["y"], inputs.x)
    for name, result in ours.items():
        check(
            name,
            result,
            eager[name],
            oracle[name],
            magnitude=sizes[name],
            accumulated=accumulate_dtype(case.dtype),
            channel=1 if result.dim() > 1 else None,
            context=case,
        )
