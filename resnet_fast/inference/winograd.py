# SPDX-License-Identifier: BSD-3-Clause
"""Which 3x3 convs run by Winograd's minimal filtering, in which tiles, with packed weights."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast import _conv
from resnet_fast.inference import direct
from resnet_fast.inference.fold import MAX_SIZES, ConvSpec


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
    spec: ConvSpec,
    weight: Tensor,
    bias: Tensor | None,
    otherwise: Callable[[], Callable[..., Tensor]],
) -> Callable[..., Tensor]:
    """The function of (x) or (x, residual); otherwise: makes the one for sizes that do not suit."""
    packed = _Tiles(weight, spec, otherwise)
    known, look_up, relu = packed.known.get, packed.look_up, spec.relu
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    padding = spec.padding
    fresh = torch.ops.resnet_fast.conv_winograd.default
    onto = torch.ops.resnet_fast.conv_winograd_.default

    def conv(x: Tensor, residual: Tensor | None = None) -> Tensor:
        tile, w, other = known(x.shape) or look_up(x.shape)
        if other is not None:
            return other(x) if residual is None else other(x, residual)
        result: Tensor = fresh(x, w, bias, residual, padding, tile, relu)
        return result

    def conv_onto(x: Tensor, residual: Tensor) -> Tensor:
        tile, w, other = known(x.shape) or look_up(x.shape)
        if other is not None:
            return other(x, residual)
        onto(residual, x, w, bias, padding, tile, relu)
        return residual

    return conv_onto if spec.inplace else conv


class _Tiles:
    """For every input size that came: (tile, packed weights, None) or (0, None, conv otherwise)."""

    def __init__(
        self, weight: Tensor, spec: ConvSpec, otherwise: Callable[[], Callable[..., Tensor]]
    ) -> None:
        self.known: dict[torch.Size, tuple[int, Tensor | None, Callable[..., Tensor] | None]] = {}
        self._weight, self._padding, self._otherwise = weight, spec.padding, otherwise
        self._made: dict[int, tuple[int, Tensor | None, Callable[..., Tensor] | None]] = {}
        self._lock = threading.Lock()
        self._pack = torch.ops.resnet_fast.conv_winograd_pack.default

    def look_up(self, size: torch.Size) -> tuple[int, Tensor | None, Callable[..., Tensor] | None]:
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
