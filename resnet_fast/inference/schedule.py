# SPDX-License-Identifier: BSD-3-Clause
"""How the batches of one size run: in which pieces, as which calls, and where their values lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from resnet_fast.inference.batches import Level, Segment, split
from resnet_fast.inference.fold import MAX_SIZES, Writes
from resnet_fast.inference.memory import (
    Layout,
    Place,
    aligned,
    is_private,
    layout,
    shape_of,
)
from resnet_fast.inference.sequence import Function, Recipe, compile_recipe, is_plain, recipe


class Schedule:
    """Levels and, for each level and size of its pieces, a layout and the calls that it is.

    In front of a Block lies what each level but the last gives, whole pieces of the level after it;
    behind that what the levels hold meanwhile, all in the same place. segments: all of the
    program's. convs: those that write where they are told. sizes: of the trace's symbols. batch:
    the symbol of the batch, None where it runs in one piece; samples: how large it is.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        segments: Sequence[Segment],
        convs: Mapping[fx.Node, Writes],
        sizes: Mapping[Any, int],
        batch: Any,
        samples: int,
    ) -> None:
        self.levels = list(levels)
        self.convs = len(convs)
        self.layouts: dict[tuple[int, int], Layout] = {}
        self.boundaries: list[Place | None] = [None] * len(self.levels)
        numbers = {node: number for number, node in enumerate(convs)}

        def of_size(size: int) -> Mapping[Any, int]:
            return sizes if batch is None else {**sizes, batch: size}

        front, most, above = 0, 0, {samples}
        for at, level in reversed([*enumerate(levels)]):
            inside = segments[level.first : level.last]
            if at + 1 < len(levels):
                place = _boundary(inside[-1], of_size(max(above)), front)
                if place is not None:
                    self.boundaries[at] = place
                    front += aligned(place.shape)
            above = {size for n in above for size in split(n, level.piece)}
            for size in above:
                self.layouts[at, size] = layout(inside, numbers, of_size(size))
                most = max(most, self.layouts[at, size].floats)
        self.behind, self.floats = front, front + most
        self.calls = {
            (at, size): [*_calls(segments, levels[at], convs, found, front, of_size(size))]
            for (at, size), found in self.layouts.items()
        }


def _boundary(segment: Segment, sizes: Mapping[Any, int], offset: int) -> Place | None:
    """For what a segment gives to the next level, if nobody else can hold it."""
    value = segment.nodes[-1]
    tensor = value.meta.get("val")
    fits = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.dtype is torch.float32
    if not fits or not is_private(value):
        return None
    return Place(offset, shape_of(value, sizes))


def _calls(
    segments: Sequence[Segment],
    level: Level,
    convs: Mapping[fx.Node, Writes],
    found: Layout,
    behind: int,
    sizes: Mapping[Any, int],
) -> Iterator[Recipe | int]:
    """A level as sequences and, by their numbers, other segments."""
    places = {number: behind + place.offset for number, place in found.places.items()}
    numbers = {node: number for number, node in enumerate(convs)}
    inside = range(level.first, level.last)
    for plain, group in itertools.groupby(inside, lambda at: is_plain(segments[at], convs)):
        run = list(group)
        whole = [segments[at] for at in run]
        here = {numbers[node] for segment in whole for node in segment.nodes} if plain else set()
        last = found.last if found.last in here else None
        made = recipe(whole, convs, places, last, sizes) if plain else None
        if made is None:
            yield from run
        else:
            yield made


class Rooms:
    """A Schedule in a piece of memory: its calls, and the memory that they write to."""

    def __init__(self, schedule: Schedule, memory: Tensor, functions: Sequence[Function]) -> None:
        self._schedule, self._memory = schedule, memory
        self._boundaries = [None if b is None else b.view(memory) for b in schedule.boundaries]
        self._rooms = {key: self._room(found) for key, found in schedule.layouts.items()}
        self._calls = {
            key: [functions[c] if isinstance(c, int) else compile_recipe(c, memory) for c in calls]
            for key, calls in schedule.calls.items()
        }

    def _room(self, found: Layout) -> list[Tensor | None]:
        room: list[Tensor | None] = [None] * self._schedule.convs
        for number, place in found.places.items():
            room[number] = place.view(self._memory, self._schedule.behind)
        return room

    def through(self, level: int, size: int, values: list[Any], slot: Tensor | None) -> list[Any]:
        """What a level makes of the values of a piece; slot: memory for it, where it fits."""
        key = level, size
        room, last = self._rooms[key], self._schedule.layouts[key].last
        if last is not None:
            room[last] = slot
        for call in self._calls[key]:
            values = call(values, room)
        return values

    def boundary(self, level: int, size: int) -> Tensor | None:
        """Memory for what a level gives for so many samples."""
        whole = self._boundaries[level]
        return None if whole is None else whole.narrow(0, 0, size)


class Block:
    """The memory of one call at a time, as large as the largest of the schedules that it ran."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._rooms: dict[Schedule, Rooms] = {}

    @property
    def bytes(self) -> int:
        return self._memory.nbytes

    def rooms(self, schedule: Schedule, functions: Sequence[Function]) -> Rooms:
        """functions: of all segments."""
        found = self._rooms.get(schedule)
        if found is None:
            if self._memory.numel() < schedule.floats or len(self._rooms) >= MAX_SIZES:
                self._rooms.clear()
            if self._memory.numel() < schedule.floats:
                self._memory = new_memory(schedule.floats)
            found = self._rooms[schedule] = Rooms(schedule, self._memory, functions)
        return found


def new_memory(floats: int) -> Tensor:
    """Float32, on huge pages if it is large."""
    with torch.inference_mode(False):  # tensors made in that mode are not written to outside it
        memory = torch.empty(floats, dtype=torch.float32)
        torch.ops.resnet_fast.huge_pages(memory)
    return memory
