# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels the convolutions of a shape run in training on the CPU: see convolution.py."""

from __future__ import annotations

import platform
import threading
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from resnet_fast._conv import choose_tile
from resnet_fast.layout import is_channels_last

# Private: a PyTorch without it has one precision for both.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda *of: "none")
_HALF = (torch.float16, torch.bfloat16)
# Multiplications from which another kernel pays for its call.
FROM_MACS = {torch.float32: 1 << 24, torch.float16: 1 << 20, torch.bfloat16: 1 << 20}
# What packing a weight for one use costs, in multiplications by it: see choose_tile.
PACK = 100
MAX_WAYS = 1024

# The kernels; 2 and 4 are Winograd's tiles.
PLAIN, POINTWISE, COLUMNS = 0, 1, 9
MATRICES = (POINTWISE, COLUMNS)

Pair = tuple[int, int]


class Way(NamedTuple):
    """How the convolutions of one shape run: a kernel for each of the three."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    forward: int
    dgrad: int
    wgrad: int
    in_float32: bool

    @property
    def arguments(self) -> tuple[Pair, Pair, Pair, int]:
        return self.stride, self.padding, self.dilation, self.groups


_ways: dict[tuple[Any, ...], Way | None] = {}
_lock = threading.Lock()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x and the weight to; None if it leaves them."""
    if not torch.is_autocast_enabled("cpu") or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype("cpu")


def rounds_matrices() -> bool:
    """Whether set_float32_matmul_precision lets matrix products round to fewer bits.

    It says nothing of convolutions, so a product may not stand for one then.
    """
    return _fp32_precision("mkldnn", "matmul") in ("bf16", "tf32")


def way_of(x: Tensor, weight: Tensor, autocast: torch.dtype | None, *arguments: Any) -> Way | None:
    """The way of a call; None for PyTorch's own. autocast: what that casts to, None without."""
    key = (x.shape, weight.shape, autocast, x.dtype, weight.dtype, is_channels_last(x), *arguments)
    try:
        return _ways[key]
    except KeyError:
        pass
    except TypeError:  # a list among the arguments
        return None
    with _lock:
        if len(_ways) >= MAX_WAYS:
            _ways.clear()
        way = _ways[key] = _choose(x, weight, autocast, *arguments)
    return way


def _choose(
    x: Tensor,
    weight: Tensor,
    autocast: torch.dtype | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Way | None:
    pairs = [_pair(v) for v in (stride, padding, dilation)]
    if None in pairs or type(groups) is not int or not _fits(x, weight, autocast, groups):
        return None
    stride, padding, dilation = cast("list[Pair]", pairs)
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        return None
    dtype = autocast or x.dtype
    c_out, per_group, *kernel = weight.shape
    size = [
        (x.size(d + 2) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]
    macs = x.size(0) * size[0] * size[1] * weight.numel()
    if min(size) < 1 or macs < FROM_MACS.get(dtype, macs + 1):
        return None
    in_float32 = dtype in _HALF and not has_instructions(dtype)
    ways = (PLAIN, PLAIN, PLAIN)
    simple = dilation == (1, 1) and groups == 1 and is_channels_last(x)
    if simple and (in_float32 or dtype is torch.float32):
        if kernel == [1, 1] and padding == (0, 0):
            ways = (POINTWISE, POINTWISE, POINTWISE)
        elif kernel == [3, 3] and stride != (1, 1):
            ways = (PLAIN, PLAIN, COLUMNS)
        elif kernel == [3, 3] and max(padding) <= 2 and c_out % 16 == per_group % 16 == 0:
            tile = choose_tile(x.shape, padding, PACK)
            back = choose_tile((x.size(0), c_out, *size), (2 - padding[0], 2 - padding[1]), PACK)
            ways = (tile, back, tile)
    if not in_float32 and not any(ways):
        return None
    return Way(stride, padding, dilation, groups, *ways, in_float32)


def _pair(value: Any) -> Pair | None:
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and all(type(v) is int for v in value):
        return value
    return None


def _fits(x: Tensor, weight: Tensor, autocast: torch.dtype | None, groups: int) -> bool:
    """Whether sizes and dtypes go together at all: if not, PyTorch says so in its words."""
    return (
        (x.dtype is weight.dtype or autocast is not None)
        and groups > 0
        and x.size(1) == weight.size(1) * groups
        and weight.size(0) % groups == 0
        and weight.numel() > 0
    )


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in that 16-bit dtype."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # PyTorch says nothing of other processors: its own is left
    if dtype is torch.bfloat16:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in probes)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is None or bool(supported())
