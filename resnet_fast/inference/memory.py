# SPDX-License-Identifier: BSD-3-Clause
"""One piece of memory for the values of a call, kept for the next: nothing is allocated in between.

A value lies in it where a conv of ours computes it, which writes where it is told, and where nobody
else can hold it: every reader is an operator whose result is memory of its own. What a conv adds to
a residual in place lies where the residual does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resnet_fast.inference.batches import Level, Segment, sizes_of, split
from resnet_fast.inference.fold import MAX_SIZES
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.hooks import hook_call
from resnet_fast.inference.trace import fresh

ALIGNMENT = 1024  # floats: a page, so that a value's rows share none with another's


@dataclass(frozen=True)
class Place:
    """Where a value lies: floats from the beginning, and its shape (N, C, H, W), channels-last."""

    offset: int
    shape: tuple[int, ...]

    def view(self, memory: Tensor, behind: int = 0) -> Tensor:
        """The value as a tensor; behind: floats that are to be left out in front."""
        n, c, h, w = self.shape
        return memory.as_strided(self.shape, (h * w * c, 1, w * c, c), behind + self.offset)


@dataclass
class Layout:
    """Places of the values of some segments. floats: what they take in all.

    places: by the number of the conv that computes a value. last: the conv into whose memory the
    value falls that the segments give; None where that is not one conv's own.
    """

    places: dict[int, Place]
    last: int | None
    floats: int


def layout(
    segments: Sequence[Segment], numbers: Mapping[fx.Node, int], sizes: Mapping[Any, int]
) -> Layout:
    """numbers: of the convs that write where they are told; sizes: of the trace's symbols."""
    nodes = [node for segment in segments for node in segment.nodes]
    order = {node: at for at, node in enumerate(nodes)}
    roots = _roots(nodes, numbers)
    end = nodes[-1]
    last = None if end.op == "output" else roots.get(end)
    lives: dict[fx.Node, tuple[int, int]] = {}
    for node, root in roots.items():
        until = max((order.get(user, len(nodes)) for user in node.users), default=order[node])
        first, before = lives.get(root, (order[node], 0))
        lives[root] = first, max(before, until)
    inside = {root: life for root, life in lives.items() if root is not last}
    offsets, floats = _pack({root: _aligned(_shape(root, sizes)) for root in inside}, inside)
    places = {numbers[root]: Place(at, _shape(root, sizes)) for root, at in offsets.items()}
    return Layout(places, None if last is None else numbers[last], floats)


def _roots(nodes: Sequence[fx.Node], numbers: Mapping[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """For every value that may lie in kept memory, the value whose memory it is."""
    roots: dict[fx.Node, fx.Node] = {}
    refused = set()
    for node in nodes:
        if node.target is not fused_conv:
            continue
        residual, inplace = node.args[1], node.args[2].inplace  # type: ignore[union-attr]
        if inplace and residual in roots:
            roots[node] = roots[residual]  # type: ignore[index]
        elif node in numbers and residual is None:
            roots[node] = node
        if node in roots and not all(map(_keeps_nothing, node.users)):
            refused.add(roots[node])
    return {node: root for node, root in roots.items() if root not in refused}


def _keeps_nothing(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target is not hook_call and fresh(user)


def _shape(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    shape = sizes_of(node, sizes)
    assert shape is not None
    return shape


def _aligned(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def _pack(
    floats: Mapping[fx.Node, int], lives: Mapping[fx.Node, tuple[int, int]]
) -> tuple[dict[fx.Node, int], int]:
    """(offsets, floats in all): the largest value first, as low as those alive with it let it."""
    placed: dict[fx.Node, int] = {}
    total = 0
    for node in sorted(floats, key=lambda n: -floats[n]):
        first, last = lives[node]
        taken = sorted(
            (at, at + floats[other])
            for other, at in placed.items()
            if lives[other][0] <= last and first <= lives[other][1]
        )
        offset = 0
        for begin, end in taken:
            if offset + floats[node] <= begin:
                break
            offset = max(offset, end)
        placed[node] = offset
        total = max(total, offset + floats[node])
    return placed, total


class Plan:
    """How the batches of one size run: levels, and where their values lie in a Block.

    In front lies what each level but the last gives, whole pieces of the level after it; behind
    that what the levels' functions hold meanwhile, all in the same place. batch: see Program.
    """

    def __init__(
        self,
        found: Sequence[Level],
        segments: Sequence[Segment],
        numbers: Mapping[fx.Node, int],
        sizes: Mapping[Any, int],
        batch: Any,
    ) -> None:
        self.levels = list(found)
        self.layouts: dict[tuple[int, int], Layout] = {}
        self.boundaries: list[Place | None] = [None] * len(self.levels)
        front, behind, above = 0, 0, {found[-1].piece}
        for at, level in reversed([*enumerate(found)]):
            whole = segments[level.first : level.last]
            if at + 1 < len(found):
                self.boundaries[at] = place = _boundary(whole[-1], {**sizes, batch: max(above)})
                if place is not None:
                    self.boundaries[at] = Place(front, place.shape)
                    front += _aligned(place.shape)
            above = {size for n in above for size in split(n, level.piece)}
            for size in above:
                here = sizes if batch is None else {**sizes, batch: size}
                self.layouts[at, size] = layout(whole, numbers, here)
                behind = max(behind, self.layouts[at, size].floats)
        self.behind, self.floats = front, front + behind


def _boundary(segment: Segment, sizes: Mapping[Any, int]) -> Place | None:
    """For what a segment gives to the next level, if nobody else can hold it."""
    value = segment.nodes[-1]
    tensor = value.meta.get("val")
    fits = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.dtype is torch.float32
    return Place(0, _shape(value, sizes)) if fits and all(map(_keeps_nothing, value.users)) else None


class Rooms:
    """The values of a Plan as tensors in a piece of memory."""

    def __init__(self, plan: Plan, memory: Tensor, convs: int) -> None:
        self._plan, self._memory = plan, memory
        self._boundaries = [None if b is None else b.view(memory) for b in plan.boundaries]
        self._rooms = {key: self._room(found, convs) for key, found in plan.layouts.items()}

    def _room(self, found: Layout, convs: int) -> tuple[list[Tensor | None], int | None]:
        room: list[Tensor | None] = [None] * convs
        for number, place in found.places.items():
            room[number] = place.view(self._memory, self._plan.behind)
        return room, found.last

    def of(self, level: int, size: int) -> tuple[list[Tensor | None], int | None]:
        """(memory by the convs' numbers, the conv that computes what the level gives)."""
        return self._rooms[level, size]

    def boundary(self, level: int, size: int) -> Tensor | None:
        """Memory for what a level gives for so many samples."""
        whole = self._boundaries[level]
        return None if whole is None else whole.narrow(0, 0, size)


class Block:
    """The memory of one call at a time, as large as the largest of the plans that it ran."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._rooms: dict[Plan, Rooms] = {}

    def rooms(self, plan: Plan, convs: int) -> Rooms:
        found = self._rooms.get(plan)
        if found is None:
            if self._memory.numel() < plan.floats or len(self._rooms) >= MAX_SIZES:
                self._rooms.clear()
            if self._memory.numel() < plan.floats:
                self._memory = new_memory(plan.floats)
            found = self._rooms[plan] = Rooms(plan, self._memory, convs)
        return found


def new_memory(floats: int) -> Tensor:
    """Float32, on huge pages if it is large."""
    with torch.inference_mode(False):  # tensors made in that mode are not written to outside it
        memory = torch.empty(floats, dtype=torch.float32)
        torch.ops.resnet_fast.huge_pages(memory)
    return memory
