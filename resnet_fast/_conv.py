# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with bias, residual and ReLU as a raw operator, its weights packed beforehand.

Float32, channels-last. ``tile`` says how: 0 is the plain sum of products, 2 and 4 are Winograd's
minimal filtering (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016) with
tiles of that many outputs a side, for 3x3 kernels with stride 1. For inference: no gradients.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

_SETTINGS = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int tile, bool relu"
SCHEMAS = (
    # weight: what pack() makes. bias: (C_out,), C_out a multiple of 16.
    f"conv_bias_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, {_SETTINGS}) -> Tensor",
    # The same, written over residual.
    f"conv_bias_act_(Tensor(a!) residual, Tensor x, Tensor weight, Tensor bias, {_SETTINGS}) -> ()",
)
PANEL = 32  # output channels side by side in packed weights
# Where the polynomials are evaluated; infinity is the last point. See csrc/cpu/conv_winograd.cpp.
_POINTS = {2: (0, 1, -1), 4: (0, Fraction(3, 4), -Fraction(3, 4), Fraction(3, 2), -Fraction(3, 2))}


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


def pack(weight: Tensor, tile: int) -> Tensor:
    """weight (C_out, C_in, kH, kW) as the operators want it, transformed in float64, in float32.

    tile 0: (panels, kH kW C_in, 32); 2 and 4: (points, panels, C_in, 32); zeros behind C_out.
    """
    out, inner = weight.shape[:2]
    taps = weight.double().permute(2, 3, 1, 0).reshape(-1, inner * out)
    if tile:
        g = filter_transform(tile)
        taps = torch.kron(g, g) @ taps
    else:
        taps = taps.reshape(1, -1)
    matrices = taps.float().reshape(taps.size(0), -1, out)
    matrices = F.pad(matrices, (0, -out % PANEL))
    panels = matrices.unflatten(2, (-1, PANEL)).transpose(1, 2).contiguous()
    return panels if tile else panels[0]


def unpack(packed: Tensor, channels: int, kernel: list[int], tile: int) -> Tensor:
    """The weight (channels, C_in, kH, kW) in float64 that pack() made this of."""
    matrices = packed.double() if tile else packed.double()[None]
    matrices = matrices.transpose(1, 2).flatten(2)[..., :channels]
    if tile:
        g = torch.linalg.pinv(filter_transform(tile))
        taps = torch.kron(g, g) @ matrices.flatten(1)
    else:
        taps = matrices
    return taps.reshape(kernel[0], kernel[1], -1, channels).permute(3, 2, 0, 1)


# ---- plain ---------------------------------------------------------------------------------------
def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    tile: int,
    relu: bool,
) -> Tensor:
    """act(conv(x) + bias [+ residual]), of F.conv2d; the result is channels-last."""
    unpacked = unpack(weight, bias.numel(), kernel, tile).to(x.dtype)
    y = F.conv2d(x, unpacked, bias, stride, padding, dilation)
    if residual is not None:
        y = y + residual
    return _rows(y.relu() if relu else y)


def conv_bias_act_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *settings: object
) -> None:
    residual.copy_(conv_bias_act(x, weight, bias, residual, *settings))  # type: ignore[arg-type]


# ---- fakes ---------------------------------------------------------------------------------------
def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    tile: int,
    relu: bool,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"x must have 4 dimensions; got {tuple(x.shape)}")
    height, width = (
        (x.size(d + 2) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    return x.new_empty(x.size(0), height, width, bias.numel()).permute(0, 3, 1, 2)


def fake_(residual: Tensor, *args: object) -> None:
    return None


def _rows(y: Tensor) -> Tensor:
    """With channels-last strides, also where a size of one leaves PyTorch the choice."""
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
