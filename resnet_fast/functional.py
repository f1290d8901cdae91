# SPDX-License-Identifier: BSD-3-Clause
"""The public operators: check, choose an implementation, differentiate.

Each fast op is one torch.autograd.Function over raw operators (_library.py). The Function is passed
by when nothing needs a gradient, and its backward goes through the differentiable reference when a
graph of the gradient is asked for (create_graph=True).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import _plain, dispatch, reference
from resnet_fast._reuse import may_overwrite
from resnet_fast.layout import is_channels_last

_HALF = (torch.float16, torch.bfloat16)

_ops = torch.ops.resnet_fast
_add_relu_forward = _ops.add_relu_forward.default
_add_relu_backward = _ops.add_relu_backward.default
_batch_norm_act_forward = _ops.batch_norm_act_forward.default
_batch_norm_act_backward = _ops.batch_norm_act_backward.default
_batch_norm_act_backward_ = _ops.batch_norm_act_backward_.default


# ---- add_relu ------------------------------------------------------------------------------------
def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual), bitwise what PyTorch computes, in one pass.

    x, residual: tensors of any floating dtype; the same shape, dtype and device for the fast path
    (otherwise they are broadcast and promoted as PyTorch does). Returns a new tensor in x's layout.
    For the backward one bit an element is kept. Raises TypeError if either is not a tensor and
    ValueError if the shapes do not broadcast.
    """
    _check_add_relu(x, residual)
    if dispatch.choose("add_relu", x, residual) == "reference":
        return reference.add_relu(x, residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return cast(Tensor, _AddReLU.apply(x, residual)[0])  # type: ignore[no-untyped-call]
    return cast(Tensor, _add_relu_forward(x, residual, False)[0])


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", _add_relu_forward(x, residual, True))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        y, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.channels_last = is_channels_last(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        (mask,) = ctx.saved_tensors
        if _differentiable_backward():
            keep = _plain.unpack_mask(mask, grad, ctx.channels_last)
            dx = torch.where(keep, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
        else:
            dx = _add_relu_backward(grad, mask, ctx.channels_last)
        want_x, want_residual = ctx.needs_input_grad
        return dx if want_x else None, dx if want_residual else None


# ---- batch_norm_act ------------------------------------------------------------------------------
def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """Batch normalisation, then ``+ residual``, then ReLU, in one statistics and one apply pass.

    x: (N, C, *), floating. weight, bias, running_mean, running_var: (C,) or None, of x's dtype or
    float32. residual: of x's shape, or None. ``training`` takes the statistics of the batch, and
    moves the running ones by ``momentum``, in place, if they are given; otherwise the running ones
    are used and must be given. activation: "relu" or None.

    Returns a new tensor of x's shape and dtype, channels_last when x is. Same results as
    F.batch_norm, + and F.relu, accumulated in float32 (float64 for float64) and rounded once.
    Variance by Chan, Golub & LeVeque's pairwise update (1983). Saved for the backward: x, two
    values a channel, and with a residual and ReLU one bit an element.

    Raises ValueError for shapes and values, TypeError for types, before any statistic is touched.
    """
    _check_batch_norm_act(
        x, weight, bias, running_mean, running_var, residual, training, activation
    )
    if training:
        _check_more_than_one_value(x.shape)
    _check_numbers(training, momentum, eps)
    impl = dispatch.choose("batch_norm_act", x, residual, weight, bias, running_mean, running_var)
    if impl == "reference":
        return reference.batch_norm_act(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual=residual,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
    relu = activation == "relu"
    args = (x, weight, bias, residual, running_mean, running_var, training, momentum, eps, relu)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual)
    ):
        return cast(Tensor, _BatchNormAct.apply(*args)[0])  # type: ignore[no-untyped-call]
    return cast(Tensor, _batch_norm_act_forward(*args, False)[0])


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        save_mask = relu and residual is not None
        out = _batch_norm_act_forward(
            x,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            relu,
            save_mask,
        )
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, _, ctx.training, _, ctx.eps, ctx.relu = inputs
        _, mean, invstd, mask = output
        ctx.mark_non_differentiable(mean, invstd, mask)
        ctx.set_materialize_grads(False)
        kept = mask if ctx.relu and residual is not None else None
        ctx.save_for_backward(x, weight, bias, mean, invstd, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        if _differentiable_backward():
            dx, dresidual, dweight, dbias = _second_order(ctx, grad)
        else:
            x, weight, bias, mean, invstd, mask = ctx.saved_tensors
            wanted = [want_x, want_residual, want_weight, want_bias]
            if want_x and may_overwrite(grad, x):
                _, dresidual, dweight, dbias = _batch_norm_act_backward_(
                    grad, x, mean, invstd, weight, bias, mask, ctx.training, ctx.relu, wanted
                )
                dx = grad
            else:
                dx, dresidual, dweight, dbias = _batch_norm_act_backward(
                    grad, x, mean, invstd, weight, bias, mask, ctx.training, ctx.relu, wanted
                )
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            *(None,) * 6,
        )


def _second_order(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, as a graph that can be differentiated again."""
    x, weight, bias, mean, invstd, mask = ctx.saved_tensors
    keep = None if mask is None else _plain.unpack_mask(mask, x, is_channels_last(x))
    if ctx.training:
        mean, _, invstd = reference.batch_statistics(x, ctx.eps)
    dx, dresidual, dweight, dbias = reference.batch_norm_act_backward(
        grad, x, mean, invstd, weight, bias, keep, ctx.training, ctx.relu
    )
    param = _plain.param_dtype(dx.dtype, weight, bias)
    return dx.to(x.dtype), dresidual.to(x.dtype), dweight.to(param), dbias.to(param)


def _differentiable_backward() -> bool:
    """True inside backward(create_graph=True); a compiler traces the raw operator instead."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


# ---- conv_bn_act ---------------------------------------------------------------------------------
def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """2-D convolution without bias, then batch_norm_act.

    x: (N, C_in, H, W). conv_weight: (C_out, C_in / groups, kH, kW). stride, padding, dilation and
    groups as in F.conv2d; the rest as in batch_norm_act, with residual of the convolution's shape.
    Returns (N, C_out, H_out, W_out). The convolution is PyTorch's (oneDNN, cuDNN), under autocast
    too. Errors as in F.conv2d and batch_norm_act.
    """
    for name, t in (("x", x), ("conv_weight", conv_weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    z = F.conv2d(x, conv_weight, None, stride, padding, dilation, groups)
    return batch_norm_act(
        z,
        weight,
        bias,
        running_mean,
        running_var,
        residual=residual,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
    )


# ---- checks --------------------------------------------------------------------------------------
def _check_add_relu(x: Tensor, residual: Tensor) -> None:
    for name, t in (("x", x), ("residual", residual)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if x.shape != residual.shape:
        _check_broadcast(x, residual)


def _check_broadcast(x: Tensor, residual: Tensor) -> None:
    try:
        torch.broadcast_shapes(x.shape, residual.shape)
    except RuntimeError:
        raise ValueError(
            f"residual must have, or broadcast with, x's shape {tuple(x.shape)};"
            f" got {tuple(residual.shape)}"
        ) from None


def _check_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    activation: str | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if activation not in ("relu", None):
        raise ValueError(f'activation must be "relu" or None; got {activation!r}')
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x must have 2 or more dimensions (N, C, *); got shape {tuple(shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype; got {x.dtype}")
    for name, t in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if t is not None:
            _check_channel(name, t, x)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None; got {type(residual).__name__}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}; got {residual.device}")
        if residual.shape != shape:
            _check_broadcast(x, residual)
    if training:
        if (running_mean is None) != (running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"running_mean and running_var must both be tensors or both None; {missing} is None"
            )
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} must be a tensor when training is False; got None")


def _check_channel(name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(t).__name__}")
    channels = x.shape[1]
    if t.dim() != 1 or t.shape[0] != channels:
        raise ValueError(
            f"{name} must have shape ({channels},), x's channels; got {tuple(t.shape)}"
        )
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in _HALF):
        wanted = f"{x.dtype} or float32" if x.dtype in _HALF else str(x.dtype)
        raise TypeError(f"{name} must be of dtype {wanted}, as x is {x.dtype}; got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}; got {t.device}")


def _check_numbers(training: bool, momentum: float, eps: float) -> None:
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (float, int)):
            raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    # As F.batch_norm has it.
    if training and eps <= 0:
        raise ValueError(f"eps must be positive when training; got {eps}")
    if eps < 0:
        raise ValueError(f"eps must be non-negative; got {eps}")


def _check_more_than_one_value(shape: torch.Size) -> None:
    count = shape[0]
    for size in shape[2:]:
        count *= size
    if count == 1:
        # The error and the sentence of F.batch_norm.
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )
