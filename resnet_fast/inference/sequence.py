# SPDX-License-Identifier: BSD-3-Clause
"""Convs of ours one after the other as one call of conv_sequence, for inputs of one size.

Calling an operator from Python costs more than a small conv takes. What a sequence computes lies in
kept memory (see memory.py), but for its last value where that is to lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from resnet_fast._conv_sequence import IN_X, IN_Y, Step
from resnet_fast.inference.batches import Segment, sizes_of
from resnet_fast.inference.fold import Writes
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.memory import Place

Function = Callable[[list[Any], Sequence[Tensor | None]], list[Any]]


def is_plain(segment: Segment, convs: Mapping[fx.Node, Writes]) -> bool:
    """Whether a segment is nothing but convs that a sequence can hold."""
    return len(segment.takes) == 1 and all(
        node.target is fused_conv
        and node in convs
        and (node.args[1] is None or node.args[2].inplace)  # type: ignore[union-attr]
        for node in segment.nodes
    )


@dataclass
class Recipe:
    """A sequence but for its memory.

    result: where its value lies, an offset in memory, IN_X or IN_Y. slot: the conv whose place in
    the room is y; None where y is a new tensor.
    """

    steps: list[Step] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    result: int = IN_X
    shape: tuple[int, ...] = ()
    slot: int | None = None


def recipe(
    segments: Sequence[Segment],
    convs: Mapping[fx.Node, Writes],
    places: Mapping[int, int],
    last: int | None,
    sizes: Mapping[Any, int],
) -> Recipe | None:
    """Plain segments as a sequence; None where a value has no place.

    places: offsets in memory by the numbers of the convs. last: as in memory.Layout.
    """
    numbers = {node: number for number, node in enumerate(convs)}
    where: dict[fx.Node, int] = {segments[0].takes[0]: IN_X}
    found = Recipe(slot=last)
    end = segments[-1].nodes[-1]
    for node in (node for segment in segments for node in segment.nodes):
        x, residual = node.args[:2]
        assert isinstance(x, fx.Node)
        number = numbers[node]
        if isinstance(residual, fx.Node):
            target = where[residual]
        elif number in places:
            target = places[number]
        elif number == last or (node is end and last is None):
            target = IN_Y
        else:
            return None
        size = sizes_of(x, sizes)
        assert size is not None
        part = convs[node].part(size)
        add = residual is not None
        found.steps.append(Step(part.kind, where[x], target, size, part.geometry, add, part.relu))
        found.weights.append(part.weight)
        found.biases.append(part.bias)
        where[node] = target
    shape = sizes_of(end, sizes)
    assert shape is not None
    found.result, found.shape = where[end], shape
    return found


def compile_recipe(found: Recipe, memory: Tensor) -> Function:
    """The sequence as a function of a segment's kind."""
    run = torch.ops.resnet_fast.conv_sequence.default
    steps = [number for step in found.steps for number in step.numbers()]
    weights, biases, slot = found.weights, found.biases, found.slot
    n, c, h, w = found.shape
    inside = Place(found.result, found.shape).view(memory) if found.result >= 0 else None
    uses_y = any(step.target == IN_Y for step in found.steps)

    def sequence(values: list[Any], room: Sequence[Tensor | None]) -> list[Any]:
        x = values.pop()
        if not x.is_contiguous(memory_format=torch.channels_last):  # rows left out, say
            x = x.contiguous(memory_format=torch.channels_last)
        y = x
        if uses_y:
            y = None if slot is None else room[slot]
            y = memory.new_empty((n, h, w, c)).permute(0, 3, 1, 2) if y is None else y
        run(memory, x, y, weights, biases, steps)
        if inside is not None:
            return [inside]
        return [x if found.result == IN_X else y]

    return sequence
