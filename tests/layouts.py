# SPDX-License-Identifier: BSD-3-Clause
"""Tensors in any memory layout, and the rule for the layout of an op's output."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "channel_slice", "expanded", "permuted")


def lay(values: Tensor, layout: str) -> Tensor:
    """`values` (contiguous) with the strides of `layout`; "expanded" repeats the first sample.

    "sliced" skips every second element of the last dimension and starts at an offset,
    "channel_slice" is the middle of a channels-last tensor with more channels, "permuted" lies in
    memory with its dimensions reversed.
    """
    if layout == "channels_last":
        return channels_last(values)
    if layout == "expanded" and values.size(0) > 0:
        return values[:1].clone().expand(values.shape)
    if layout == "permuted":
        backwards = list(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout in ("sliced", "channel_slice"):
        n, c, *rest = values.shape
        if layout == "sliced" and rest:
            view = values.new_empty(n + 1, c, *rest[:-1], 2 * rest[-1])[1:, ..., ::2]
        elif layout == "sliced":
            view = values.new_empty(n + 1, 2 * c)[1:, ::2]
        else:
            view = values.new_empty(n, *rest, c + 3).movedim(-1, 1)[:, 2 : 2 + c]
        return view.copy_(values)
    return values.clone(memory_format=torch.contiguous_format)


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def is_channels_last(t: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()])


def assert_layout(y: Tensor, x: Tensor) -> None:
    """The layout rule of outputs: channels-last where x is dense so, else contiguous."""
    if is_channels_last(x) and not x.is_contiguous():
        assert is_channels_last(y), f"channels-last x gave strides {y.stride()}"
    else:
        assert y.is_contiguous(), f"x of strides {x.stride()} gave strides {y.stride()}"
