# SPDX-License-Identifier: BSD-3-Clause
"""Which 3x3 convs run by Winograd's minimal filtering, in which tiles, with packed weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fast import _conv
from resnet_fast.inference import direct
from resnet_fast.inference.fold import MAX_SIZES, ConvSpec, Part, Writes


def suits(spec: ConvSpec, weight: Tensor) -> bool:
    """Whether conv_winograd computes this conv: 3x3, stride 1, C_in in sixteens as well."""
    return (
        direct.suits(spec, weight)
        and list(spec.dilation) == [1, 1]
        and tuple(weight.shape[2:]) == (3, 3)
        and list(spec.stride) == [1, 1]
        and weight.shape[1] % 16 == 0
    )


def make_conv(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, otherwise: Callable[[], Writes]
) -> Writes:
    """The conv, for inputs of any size; otherwise: makes the one for sizes that do not suit."""
    tiles = _Tiles(weight, spec, otherwise)
    known, look_up, relu = tiles.known.get, tiles.look_up, spec.relu
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    padding = spec.padding
    new = torch.ops.resnet_fast.conv_winograd.default
    write = torch.ops.resnet_fast.conv_winograd_.default

    def conv(x: Tensor, residual: Tensor | None, into: Tensor | None) -> Tensor:
        tile, w, other = known(x.shape) or look_up(x.shape)
        if other is not None:
            return other.function(x, residual, into)
        if into is None:
            result: Tensor = new(x, w, bias, residual, padding, tile, relu)
            return result
        write(into, x, w, bias, residual is not None, padding, tile, relu)
        return into

    def part(size: Sequence[int]) -> Part:
        tile, w, other = look_up(torch.Size(size))
        if w is None:
            assert other is not None
            return other.part(size)
        return Part(tile, w, bias, ([3, 3], spec.stride, padding, spec.dilation), relu)

    return Writes(conv, part)


# (tile, packed weights, None) or (0, None, the other conv).
Choice = tuple[int, Tensor | None, Writes | None]


class _Tiles:
    """The choice for every input size that came."""

    def __init__(self, weight: Tensor, spec: ConvSpec, otherwise: Callable[[], Writes]) -> None:
        self.known: dict[torch.Size, Choice] = {}
        self._weight, self._padding, self._otherwise = weight, spec.padding, otherwise
        self._made: dict[int, Choice] = {}
        self._lock = threading.Lock()
        self._pack = torch.ops.resnet_fast.conv_winograd_pack.default

    def look_up(self, size: torch.Size) -> Choice:
        with self._lock:
            tile = _conv.choose_tile(size, self._padding)
            if tile not in self._made:
                self._made[tile] = (
                    (tile, self._pack(self._weight, tile, False), None)
                    if tile
                    else (0, None, self._otherwise())
                )
            if len(self.known) >= MAX_SIZES:
                self.known.clear()
            self.known[size] = self._made[tile]
            return self._made[tile]
