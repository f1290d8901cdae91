# SPDX-License-Identifier: BSD-3-Clause
"""One call of batch_norm_act as data: what is called, its tensors, and the size of its terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from layouts import lay
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- a case and its tensors ----------------------------------------------------------------------
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
