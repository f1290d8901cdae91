# SPDX-License-Identifier: BSD-3-Clause
"""The convolutions of training on the CPU by the kernels of a Way: see convolution.py."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast._conv_ways import COLUMNS, POINTWISE, Pair, Way

_ops = torch.ops.resnet_fast
_convolution_backward = torch.ops.aten.convolution_backward.default
COLUMN_BYTES = 4 << 20  # of gathered windows at once, so that they stay in the caches


def forward(x: Tensor, weight: Tensor, way: Way) -> Tensor:
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


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    way: Way,
    wanted: Sequence[bool],
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, of those that are wanted.

    onto: a gradient laid out as x that may be overwritten; that of x is added into it.
    """
    dtype = x.dtype
    if way.in_float32:
        grad, x = _cast(grad, torch.float32), _cast(x, torch.float32)
        weight = weight.float()
    dx = dw = None
    with _no_autocast():
        if wanted[0]:
            dx = _dgrad(grad, x, weight, way, None if way.in_float32 else onto)
        if wanted[1]:
            dw = _wgrad(grad, x, weight, way)
        rest = (wanted[0] and dx is None, wanted[1] and dw is None)
        if any(rest):
            plain = plain_backward(grad, x, weight, way, rest)
            dx, dw = plain[0] if rest[0] else dx, plain[1] if rest[1] else dw
    if dx is not None:
        dx = _cast(dx, dtype)
        if onto is not None and dx is not onto:
            dx = onto.add_(dx)
    return dx, None if dw is None else dw.to(dtype)


def plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, way: Way, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """backward() by PyTorch's operator, differentiable."""
    dx, dw, _ = _convolution_backward(
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
        [wanted[0], wanted[1], False],
    )
    return dx if wanted[0] else None, dw if wanted[1] else None


def _dgrad(grad: Tensor, x: Tensor, weight: Tensor, way: Way, onto: Tensor | None) -> Tensor | None:
    """The gradient of x, with onto added in that; None for PyTorch's own kernel."""
    if way.dgrad == POINTWISE:
        matrix = weight.flatten(1)
        if way.stride == (1, 1):
            if onto is None:
                return _product(grad, matrix)
            _rows(onto).addmm_(_rows(grad), matrix)
            return onto
        dx = _huge(torch.empty_like(x)).zero_() if onto is None else onto
        _strided(dx, way.stride).add_(_product(grad, matrix))
        return dx
    if way.dgrad:
        padding = (2 - way.padding[0], 2 - way.padding[1])
        return _winograd(grad, weight, padding, way.dgrad, True, onto)
    return None


def _wgrad(grad: Tensor, x: Tensor, weight: Tensor, way: Way) -> Tensor | None:
    """The gradient of weight; None for PyTorch's own kernel."""
    if way.wgrad == POINTWISE:
        dw = weight.new_empty(weight.shape)
        torch.mm(_rows(grad).t(), _rows(_strided(x, way.stride)), out=dw.flatten(1))
        return dw
    if way.wgrad == COLUMNS:
        return _wgrad_by_columns(grad, x, weight, way)
    if way.wgrad:
        return cast(Tensor, _ops.conv_winograd_weight(grad, x, way.padding, way.wgrad))
    return None


def _winograd(
    x: Tensor,
    weight: Tensor,
    padding: Pair,
    tile: int,
    transposed: bool,
    onto: Tensor | None = None,
) -> Tensor:
    """The convolution, or onto, into which it was added."""
    packed = _ops.conv_winograd_pack(weight, tile, transposed)
    bias = weight.new_zeros(weight.size(1 if transposed else 0))
    if onto is None:
        return cast(Tensor, _ops.conv_winograd(x, packed, bias, None, padding, tile, False))
    _ops.conv_winograd_(onto, x, packed, bias, True, padding, tile, False)
    return onto


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
