# SPDX-License-Identifier: BSD-3-Clause
"""2-D convolution in training on the CPU: forward and both gradients, each by its fastest kernel.

PyTorch's own (oneDNN) is left where that is as good. Otherwise, in float32 and channels-last:
- 3x3 with stride 1: Winograd's minimal filtering (csrc/cpu/winograd.h), in all three;
- 1x1: matrix products, which need no other order of the weights; with a stride, of the pixels that
  it leaves;
- 3x3 with a stride: the weight's gradient as a product with the gathered windows.
And float16 and bfloat16 are calculated in float32 and rounded at the end where the processor has no
instructions for them: oneDNN would emulate them, several times slower than float32.

_conv_ways.py chooses, _conv_kernels.py computes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from resnet_fast import _conv_kernels as kernels
from resnet_fast import _conv_ways as ways
from resnet_fast import dispatch
from resnet_fast._autograd import differentiable_backward, straight
from resnet_fast._conv_ways import Way
from resnet_fast._reuse import may_overwrite

# Values of x from which a module asks at all: on fewer the asking costs more than it brings.
FROM_NUMEL = 1 << 14


def conv2d(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """F.conv2d(x, weight, None, ...), differentiable to any order.

    x: (N, C_in, H, W). weight: (C_out, C_in / groups, kH, kW). Returns (N, C_out, H_out, W_out) in
    the layout that F.conv2d gives, 16 bits calculated in float32 in that of float32. Under autocast
    in its dtype. Raises what F.conv2d does.
    """
    arguments = stride, padding, dilation, groups
    return _run(x, weight, arguments, *_way(x, weight, *arguments))


def conv2d_and_input(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, Tensor]:
    """(conv2d(x, ...), x), the second for all that x is used for besides: a block's shortcut.

    What it is good for is the backward: the gradient of the other uses arrives there, and the
    convolution adds its own into that, where autograd would keep both and add them in a pass more.
    Arguments and errors as conv2d.
    """
    arguments = stride, padding, dilation, groups
    way, autocast = _way(x, weight, *arguments)
    if way is None or autocast or not (torch.is_grad_enabled() and x.requires_grad):
        return _run(x, weight, arguments, way, autocast), x
    dispatch.took("conv2d")
    return cast("tuple[Tensor, Tensor]", _conv2d_and_input_straight(x, weight, way))


def _run(
    x: Tensor,
    weight: Tensor,
    arguments: tuple[Any, ...],
    way: Way | None,
    autocast: torch.dtype | None,
) -> Tensor:
    """conv2d by its way, and the dtype of autocast, as _way() gives them."""
    if way is None:
        return F.conv2d(x, weight, None, *arguments)
    dtype = autocast or x.dtype
    if x.dtype is not dtype:
        x = x.to(dtype)
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    dispatch.took("conv2d")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return cast(Tensor, _conv2d_straight(x, weight, way))
    return kernels.forward(x, weight, way)


def _way(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Way | None, torch.dtype | None]:
    """The way of a call, None for PyTorch's own; and the dtype of autocast, None without."""
    if not (dispatch.at_once(x, None, (weight,)) and x.dim() == 4 and weight.dim() == 4):
        return None, None
    autocast = ways.autocast_dtype(x)
    way = ways.way_of(x, weight, autocast, *arguments)
    if way is not None and way.wgrad in ways.MATRICES and ways.rounds_matrices():
        return None, None
    return way, autocast


# ---- autograd ------------------------------------------------------------------------------------
def _plain_graph(*grads: Tensor) -> bool:
    """True where PyTorch's operators must compute the gradients: in a graph of them, or for many
    as one (is_grads_batched)."""
    return differentiable_backward() or any(
        [is_legacy_batchedtensor(g) or is_functorch_wrapped_tensor(g) for g in grads]
    )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> Tensor:
        ctx.way = way
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return kernels.forward(x, weight, way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        compute = kernels.plain_backward if _plain_graph(grad) else kernels.backward
        return *compute(grad, x, weight, ctx.way, ctx.needs_input_grad), None


class _Conv2dAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        return _Conv2d.forward(ctx, x, weight, way), x

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return others, None, None
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if others is None or not wanted[0]:
            return _Conv2d.backward(ctx, grad)
        if _plain_graph(grad, others):
            dx, dw = kernels.plain_backward(grad, x, weight, ctx.way, wanted)
            return cast(Tensor, dx) + others, dw, None
        if may_overwrite(others, x):
            return *kernels.backward(grad, x, weight, ctx.way, wanted, onto=others), None
        dx, dw = kernels.backward(grad, x, weight, ctx.way, wanted)
        return cast(Tensor, dx).add_(others), dw, None


_conv2d_straight = straight(_Conv2d)
_conv2d_and_input_straight = straight(_Conv2dAndInput)
