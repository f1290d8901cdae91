# SPDX-License-Identifier: BSD-3-Clause
"""Does a candidate compute the conv it claims to? Asked on made-up inputs before it is timed.

The rule of the tests: error <= 2 * error(plain, same dtype and settings) + rounding floor, both
against float64, the maximum over the whole output. A batch consists of a few samples in random
order, so that the float64 side is small and samples mixed up still show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.inference.candidates import Conv, pooled
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.layout import accumulate_dtype

DISTINCT = 4  # samples that differ
ROWS = 8  # samples compared at once, in float64


class Trial:
    """Inputs of one conv at one shape, what float64 gives for them, and what the plain conv errs.

    x, residual: random normal, of weight's dtype, in the memory format given; residual is None
    where the spec has none. They take as much memory as the conv in its network.
    """

    def __init__(
        self,
        spec: ConvSpec,
        weight: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        memory_format: torch.memory_format,
        plain: Conv,
    ) -> None:
        generator = torch.Generator(weight.device).manual_seed(0)
        n = shape[0]
        distinct = min(n, DISTINCT)
        picked = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(0))
        picked[:distinct] = torch.arange(distinct)
        self._picked = picked.to(weight.device)

        def normal(size: Sequence[int]) -> Tensor:
            made = torch.randn(size, generator=generator, device=weight.device)
            return made.to(weight.dtype)

        x = normal((distinct, *shape[1:]))
        exact = _exact(spec, weight, bias, x)
        other = normal(exact.shape) if spec.residual else None
        self._oracle = _finished(spec, exact, other)
        self.x = x[self._picked].contiguous(memory_format=memory_format)
        self.residual = (
            None if other is None else other[self._picked].contiguous(memory_format=memory_format)
        )
        y = self._run(plain)
        self._finite = y.isfinite()
        out, acc = torch.finfo(y.dtype), torch.finfo(accumulate_dtype(y.dtype))
        error, peak = self._error(y), self._peak()
        self.allowed = 2 * error + out.eps * (peak + out.smallest_normal) + acc.eps * peak

    def call(self, conv: Conv) -> Conv:
        """The conv as a function of nothing, on these inputs."""
        inputs = (self.x,) if self.residual is None else (self.x, self.residual)
        return lambda: conv(*inputs)

    def disagrees(self, conv: Conv) -> str:
        """How the conv's result is wrong; "" if it is not. What the conv raises is raised."""
        # Memory as it may come: an engine that reads its output, if only times 0, spreads the NaN.
        poison = torch.full_like(self._finite, float("nan"), dtype=self.x.dtype)
        del poison
        y = self._run(conv)
        if y.shape != self._finite.shape or y.dtype != self.x.dtype:
            wanted = f"{tuple(self._finite.shape)} {self.x.dtype}"
            return f"gave {tuple(y.shape)} {y.dtype} for {wanted}"
        if not torch.equal(y.isfinite(), self._finite):
            return "gave NaN or infinity elsewhere than F.conv2d"
        error = self._error(y)
        if error <= self.allowed:
            return ""
        return f"differs from float64 by {error:.2g}; {self.allowed:.2g} is allowed"

    def _run(self, conv: Conv) -> Tensor:
        if self.residual is None:
            return conv(self.x)
        return conv(self.x, self.residual.clone(memory_format=torch.preserve_format))

    def _error(self, y: Tensor) -> float:
        worst = torch.zeros((), dtype=torch.float64, device=y.device)
        for start in range(0, len(y), ROWS):
            rows = slice(start, start + ROWS)
            difference = (y[rows].double() - self._oracle[self._picked[rows]]).abs()
            # What overflows the dtype, or is no number, is compared by where it is.
            judged = torch.where(self._finite[rows], difference, 0.0)
            worst = torch.maximum(worst, judged.amax())
        return float(worst)

    def _peak(self) -> float:
        return float(torch.where(self._oracle.isfinite(), self._oracle.abs(), 0.0).amax())


def _exact(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rest = (spec.stride, spec.padding, spec.dilation, spec.groups)
    shift = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), shift, *rest)


def _finished(spec: ConvSpec, y: Tensor, residual: Tensor | None) -> Tensor:
    y = y if residual is None else y + residual.double()
    y = y.relu() if spec.relu else y
    return pooled(spec, lambda value: value)(y)
