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

from torch import Tensor, fx

from resnet_fast.inference.batches import Segment, sizes_of
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
        _, c, h, w = self.shape
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
    offsets, floats = _pack({root: aligned(shape_of(root, sizes)) for root in inside}, inside)
    places = {numbers[root]: Place(at, shape_of(root, sizes)) for root, at in offsets.items()}
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
        if node in roots and not all(map(keeps_nothing, node.users)):
            refused.add(roots[node])
    return {node: root for node, root in roots.items() if root not in refused}


def keeps_nothing(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target is not hook_call and fresh(user)


def is_private(value: fx.Node) -> bool:
    """Whether nobody else can hold a value's memory, in which sums may come to lie in place."""
    while all(map(keeps_nothing, value.users)):
        sums = [user for user in value.users if _adds_onto(user, value)]
        if not sums:
            return True
        (value,) = sums
    return False


def _adds_onto(user: fx.Node, value: fx.Node) -> bool:
    if user.target is not fused_conv or user.args[1] is not value:
        return False
    return bool(user.args[2].inplace)  # type: ignore[union-attr]


def shape_of(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    """Of a node that is a tensor."""
    shape = sizes_of(node, sizes)
    assert shape is not None
    return shape


def aligned(shape: Sequence[int]) -> int:
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
