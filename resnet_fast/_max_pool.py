# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's max-pooling on the CPU, keeping less for its backward.

PyTorch saves the input, of which its backward only looks at the shape, and 64-bit indices. In a
ResNet's stem the input is the largest activation of all and nothing else keeps it. Here the shape
and 32-bit indices are kept; the kernels are PyTorch's own, so the numbers are too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fast import dispatch
from resnet_fast.layout import is_channels_last, to_layout

_aten = torch.ops.aten
# Elements below which the memory saved is not worth the calls.
_SMALL = 1 << 17


def max_pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """What a plain nn.MaxPool2d (without return_indices) does on x, (N, C, H, W)."""
    if (
        not (torch.is_grad_enabled() and x.requires_grad)
        or x.dim() != 4
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
    return cast(Tensor, _MaxPool.apply(x, settings, pool.ceil_mode))


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
            planes = grad.new_zeros((*ctx.shape[:2], ctx.shape[2] * ctx.shape[3]))
            dx = planes.scatter_add(2, indices.flatten(2), grad.flatten(2)).view(ctx.shape)
            return dx, None, None
        order = torch.channels_last if ctx.channels_last else torch.contiguous_format
        # Never written: it only says shape and layout.
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        grad = to_layout(grad, ctx.channels_last)
        dx = _aten.max_pool2d_with_indices_backward(
            grad, like, *ctx.settings, ctx.ceil_mode, indices
        )
        return dx, None, None
