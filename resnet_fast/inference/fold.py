# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm folded into the conv before it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

# Input sizes to remember for one conv; the copies are as many as there are layouts, two or three.
MAX_SIZES = 256


@dataclass(eq=False)
class Norm:
    """An eval-mode batch norm: nodes of its parameters and statistics."""

    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node
    var: fx.Node
    eps: float


@dataclass(eq=False)
class ConvSpec:
    """One conv and all that is fused with it: y = pool(act(norms(conv(x) + bias) + residual))."""

    name: str
    weight: fx.Node
    bias: fx.Node | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    norms: list[Norm] = field(default_factory=list)
    residual: bool = False
    inplace: bool = False
    relu: bool = False
    max_pool: bool = False  # of 3x3, stride 2, padding 1

    def label(self) -> str:
        """For the table: conv + bn + add + relu."""
        parts = ["conv", *["bn"] * len(self.norms)]
        parts += ["add (in place)" if self.inplace else "add"] * self.residual
        return " + ".join([*parts, *["relu"] * self.relu, *["max-pool"] * self.max_pool])


class Part(NamedTuple):
    """What a conv is in conv_sequence, see resnet_fast._conv_sequence.Step."""

    kind: int
    weight: Tensor
    bias: Tensor
    geometry: Sequence[Sequence[int]]
    relu: bool


@dataclass(frozen=True)
class Writes:
    """A conv that writes where it is told: function(x, residual or None, into or None).

    into: memory for the result; it is the residual, or there is none. Without it the result is a
    new tensor. part: of the size of x, what the conv is in a sequence.
    """

    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    part: Callable[[Sequence[int]], Part]


# Or a function of (x) or (x, residual); the spec says whether the residual is overwritten.
Conv = Writes | Callable[..., Tensor]


def folded(spec: ConvSpec, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor | None]:
    """(weight, bias or None) with the norms in them, float64, new tensors."""

    def value(node: fx.Node | None) -> Tensor | None:
        return None if node is None else values[node].detach().to(torch.float64)

    weight, bias = value(spec.weight), value(spec.bias)
    assert weight is not None
    for norm in spec.norms:
        mean, var = value(norm.mean), value(norm.var)
        assert mean is not None
        assert var is not None
        scale = (var + norm.eps).rsqrt()
        gain, shift = value(norm.weight), value(norm.bias)
        scale = scale if gain is None else scale * gain
        moved = -mean if bias is None else bias - mean
        bias = moved * scale if shift is None else moved * scale + shift
        weight = weight * scale.view(-1, 1, 1, 1)
    return weight, bias
