# SPDX-License-Identifier: BSD-3-Clause
"""The tolerance rule of every numeric test, and what it takes to build and run one case.

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
found from the oracle (`kink`) and get an incoming gradient of 0: then no result depends on what
was decided there, and nothing is loosened or left out of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


# ---- inputs in any layout ------------------------------------------------------------------------
LAYOUTS = ("contiguous", "channels_last", "sliced", "channel_slice", "expanded", "permuted")


def lay(values: Tensor, layout: str) -> Tensor:
    """`values` (contiguous) with the strides of `layout`; "expanded" repeats the first sample.

    "sliced" skips every second element of the last dimension and starts at an offset,
    "channel_slice" is the middle of a channels-last tensor with more channels, "permuted" lies in
    memory with its dimensions reversed.
    """
    if layout == "channels_last":
        return channels_last(values)
    if layout == "expanded" and values.size(0) > 0:
        return values[:1].clone().expand(values.shape)
    if layout == "permuted":
        backwards = list(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout in ("sliced", "channel_slice"):
        n, c, *rest = values.shape
        if layout == "sliced" and rest:
            view = values.new_empty(n + 1, c, *rest[:-1], 2 * rest[-1])[1:, ..., ::2]
        elif layout == "sliced":
            view = values.new_empty(n + 1, 2 * c)[1:, ::2]
        else:
            view = values.new_empty(n, *rest, c + 3).movedim(-1, 1)[:, 2 : 2 + c]
        return view.copy_(values)
    return values.clone(memory_format=torch.contiguous_format)


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def is_channels_last(t: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()])


def assert_layout(y: Tensor, x: Tensor) -> None:
    """The layout rule of outputs: channels-last where x is dense so, else contiguous."""
    if is_channels_last(x) and not x.is_contiguous():
        assert is_channels_last(y), f"channels-last x gave strides {y.stride()}"
    else:
        assert y.is_contiguous(), f"x of strides {x.stride()} gave strides {y.stride()}"


# ---- one case of batch_norm_act ------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of batch_norm_act, forward and backward. Every field is a plain word or number."""

    shape: tuple[int, ...] = (4, 7, 5, 3)
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None  # None: float32, float64 for float64
    layout: str = "contiguous"
    training: bool = True
    activation: str | None = "relu"
    affine: str = "both"  # "both" | "weight" | "bias" | "none"
    gamma: str = "normal"  # "normal" | "zero" | "negative"
    running: bool = True
    residual: str = "none"  # "none" | "tensor" | "same" (as x) | "frozen" (needs no gradient)
    residual_layout: str | None = None  # None: as x
    grad_layout: str = "contiguous"  # a layout, or "scalar": one value of stride 0, as from .sum()
    momentum: float = 0.1
    eps: float = 1e-5
    values: str = "normal"  # "normal" | "offset" | "outlier" | "constant"
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the default case, as a test's id."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default or f.name == "shape":
                words.append(f"{f.name}={word(value)}")
        return "-".join(words)


def word(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


@dataclass
class Inputs:
    """The tensors of one case; `grad` is the gradient that comes in."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    grad: Tensor

    def to(self, *args: Any) -> Inputs:
        """All tensors converted, x still being the residual where it was."""
        moved = {k: None if t is None else t.to(*args) for k, t in vars(self).items()}
        if self.residual is self.x:
            moved["residual"] = moved["x"]
        return Inputs(**moved)


def make(case: Case, device: str = "cpu") -> Inputs:
    """Inputs of a case, drawn from its seed, with incoming gradients of 0 at ReLU's kink."""
    rng = torch.Generator().manual_seed(case.seed)
    n, c, *rest = case.shape
    param = case.param_dtype or accumulate_dtype(case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x = lay(_values(case, draw).to(case.dtype), case.layout)
    residual = None
    if case.residual == "same":
        residual = x
    elif case.residual != "none":
        residual = lay(draw(n, c, *rest).to(case.dtype), case.residual_layout or case.layout)
    gamma = {"normal": draw(c), "zero": torch.zeros(c), "negative": -draw(c).abs()}[case.gamma]
    weight = gamma.to(param) if case.affine in ("both", "weight") else None
    bias = draw(c).to(param) if case.affine in ("both", "bias") else None
    running_mean = draw(c).to(param) if case.running else None
    running_var = draw(c).abs().add(0.5).to(param) if case.running else None

    grad = draw(n, c, *rest).to(case.dtype)
    inputs = Inputs(x, residual, weight, bias, running_mean, running_var, grad)
    relu = case.activation == "relu"
    if relu and case.grad_layout == "scalar":
        _separate(inputs, case)
    near = kink(inputs, case) if relu else torch.zeros(case.shape, dtype=torch.bool)
    if case.grad_layout == "scalar":
        assert not near.any(), "a gradient of one value needs a case away from the kink"
        inputs.grad = torch.tensor(0.7, dtype=case.dtype).expand(case.shape)
    else:
        repeated = case.grad_layout == "expanded" and n > 0
        near = near.any(0, keepdim=True) if repeated else near
        inputs.grad = lay(grad.masked_fill(near, 0.0), case.grad_layout)
    return inputs if device == "cpu" else inputs.to(device)


def _values(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    n, c, *rest = case.shape
    shape = (1, c, *(1 for _ in rest))
    x = draw(n, c, *rest)
    if case.values == "offset":
        return x * 1e-2 + 1e4
    x = x * (0.5 + draw(*shape).abs()) + draw(*shape)
    if case.values == "outlier" and x.numel() > 0:
        x.view(-1)[x.numel() // 2] = 1e3 if case.dtype == torch.float16 else 1e6
    if case.values == "constant":
        x[:, 0] = 3.3
    return x


def _separate(inputs: Inputs, case: Case) -> None:
    """Shift every channel's bias so that ReLU passes all of the channel or nothing of it."""
    assert inputs.bias is not None, "a case with a gradient of one value and ReLU needs a bias"
    z = _terms(inputs, case).z
    farthest = z.abs().amax([d for d in range(z.dim()) if d != 1])
    sign = torch.tensor([1.0, -1.0]).repeat(z.size(1))[: z.size(1)]
    inputs.bias += (sign * (1 + 2 * farthest)).to(inputs.bias.dtype)


# ---- the formula and its absolute terms ----------------------------------------------------------
@dataclass
class _Terms:
    """float64, broadcastable to x: pre-activation z, and the parts the magnitudes are made of."""

    z: Tensor
    centred: Tensor  # |x - mean|
    off: Tensor  # |x - mean| with what the roundings of mean and invstd add
    mean: Tensor  # |mean|, times the roundings of its sum
    var: Tensor  # likewise, times its condition number too
    invstd: Tensor
    scale: Tensor  # |weight| * invstd
    worse: Tensor  # factor on invstd for the roundings it inherits from var
    rest: Tensor  # |bias| + |residual|


def _terms(inputs: Inputs, case: Case) -> _Terms:
    v = inputs.to(torch.float64)
    dims = [0, *range(2, v.x.dim())]
    shape = [1, -1, *([1] * (v.x.dim() - 2))]

    def per_channel(t: Tensor | None, default: float) -> Tensor:
        return torch.tensor(default, dtype=torch.float64) if t is None else t.view(shape)

    one = torch.ones((), dtype=torch.float64)
    if case.training:
        mean = v.x.mean(dims, keepdim=True)
        var = (v.x - mean).square().mean(dims, keepdim=True)
        summed = _roundings(inputs.x) * one
        condition = summed * torch.sqrt(1 + mean**2 / (var + case.eps))
    else:
        mean, var = per_channel(v.running_mean, 0.0), per_channel(v.running_var, 1.0)
        summed = condition = one
    invstd = torch.rsqrt(var + case.eps)
    worse = 1 + condition / 2  # d(v^-1/2) is half of dv, relatively
    weight, bias = per_channel(v.weight, 1.0), per_channel(v.bias, 0.0)
    residual = torch.zeros_like(v.x) if v.residual is None else v.residual
    return _Terms(
        z=(v.x - mean) * invstd * weight + bias + residual,
        centred=(v.x - mean).abs(),
        off=(v.x - mean).abs() * worse + mean.abs() * summed,
        mean=mean.abs() * summed,
        var=var * condition,
        invstd=invstd,
        scale=weight.abs() * invstd,
        worse=worse,
        rest=bias.abs() + residual.abs(),
    )


def _roundings(x: Tensor) -> float:
    """Roundings of the pairwise sum of one channel of x."""
    count = x.numel() // max(x.size(1), 1)
    return max(1.0, math.log2(max(count, 1)))


def kink(inputs: Inputs, case: Case) -> Tensor:
    """True where roundings, eager's or ours, may decide the sign of the pre-activation."""
    t = _terms(inputs, case)
    rounded = t.scale * (t.centred + t.mean) + t.rest
    accumulated = t.scale * t.off + t.rest
    acc = accumulate_dtype(case.dtype)
    bound = torch.finfo(case.dtype).eps * rounded + torch.finfo(acc).eps * accumulated
    return t.z.abs() <= 2 * bound


def preactivation(inputs: Inputs, case: Case) -> Tensor:
    """What goes into ReLU, in float64."""
    return _terms(inputs, case).z


def magnitudes(inputs: Inputs, case: Case) -> Results:
    """Every result's formula with each term replaced by its absolute value, in float64."""
    t = _terms(inputs, case)
    dims = [0, *range(2, inputs.x.dim())]
    count = max(inputs.x.numel() // max(inputs.x.size(1), 1), 1)
    n = _roundings(inputs.x)
    g = inputs.grad.double().abs()
    if case.activation == "relu":
        g = torch.where(t.z <= 0, 0.0, g)
    dx = t.scale * g
    if case.training:
        g_mean = n * g.sum(dims, keepdim=True) / count
        dot = n * (g * t.centred).sum(dims, keepdim=True) / count
        square = t.invstd**2
        dx = t.scale * t.worse * (g + g_mean + t.centred * square * dot)
        dx = dx + t.scale * square * t.mean * (dot + t.centred * g_mean)
    m = case.momentum
    old_mean = 0.0 if inputs.running_mean is None else inputs.running_mean.double().abs()
    old_var = 0.0 if inputs.running_var is None else inputs.running_var.double()
    unbiased = t.var.flatten() * count / max(count - 1, 1)
    x_mean = n * inputs.x.double().abs().sum(dims) / count
    return {
        "y": t.scale * t.off + t.rest,
        "dx": dx + g if case.residual == "same" else dx,
        "dresidual": g,
        "dweight": n * (t.invstd * (g * t.off)).sum(dims),
        "dbias": n * g.sum(dims),
        "running_mean": (1 - m) * old_mean + m * x_mean,
        "running_var": (1 - m) * old_var + m * unbiased,
        "mean": x_mean,
        "invstd": (t.invstd * t.worse).flatten(),
    }


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


def changed(case: Case, **changes: Any) -> Case:
    """The case with some fields changed."""
    return replace(case, **changes)
