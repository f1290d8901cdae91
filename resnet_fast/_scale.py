# SPDX-License-Identifier: BSD-3-Clause
"""relu(x * scale + residual) as raw operators: schemas, plain PyTorch for every device, fakes.

scale is (N, C), one value for each image and channel, or None: then the number `factor` is taken
for all. They are operators of their own, so that a plain add_relu pays nothing for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _plain
from resnet_fast.layout import accumulate_dtype, mask_bytes, new_like, normalise, to_layout

SCHEMAS = (
    "scaled_add_relu_forward(Tensor x, Tensor residual, Tensor? scale, float factor,"
    " bool save_mask) -> (Tensor y, Tensor mask)",
    # x: what the forward had, needed for the gradient of scale alone.
    "scaled_add_relu_backward(Tensor grad, Tensor? x, Tensor? scale, float factor, Tensor mask,"
    " bool channels_last, bool[3] output_mask) -> (Tensor dx, Tensor dresidual, Tensor dscale)",
)


def spread(scale: Tensor | None, factor: float, like: Tensor) -> Tensor | float:
    """What the branch is multiplied with: (N, C, 1, ...), or the number."""
    if scale is None:
        return factor
    return scale.reshape(*like.shape[:2], *[1] * (like.dim() - 2))


def sum_pixels(product: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C) of a tensor (N, C, *)."""
    return product.flatten(2).sum(2).to(dtype) if product.dim() > 2 else product.to(dtype)


def _check_scale(scale: Tensor | None, x: Tensor) -> None:
    if scale is None:
        return
    _plain.check_device("scale", scale, x)
    _plain.check_dimensions(x)
    torch._check(
        scale.shape == x.shape[:2] and scale.dtype == x.dtype,
        lambda: (
            f"scale must have shape {tuple(x.shape[:2])} and dtype {x.dtype};"
            f" got {tuple(scale.shape)} and {scale.dtype}"
        ),
    )


# ---- plain ---------------------------------------------------------------------------------------
def scaled_add_relu_forward(
    x: Tensor, residual: Tensor, scale: Tensor | None, factor: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    _plain.check_same("residual", residual, x)
    _check_scale(scale, x)
    x, channels_last = normalise(x)
    y = torch.relu(x * spread(scale, factor, x) + to_layout(residual, channels_last))
    mask = _plain.pack_mask(y, channels_last) if save_mask else _plain.nothing(x, torch.uint8)
    return y, mask


def scaled_add_relu_backward(
    grad: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    factor: float,
    mask: Tensor,
    channels_last: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _plain.check_mask(mask, grad)
    _check_scale(scale, grad)
    want_dx, want_dresidual, want_dscale = output_mask
    grad = to_layout(grad, channels_last)
    keep = _plain.unpack_mask(mask, grad, channels_last)
    g = to_layout(torch.where(keep, grad, torch.zeros_like(grad)), channels_last)
    dx = to_layout(g * spread(scale, factor, grad), channels_last) if want_dx else None
    dscale = None
    if want_dscale:
        assert x is not None
        acc = accumulate_dtype(grad.dtype)
        dscale = sum_pixels(g.to(acc) * x.to(acc), grad.dtype)
    none = _plain.nothing(grad, grad.dtype)
    return (
        none if dx is None else dx,
        g if want_dresidual else none.clone(),
        none.clone() if dscale is None else dscale,
    )


# ---- fakes ---------------------------------------------------------------------------------------
def fake_forward(
    x: Tensor, residual: Tensor, scale: Tensor | None, factor: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    _plain.check_same("residual", residual, x)
    _check_scale(scale, x)
    return new_like(x), x.new_empty(mask_bytes(x.numel()) if save_mask else 0, dtype=torch.uint8)


def fake_backward(
    grad: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    factor: float,
    mask: Tensor,
    channels_last: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _plain.check_mask(mask, grad)
    _check_scale(scale, grad)
    laid = to_layout(grad, channels_last)
    want_dx, want_dresidual, want_dscale = output_mask
    return (
        torch.empty_like(laid) if want_dx else _plain.nothing(grad, grad.dtype),
        torch.empty_like(laid) if want_dresidual else _plain.nothing(grad, grad.dtype),
        grad.new_empty(grad.shape[:2] if want_dscale else (0,)),
    )
