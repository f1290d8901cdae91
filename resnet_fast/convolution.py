# SPDX-License-Identifier: BSD-3-Clause
"""2-D convolution in training on the CPU: forward and both gradients, each by its fastest kernel.

PyTorch's own (oneDNN) is left where that is as good. Otherwise, in float32 and channels-last:
- 3x3 with stride 1: Winograd's minimal filtering (csrc/cpu/winograd.h), in all three;
- 1x1: matrix products, which need no other order of the weights; with a stride, of the pixels that
  it leaves;
- 3x3 with a stride: the weight's gradient as a product with the gathered windows.
And float16 and bfloat16 are calculated in float32 and rounded at the end where the processor has no
instructions for them: oneDNN would emulate them, several times slower than float32.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from resnet_fast import dispatch
from resnet_fast._autograd import differentiable_backward, straight
from resnet_fast._conv import choose_tile
from resnet_fast.layout import is_channels_last

_ops = torch.ops.resnet_fast
_convolution_backward = torch.ops.aten.convolution_backward.default
# Private: a PyTorch without it has one precision for both.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda *of: "none")
_HALF = (torch.float16, torch.bfloat16)
# Multiplications from which another kernel pays for its call.
FROM_MACS = {torch.float32: 1 << 24, torch.float16: 1 << 20, torch.bfloat16: 1 << 20}
# Values of x from which a module asks at all: on fewer the asking costs more than it brings.
FROM_NUMEL = 1 << 14
# What packing a weight for one use costs, in multiplications by it: see choose_tile.
PACK = 100
MAX_WAYS = 1024

# The kernels; 2 and 4 are Winograd's tiles.
PLAIN, POINTWISE, COLUMNS = 0, 1, 9
_MATRICES = (POINTWISE, COLUMNS)
COLUMN_BYTES = 4 << 20  # of gathered windows at once, so that they stay in the caches


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


def conv2d(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """F.conv2d(x, weight, None, ...), differentiable to any order.

    x: (N, C_in, H, W). weight: (C_out, C_in / groups, kH, kW). Returns (N, C_out, H_out, W_out) in
    the layout that F.conv2d gives, 16 bits calculated in float32 in that of float32. Under autocast
    in its dtype. Raises what F.conv2d does.
    """
    way = None
    if dispatch.at_once(x, None, (weight,)) and x.dim() == 4 and weight.dim() == 4:
        autocast = _autocast_dtype(x)
        way = _way(x, weight, autocast, stride, padding, dilation, groups)
    if way is None or (way.wgrad in _MATRICES and _rounds_matrices()):
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    dtype = autocast or x.dtype
    if x.dtype is not dtype:
        x = x.to(dtype)
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    dispatch.took("conv2d")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return cast(Tensor, _conv2d_straight(x, weight, way))
    return _forward(x, weight, way)


# ---- the choice ----------------------------------------------------------------------------------
_ways: dict[tuple[Any, ...], Way | None] = {}
_lock = threading.Lock()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x and the weight to; None if it leaves them."""
    if not torch.is_autocast_enabled("cpu") or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype("cpu")


def _rounds_matrices() -> bool:
    """Whether set_float32_matmul_precision lets matrix products round to fewer bits.

    It says nothing of convolutions, so a product may not stand for one then.
    """
    return _fp32_precision("mkldnn", "matmul") in ("bf16", "tf32")


def _way(x: Tensor, weight: Tensor, autocast: torch.dtype | None, *arguments: Any) -> Way | None:
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


# ---- the kernels ---------------------------------------------------------------------------------
def _forward(x: Tensor, weight: Tensor, way: Way) -> Tensor:
    dtype = x.dtype
    if way.in_float32:
        x, weight = _cast(x, torch.float32), weight.float()
    with _no_autocast():
        if way.forward == POINTWISE:
            y = _product(_strided(x, way.stride), weight.flatten(1).t())
        elif way.forward:
            y = _winograd(x, weight, way.padding, way.forward, False)
        else:
            y = F.conv2d(x, weight, None, *way.arguments)
    return _cast(y, dtype)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, way: Way, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, of those that are wanted."""
    dtype = x.dtype
    if way.in_float32:
        grad, x = _cast(grad, torch.float32), _cast(x, torch.float32)
        weight = weight.float()
    dx = dw = None
    with _no_autocast():
        if wanted[0] and way.dgrad == POINTWISE:
            dx = _product(grad, weight.flatten(1))
            if way.stride != (1, 1):
                dx, kept = _huge(torch.empty_like(x)).zero_(), dx
                _strided(dx, way.stride).copy_(kept)
        elif wanted[0] and way.dgrad:
            padding = (2 - way.padding[0], 2 - way.padding[1])
            dx = _winograd(grad, weight, padding, way.dgrad, True)
        if wanted[1] and way.wgrad == POINTWISE:
            dw = weight.new_empty(weight.shape)
            torch.mm(_rows(grad).t(), _rows(_strided(x, way.stride)), out=dw.flatten(1))
        elif wanted[1] and way.wgrad == COLUMNS:
            dw = _wgrad_by_columns(grad, x, weight, way)
        elif wanted[1] and way.wgrad:
            dw = _ops.conv_winograd_weight(grad, x, way.padding, way.wgrad)
        rest = [wanted[0] and dx is None, wanted[1] and dw is None, False]
        if any(rest):
            plain = _plain_backward(grad, x, weight, way, rest)
            dx, dw = plain[0] if rest[0] else dx, plain[1] if rest[1] else dw
    return None if dx is None else _cast(dx, dtype), None if dw is None else dw.to(dtype)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, way: Way, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _convolution_backward(
        grad,
        x,
        weight,
        None,
        way.stride,
        way.padding,
        way.dilation,
        False,
        (0, 0),
        way.groups,
        wanted,
    )
    return result


def _winograd(x: Tensor, weight: Tensor, padding: Pair, tile: int, transposed: bool) -> Tensor:
    packed = _ops.conv_winograd_pack(weight, tile, transposed)
    bias = weight.new_zeros(weight.size(1 if transposed else 0))
    y: Tensor = _ops.conv_winograd(x, packed, bias, None, padding, tile, False)
    return y


def _wgrad_by_columns(grad: Tensor, x: Tensor, weight: Tensor, way: Way) -> Tensor:
    """The weight's gradient: the outputs' gradient times the windows that made each of them."""
    c_out, c_in, kh, kw = weight.shape
    _, _, height, width = grad.shape
    dw = torch.empty_like(weight, memory_format=torch.channels_last).zero_()
    taps = dw.permute(0, 2, 3, 1).view(c_out, -1)
    pictures = max(1, COLUMN_BYTES // (height * width * kh * kw * c_in * x.element_size()))
    for first in range(0, x.size(0), pictures):
        part = x[first : first + pictures].permute(0, 2, 3, 1)
        part = F.pad(part, (0, 0, way.padding[1], way.padding[1], way.padding[0], way.padding[0]))
        n, line, pixel, _ = part.stride()
        windows = part.as_strided(
            (part.size(0), height, width, kh, kw * c_in),
            (n, way.stride[0] * line, way.stride[1] * pixel, line, 1),
        )
        columns = windows.reshape(-1, kh * kw * c_in)
        taps.addmm_(_rows(grad[first : first + pictures]).t(), columns)
    return dw


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), written to a tensor whose pages cost little."""
    return x if x.dtype is dtype else _huge(torch.empty_like(x, dtype=dtype)).copy_(x)


def _huge(fresh: Tensor) -> Tensor:
    """fresh, which is dense and holds nothing yet, on huge pages if it is large."""
    _ops.huge_pages.default(fresh)
    return fresh


def _strided(x: Tensor, stride: Pair) -> Tensor:
    """The pixels that a 1x1 convolution with that stride sees, a view."""
    return x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N H W, C), a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Every pixel of x (N, C, H, W) times matrix (C, D): (N, D, H, W) in channels-last order.

    Written into what is no view: autograd would let nobody change a view in place.
    """
    size = (x.size(0), matrix.size(1), *x.shape[2:])
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.mm(_rows(x), matrix, out=_rows(_huge(y)))
    return y


@contextmanager
def _no_autocast() -> Generator[None, None, None]:
    """Autocast would take the float32 of our choice for the user's."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            yield
    else:
        yield


def _batched(grad: Tensor) -> bool:
    """True for many gradients as one (is_grads_batched): PyTorch's operators alone take these."""
    return is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> Tensor:
        ctx.way = way
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], False]
        if differentiable_backward() or _batched(grad):
            dx, dw, _ = _plain_backward(grad, x, weight, ctx.way, wanted)
            return dx if wanted[0] else None, dw if wanted[1] else None, None
        return *_backward(grad, x, weight, ctx.way, wanted), None


_conv2d_straight = straight(_Conv2d)
