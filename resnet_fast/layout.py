# SPDX-License-Identifier: BSD-3-Clause
"""Memory layouts: the one rule for what layout an op's output has, used by kernels' fakes too.

An op works on dense tensors in one of two orders: contiguous (N, C, *) or channels-last
(N, *, C). An input that is neither is first copied to contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """True if x is dense in channels-last order and not also contiguous.

    Where both hold (C == 1, or one pixel), the memory order is the same and "contiguous" is said.
    """
    memory_format = _CHANNELS_LAST.get(x.dim())
    return (
        memory_format is not None
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=memory_format)
    )


def to_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x itself if it is dense in that order, else a copy that is."""
    if channels_last:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.contiguous()


def normalise(x: Tensor) -> tuple[Tensor, bool]:
    """x, copied to contiguous unless it is dense already, and whether it is channels-last."""
    if is_channels_last(x):
        return x, True
    return x.contiguous(), False


def new_like(x: Tensor) -> Tensor:
    """An uninitialised output of x's shape, in the layout of normalise(x)."""
    return torch.empty_like(x if is_channels_last(x) else x.contiguous())


def as_rows(y: Tensor) -> Tensor:
    """(N, C, H, W) with channels-last strides, also where a size of one leaves PyTorch the choice.

    y itself if it has them.
    """
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def new_rows(like: Tensor, channels: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, channels, *size) on like's device, with the strides of as_rows."""
    return like.new_empty(like.size(0), *size, channels, dtype=dtype).permute(0, 3, 1, 2)


def memory_order(x: Tensor, channels_last: bool) -> Tensor:
    """The elements of a dense x as a 1-D view in the order they lie in memory."""
    return (x.movedim(1, -1) if channels_last else x).reshape(-1)


def from_memory_order(flat: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The inverse of memory_order: a tensor of like's shape (not its dtype)."""
    if not channels_last:
        return flat.view(like.shape)
    return flat.view(like.movedim(1, -1).shape).movedim(-1, 1)


def mask_bytes(numel: int) -> int:
    """Size of the 1-bit mask of numel elements, in bytes: whole 16-bit words."""
    return 2 * ((numel + 15) // 16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
