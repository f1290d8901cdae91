# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions one after the other as one raw operator: those of _conv.py, written into memory.

A call of an operator from Python costs more than a small convolution takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from resnet_fast._conv import conv_direct_, conv_stem_, conv_winograd_, out_sizes

SCHEMAS = (
    # steps: the numbers of a Step for each of the weights. memory: floats in which values lie.
    "conv_sequence(Tensor(a!) memory, Tensor(b!) x, Tensor(c!) y, Tensor[] weights,"
    " Tensor[] biases, int[] steps) -> ()",
)
# Kinds of steps (Winograd's are its tiles, 2 and 4), and where a value lies if not in memory. As in
# csrc/torch/cpu/conv_sequence.cpp.
DIRECT, STEM, POOLED_STEM = 0, 1, 3
IN_X, IN_Y = -1, -2
NUMBERS = 17  # of a Step


class Step(NamedTuple):
    """A convolution of conv_sequence. kind: DIRECT, a stem or, 2 or 4, the tile of Winograd's.

    source, target: where x and y lie in memory, in floats, or IN_X or IN_Y. sizes: of x, (N, C, H,
    W). geometry: kernel, stride, padding and dilation, a pair each. add: to the values of y.
    """

    kind: int
    source: int
    target: int
    sizes: Sequence[int]
    geometry: Sequence[Sequence[int]]
    add: bool
    relu: bool

    def numbers(self) -> list[int]:
        pairs = [number for pair in self.geometry for number in pair]
        where = (self.kind, self.source, self.target)
        return [*where, *self.sizes, *pairs, int(self.add), int(self.relu)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Step:
        kind, source, target, *rest = numbers
        pairs = [rest[i : i + 2] for i in range(4, 12, 2)]
        return cls(kind, source, target, rest[:4], pairs, bool(rest[12]), bool(rest[13]))

    def out_size(self) -> list[int]:
        """(H, W) of y."""
        size = out_sizes(self.sizes[2:], *self.geometry)
        return [(s - 1) // 2 + 1 for s in size] if self.kind == POOLED_STEM else size


def conv_sequence(
    memory: Tensor,
    x: Tensor,
    y: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    steps: list[int],
) -> None:
    def place(at: int, shape: Sequence[int]) -> Tensor:
        if at < 0:
            return x if at == IN_X else y
        n, c, h, w = shape
        return memory[at : at + n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)

    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        step = Step.of(steps[i * NUMBERS : (i + 1) * NUMBERS])
        kernel, stride, padding, dilation = map(list, step.geometry)
        source = place(step.source, step.sizes)
        target = place(step.target, (step.sizes[0], bias.numel(), *step.out_size()))
        if step.kind == DIRECT:
            rest = (kernel, stride, padding, dilation, step.relu)
            conv_direct_(target, source, weight, bias, step.add, *rest)
        elif step.kind in (STEM, POOLED_STEM):
            pool = step.kind == POOLED_STEM
            conv_stem_(target, source, weight, bias, kernel, stride, padding, step.relu, pool)
        else:
            conv_winograd_(target, source, weight, bias, step.add, padding, step.kind, step.relu)


def fake_sequence(memory: Tensor, *args: object) -> None:
    return None
