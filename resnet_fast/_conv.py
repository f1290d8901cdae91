# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions with bias, residual and ReLU as raw operators, their weights packed beforehand.

Float32, channels-last, for inference: no gradients. conv_winograd: 3x3 with stride 1 by Winograd's
minimal filtering (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
conv_direct: any kernel of one group, as a matrix product with gathered rows (Dukhan, "The Indirect
Convolution Algorithm", 2019). conv_stem: few input channels, with the max-pooling behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.layout import as_rows, new_rows

SCHEMAS = (
    # weight: what pack_winograd makes. bias: (C_out,), C_in and C_out multiples of 16. tile:
    # outputs a side of a tile, 2 or 4.
    "conv_winograd(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[2] padding,"
    " int tile, bool relu) -> Tensor",
    # The same into y, to whose values it is added if that is wanted; y shares no memory with x.
    "conv_winograd_(Tensor(a!) y, Tensor x, Tensor weight, Tensor bias, bool add, int[2] padding,"
    " int tile, bool relu) -> ()",
    # weight (C_out, C_in, 3, 3) as conv_winograd wants it; transposed: for the convolution that
    # gives the inputs' gradient, so that C_in must be a multiple of 16 and not C_out.
    "conv_winograd_pack(Tensor weight, int tile, bool transposed) -> Tensor",
    # The gradient (C_out, C_in, 3, 3) of the filter.
    "conv_winograd_weight(Tensor grad, Tensor x, int[2] padding, int tile) -> Tensor",
    # Advises the system to back a dense tensor, which nobody has written to yet, by huge pages.
    "huge_pages(Tensor fresh) -> ()",
    # weight: what pack makes. bias: (C_out,), C_out a multiple of 16.
    "conv_direct(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[2] kernel,"
    " int[2] stride, int[2] padding, int[2] dilation, bool relu) -> Tensor",
    # The same into y, to whose values it is added if that is wanted.
    "conv_direct_(Tensor(a!) y, Tensor x, Tensor weight, Tensor bias, bool add, int[2] kernel,"
    " int[2] stride, int[2] padding, int[2] dilation, bool relu) -> ()",
    # weight: what pack makes. max_pool: of 3x3, stride 2, padding 1.
    "conv_stem(Tensor x, Tensor weight, Tensor bias, int[2] kernel, int[2] stride, int[2] padding,"
    " bool relu, bool max_pool) -> Tensor",
    # The same into y.
    "conv_stem_(Tensor(a!) y, Tensor x, Tensor weight, Tensor bias, int[2] kernel, int[2] stride,"
    " int[2] padding, bool relu, bool max_pool) -> ()",
)
PANEL = 64  # output channels side by side in packed weights
# Where the polynomials are evaluated; infinity is the last point. See csrc/cpu/conv_winograd.cpp.
_POINTS = {2: (0, 1, -1), 4: (0, Fraction(3, 4), -Fraction(3, 4), Fraction(3, 2), -Fraction(3, 2))}


# What fetching a weight from memory costs, in multiplications by it.
FETCH = 22


def choose_tile(size: Sequence[int], padding: Sequence[int], fetch: int = FETCH) -> int:
    """Outputs a side of a tile, 4 or 2, for inputs (N, C, H, W); 0 where a direct conv is cheaper.

    Counted: multiplications, tiles that hang over the edge included, and what it costs to have the
    transformed weights, `fetch` multiplications by each: it keeps a conv of few pixels from them.
    Tiles of 4 must save a good part, as their weights take more than twice the memory.
    """
    n, height, width = size[0], size[2] + 2 * padding[0] - 2, size[3] + 2 * padding[1] - 2

    def cost(tile: int) -> int:
        tiles = n * -(-height // tile) * -(-width // tile)
        return (tile + 2) ** 2 * (tiles + fetch)

    best = 4 if cost(4) < 0.85 * cost(2) else 2
    return best if cost(best) < 9 * (n * height * width + FETCH) else 0


def filter_transform(tile: int) -> Tensor:
    """G of Winograd's F(tile, 3), (tile + 2, 3) in float64: the filter's values at the points.

    Scaled by the interpolation's denominators, so that the input's transform needs none.
    """
    points = [Fraction(p) for p in _POINTS[tile]]
    rows = []
    for p in points:
        denominator = Fraction(1)
        for q in points:
            if q != p:
                denominator *= p - q
        rows.append([float(p**i / denominator) for i in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def out_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(H, W) of a convolution's outputs, from that of its inputs."""
    return [
        (sizes[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]


def pack(weight: Tensor) -> Tensor:
    """weight (C_out, C_in, kH, kW) as conv_direct and conv_stem want it, float32.

    (panels, kH kW C_in, 64).
    """
    return _panels(weight.permute(2, 3, 1, 0).reshape(1, -1, len(weight)))[0]


def pack_winograd(weight: Tensor, tile: int) -> Tensor:
    """weight (C_out, C_in, 3, 3) at the points: (points, panels, C_in, 64), float32.

    Transformed in float64, rounded once.
    """
    g = filter_transform(tile)
    taps = weight.double().permute(2, 3, 1, 0).reshape(9, -1)
    points: Tensor = torch.kron(g, g) @ taps
    return _panels(points.reshape(-1, weight.size(1), len(weight)))


def conv_winograd_pack(weight: Tensor, tile: int, transposed: bool) -> Tensor:
    """pack_winograd of weight, or of the filter of the inputs' gradient."""
    return pack_winograd(weight.transpose(0, 1).flip(2, 3) if transposed else weight, tile)


def _panels(matrices: Tensor) -> Tensor:
    """(matrices, K, C_out) -> (matrices, panels, K, 64), zeros behind C_out."""
    padded = F.pad(matrices.float(), (0, -matrices.size(2) % PANEL))
    panels: Tensor = padded.unflatten(2, (-1, PANEL)).transpose(1, 2)
    return panels.contiguous()


def _matrices(panels: Tensor, channels: int) -> Tensor:
    """What _panels made this of, in float64."""
    return panels.double().transpose(1, 2).flatten(2)[..., :channels]


def _unpack(weight: Tensor, x: Tensor, bias: Tensor, kernel: Sequence[int]) -> Tensor:
    """What pack made this of."""
    taps = _matrices(weight[None], bias.numel()).reshape(*kernel, x.size(1), -1)
    return taps.permute(3, 2, 0, 1).to(x.dtype)


# ---- plain ---------------------------------------------------------------------------------------
def conv_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    tile: int,
    relu: bool,
) -> Tensor:
    """act(conv(x) + bias [+ residual]), by F.conv2d with the filter that was packed."""
    g = torch.linalg.pinv(filter_transform(tile))
    matrices = _matrices(weight, bias.numel())
    taps = torch.kron(g, g) @ matrices.flatten(1)
    filters = taps.reshape(3, 3, -1, bias.numel()).permute(3, 2, 0, 1)
    y = F.conv2d(x, filters.to(x.dtype), bias, padding=padding)
    if residual is not None:
        y = y + residual
    return as_rows(y.relu() if relu else y)


def conv_winograd_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: bool, *rest: Any
) -> None:
    y.copy_(conv_winograd(x, weight, bias, y if add else None, *rest))


def huge_pages(fresh: Tensor) -> None:
    """Advice is for the machine: there is nothing to compute."""


def conv_winograd_weight(grad: Tensor, x: Tensor, padding: list[int], tile: int) -> Tensor:
    """The filter's gradient, as PyTorch computes it."""
    weight = x.new_empty(grad.size(1), x.size(1), 3, 3)
    dw: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return as_rows(dw)


def conv_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
) -> Tensor:
    """act(conv(x) + bias [+ residual])."""
    y = F.conv2d(x, _unpack(weight, x, bias, kernel), bias, stride, padding, dilation)
    if residual is not None:
        y = y + residual
    return as_rows(y.relu() if relu else y)


def conv_direct_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: bool, *rest: Any) -> None:
    y.copy_(conv_direct(x, weight, bias, y if add else None, *rest))


def conv_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    relu: bool,
    max_pool: bool,
) -> Tensor:
    """act(conv(x) + bias), then pooled if wanted."""
    y = F.conv2d(x, _unpack(weight, x, bias, kernel), bias, stride, padding)
    y = y.relu() if relu else y
    return as_rows(F.max_pool2d(y, 3, 2, 1) if max_pool else y)


def conv_stem_(y: Tensor, *args: Any) -> None:
    y.copy_(conv_stem(*args))


# ---- fakes ---------------------------------------------------------------------------------------
def fake_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    tile: int,
    relu: bool,
) -> Tensor:
    return _new(x, bias, [s + 2 * p - 2 for s, p in zip(x.shape[2:], padding, strict=True)])


def fake_winograd_(y: Tensor, *args: object) -> None:
    return None


def fake_winograd_pack(weight: Tensor, tile: int, transposed: bool) -> Tensor:
    _check_tile(tile)
    torch._check(
        weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3),
        lambda: f"weight must be float32 of shape (C_out, C_in, 3, 3); got {tuple(weight.shape)}",
    )
    columns, rows = weight.shape[:2] if not transposed else reversed(weight.shape[:2])
    return weight.new_empty((tile + 2) ** 2, -(-columns // PANEL), rows, PANEL)


def fake_winograd_weight(grad: Tensor, x: Tensor, padding: list[int], tile: int) -> Tensor:
    _check_tile(tile)
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions; got {tuple(x.shape)}")
    torch._check(grad.dim() == 4, lambda: f"grad must have 4 dimensions; got {tuple(grad.shape)}")
    torch._check(
        grad.device == x.device, lambda: f"grad must be on x's device {x.device}; got {grad.device}"
    )
    return x.new_empty(grad.size(1), 3, 3, x.size(1)).permute(0, 3, 1, 2)


def _check_tile(tile: int) -> None:
    torch._check(tile in (2, 4), lambda: f"tile must be 2 or 4; got {tile}")


def fake_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
) -> Tensor:
    return _new(x, bias, _sizes(x, kernel, stride, padding, dilation))


def fake_direct_(y: Tensor, *args: object) -> None:
    return None


def fake_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    relu: bool,
    max_pool: bool,
) -> Tensor:
    size = _sizes(x, kernel, stride, padding, [1, 1])
    return _new(x, bias, [(s - 1) // 2 + 1 for s in size] if max_pool else size)


def fake_stem_(y: Tensor, *args: object) -> None:
    return None


def _sizes(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions; got {tuple(x.shape)}")
    return out_sizes(x.shape[2:], kernel, stride, padding, dilation)


def _new(x: Tensor, bias: Tensor, size: list[int]) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions; got {tuple(x.shape)}")
    return new_rows(x, bias.numel(), size, x.dtype)
