# SPDX-License-Identifier: BSD-3-Clause
"""add_relu with a scale on its branch: check, choose, differentiate. See functional.add_relu.

The kernels are the CPU's alone so far; a GPU runs the reference, and the reason is recorded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from resnet_fast import _checks, _plain, _scale, dispatch, reference
from resnet_fast.layout import accumulate_dtype, is_channels_last

_ops = torch.ops.resnet_fast
_forward = _ops.scaled_add_relu_forward.default
_backward = _ops.scaled_add_relu_backward.default


def add_relu(x: Tensor, residual: Tensor, scale: Tensor | float) -> Tensor:
    """relu(x * scale + residual)."""
    if not isinstance(scale, Tensor):
        factor = _checks.factor(scale)
        given = None
        at_once = dispatch.at_once(x, residual)
    else:
        given, factor = scale, 1.0
        at_once = _fits(scale, x) and dispatch.at_once(x, residual, (scale,))
    if at_once:
        dispatch.took("scaled_add_relu")
    else:
        _checks.add_relu(x, residual)
        _checks.scale(given, x)
        why = "" if given is None or given.dtype == x.dtype else "scale and x differ in dtype"
        if dispatch.choose_cpu("scaled_add_relu", x, residual, given, why) == "reference":
            return reference.scaled_add_relu(x, residual, scale)
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (given is not None and given.requires_grad)
    ):
        return cast(Tensor, _ScaledAddReLU.apply(x, residual, given, factor))  # type: ignore[no-untyped-call]
    return cast(Tensor, _forward(x, residual, _flat(given), factor, False)[0])


def _fits(scale: Tensor, x: object) -> bool:
    """True for a scale of x's dtype and of shape (N, C) or (N, C, 1, ...), asked of a tensor x."""
    return (
        isinstance(x, Tensor)
        and scale.dtype is x.dtype
        and scale.shape[:2] == x.shape[:2]
        and (scale.dim() == 2 or (scale.dim() == x.dim() and scale.numel() == _count(x)))
    )


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _flat(scale: Tensor | None) -> Tensor | None:
    """(N, C) of a checked scale."""
    return scale if scale is None or scale.dim() == 2 else scale.flatten(1)


class _ScaledAddReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, scale: Tensor | None, factor: float
    ) -> Tensor:
        y, mask = _forward(x, residual, _flat(scale), factor, True)
        ctx.set_materialize_grads(False)
        # x is what the gradient of scale is made of, and of nothing else.
        kept = x if scale is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, scale, mask)
        ctx.factor, ctx.channels_last = factor, is_channels_last(y)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        x, scale, mask = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, dresidual, dscale = _second_order(ctx, grad, x, scale, mask)
        else:
            dx, dresidual, dscale = _backward(
                grad, x, _flat(scale), ctx.factor, mask, ctx.channels_last, wanted
            )
        return (
            dx if wanted[0] else None,
            dresidual if wanted[1] else None,
            dscale.view(scale.shape) if wanted[2] else None,
            None,
        )


def _second_order(
    ctx: Any, grad: Tensor, x: Tensor | None, scale: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, as a graph that can be differentiated again."""
    keep = _plain.unpack_mask(mask, grad, ctx.channels_last)
    g = torch.where(keep, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    dscale = g  # of nobody, where x was not kept
    if x is not None:
        acc = accumulate_dtype(g.dtype)
        dscale = _scale.sum_pixels(g.to(acc) * x.to(acc), g.dtype)
    return g * _scale.spread(scale, ctx.factor, g), g, dscale
