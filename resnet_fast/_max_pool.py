# SPDX-License-Identifier: BSD-3-Clause
"""Max-pooling on the CPU, keeping less for its backward than PyTorch.

PyTorch saves the input, of which its backward only looks at the shape, and 64-bit indices. In a
ResNet's stem the input is the largest activation of all and nothing else keeps it. So here:
- a stem's pooling (3x3, stride 2, padding 1), channels-last: raw operators of our own, which keep
  one byte for each output, its place in the window;
- any other: PyTorch's kernels, with the shape and 32-bit indices kept.
The outputs are PyTorch's, bit for bit, and so are float32's gradients; in 16 bits the up to four
gradients of a pixel are added in float32 and rounded once, where PyTorch rounds every sum.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fast import dispatch
from resnet_fast.layout import accumulate_dtype, as_rows, is_channels_last, new_rows, to_layout

SCHEMAS = (
    # Of windows of 3x3, stride 2, padding 1; channels-last whatever x is. place: uint8 of y's
    # shape, 3 * line + column in the window of the pixel that y is; empty if not wanted.
    "max_pool_forward(Tensor x, bool save_place) -> (Tensor y, Tensor place)",
    # height, width: x's.
    "max_pool_backward(Tensor grad, Tensor place, int height, int width) -> Tensor",
)
_aten = torch.ops.aten
_ops = torch.ops.resnet_fast
_STEM = [[3, 3], [2, 2], [1, 1], [1, 1]]
# Elements below which the memory saved is not worth the calls.
_SMALL = 1 << 17


# ---- the module ----------------------------------------------------------------------------------
def max_pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """What a plain nn.MaxPool2d (without return_indices) does on x, (N, C, H, W)."""
    if (
        x.dim() != 4
        or x.size(2) * x.size(3) > 2**31 - 1
        or torch.compiler.is_compiling()
        or x.numel() < _SMALL
        or dispatch.choose("max_pool2d", x, None) == "reference"
    ):
        return cast(Tensor, pool(x))
    settings = [
        [v, v] if isinstance(v, int) else list(v)
        for v in (pool.kernel_size, pool.stride or pool.kernel_size, pool.padding, pool.dilation)
    ]
    of_stem = settings == _STEM and not pool.ceil_mode and x.is_cpu and is_channels_last(x)
    if torch.is_grad_enabled() and x.requires_grad:
        if of_stem:
            return cast(Tensor, _StemPool.apply(x))
        return cast(Tensor, _MaxPool.apply(x, settings, pool.ceil_mode))
    return cast(Tensor, _ops.max_pool_forward(x, False)[0] if of_stem else pool(x))


class _StemPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, place = _ops.max_pool_forward(x, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(place)
        ctx.size = x.shape[2:]
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        (place,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a graph of differentiable operators
            return _scatter(grad, _indices(place, ctx.size), ctx.size)
        return cast(Tensor, _ops.max_pool_backward(grad, place, *ctx.size))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: list[list[int]], ceil_mode: bool) -> Tensor:
        y, indices = _aten.max_pool2d_with_indices(x, *settings, ceil_mode)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices.to(torch.int32))
        ctx.settings, ctx.ceil_mode = settings, ceil_mode
        ctx.shape, ctx.channels_last = x.shape, is_channels_last(x)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        indices = ctx.saved_tensors[0].long()
        if torch.is_grad_enabled():  # create_graph=True: a graph of differentiable operators
            return _scatter(grad, indices, ctx.shape[2:]), None, None
        order = torch.channels_last if ctx.channels_last else torch.contiguous_format
        # Never written: it only says shape and layout.
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        grad = to_layout(grad, ctx.channels_last)
        dx = _aten.max_pool2d_with_indices_backward(
            grad, like, *ctx.settings, ctx.ceil_mode, indices
        )
        return dx, None, None


def _scatter(grad: Tensor, indices: Tensor, size: Any) -> Tensor:
    """The gradient of pictures of that size, added up pixel by pixel."""
    planes = grad.new_zeros((*grad.shape[:2], size[0] * size[1]))
    summed = planes.scatter_add(2, indices.flatten(2), grad.flatten(2))
    return cast(Tensor, summed.unflatten(2, tuple(size)))


# ---- the raw operators in plain PyTorch ----------------------------------------------------------
def _corners(place: Tensor) -> tuple[Tensor, Tensor]:
    """Line and column of each window's first pixel, of shapes (H_out, 1) and (W_out,)."""
    line, column = (torch.arange(s, device=place.device) * 2 - 1 for s in place.shape[2:])
    return line[:, None], column


def _indices(place: Tensor, size: Any) -> Tensor:
    """PyTorch's indices of these places, in pictures of that size."""
    line, column = _corners(place)
    wide = place.long()
    return cast(Tensor, (line + wide // 3) * size[1] + column + wide % 3)


def max_pool_forward(x: Tensor, save_place: bool) -> tuple[Tensor, Tensor]:
    _check_pictures("x", x)
    y, indices = _aten.max_pool2d_with_indices(x, *_STEM)
    if not save_place:
        return as_rows(y), x.new_empty(0, dtype=torch.uint8)
    line, column = _corners(y)
    place = (indices // x.size(3) - line) * 3 + indices % x.size(3) - column
    return as_rows(y), as_rows(place.to(torch.uint8))


def max_pool_backward(grad: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    _check_backward(grad, place, height, width)
    wide = grad.to(accumulate_dtype(grad.dtype))
    dx = _scatter(wide, _indices(place, (height, width)), (height, width))
    return as_rows(dx.to(grad.dtype))


def _check_pictures(name: str, t: Tensor) -> None:
    torch._check(
        t.dim() == 4, lambda: f"{name} must have 4 dimensions (N, C, H, W); got {tuple(t.shape)}"
    )


def _check_backward(grad: Tensor, place: Tensor, height: int, width: int) -> None:
    _check_pictures("grad", grad)
    torch._check(
        place.shape == grad.shape and place.dtype == torch.uint8,
        lambda: (
            f"place must be uint8 of grad's shape {tuple(grad.shape)}; got {place.dtype},"
            f" {tuple(place.shape)}"
        ),
    )
    pooled = tuple(_pooled(size) for size in (height, width))
    torch._check(
        pooled == tuple(grad.shape[2:]),
        lambda: (
            f"height and width must be those of the pictures that were pooled to"
            f" {tuple(grad.shape)}; got {height} and {width}"
        ),
    )


def _pooled(size: int) -> int:
    return (size - 1) // 2 + 1


# ---- fakes ---------------------------------------------------------------------------------------
def fake_forward(x: Tensor, save_place: bool) -> tuple[Tensor, Tensor]:
    _check_pictures("x", x)
    size = [_pooled(s) for s in x.shape[2:]]
    place = (
        new_rows(x, x.size(1), size, torch.uint8)
        if save_place
        else x.new_empty(0, dtype=torch.uint8)
    )
    return new_rows(x, x.size(1), size, x.dtype), place


def fake_backward(grad: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    _check_backward(grad, place, height, width)
    return new_rows(grad, grad.size(1), (height, width), grad.dtype)
