# SPDX-License-Identifier: BSD-3-Clause
"""The public operators: check, choose an implementation, differentiate.

Each fast op is one torch.autograd.Function over raw operators (_library.py). The Function is passed
by when nothing needs a gradient, and its backward goes through the differentiable reference when a
graph of the gradient is asked for (create_graph=True).

On small tensors the call itself is what costs. So the common call, of ordinary CPU tensors, is told
by dispatch.at_once() in attribute reads and goes to the op without the checks, which the op makes
itself; where the op refuses, the checks follow and say it in their words. And the Functions have no
setup_context: with one, PyTorch takes the signature of forward apart at every call. It would serve
torch.func's transforms alone, under which the reference runs. For the same reason the common call
goes past Function.apply, which looks for tensors left over from such transforms: at_once() has.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from resnet_fast import _checks, _plain, _reuse, dispatch, reference, scaled
from resnet_fast._autograd import differentiable_backward, straight
from resnet_fast._reuse import may_overwrite
from resnet_fast.convolution import conv2d
from resnet_fast.layout import is_channels_last

_ops = torch.ops.resnet_fast
_add_relu_forward = _ops.add_relu_forward.default
_add_relu_backward = _ops.add_relu_backward.default
# Those that no compiler sees are called past OpOverload's Python.
_add_relu_inference = _ops.add_relu_inference.default._op
_batch_norm_act_inference = _ops.batch_norm_act_inference.default._op
_batch_norm_act_forward = _ops.batch_norm_act_forward.default._op
_batch_norm_act_backward = _ops.batch_norm_act_backward.default._op
_batch_norm_act_backward_ = _ops.batch_norm_act_backward_.default._op
# And the same for compilers.
_traced_forward = _ops.batch_norm_act_forward.default
_traced_backward = _ops.batch_norm_act_backward.default


# ---- add_relu ------------------------------------------------------------------------------------
def add_relu(x: Tensor, residual: Tensor, *, scale: Tensor | float | None = None) -> Tensor:
    """relu(x + residual), or relu(x * scale + residual), in one pass, with PyTorch's very bits.

    x, residual: tensors of any floating dtype; the same shape, dtype and device for the fast path
    (otherwise they are broadcast and promoted as PyTorch does). Returns a new tensor in x's layout.
    For the backward one bit an element is kept. Raises TypeError if either is not a tensor and
    ValueError if the shapes do not broadcast.

    scale: a number, or a gate (channel attention, stochastic depth): a tensor (N, C) or (N, C, 1,
    ...) of x's dtype for x (N, C, *); expand a scalar or (1, C) parameter to that shape. If it
    needs a gradient, x and scale are kept, too. Raises TypeError for a scale of another type, and
    ValueError for one of another shape or device.
    """
    if scale is not None:
        return scaled.add_relu(x, residual, scale)
    if at_once := dispatch.at_once(x, residual):
        dispatch.took("add_relu")
    else:
        _checks.add_relu(x, residual)
        if dispatch.choose("add_relu", x, residual) == "reference":
            return reference.add_relu(x, residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        apply = _add_relu_straight if at_once else _AddReLU.apply
        return cast(Tensor, apply(x, residual))
    if at_once:
        return cast(Tensor, _add_relu_inference(x, residual))
    return cast(Tensor, _add_relu_forward(x, residual, False)[0])


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
        y, mask = _add_relu_forward(x, residual, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.channels_last = is_channels_last(y)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        (mask,) = ctx.saved_tensors
        if differentiable_backward():
            keep = _plain.unpack_mask(mask, grad, ctx.channels_last)
            dx = torch.where(keep, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
        else:
            dx = _add_relu_backward(grad, mask, ctx.channels_last)
        want_x, want_residual = ctx.needs_input_grad
        return dx if want_x else None, dx if want_residual else None


_add_relu_straight = straight(_AddReLU)


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
    channel = (weight, bias, running_mean, running_var)
    if (
        dispatch.at_once(x, residual, channel)
        and (activation == "relu" or activation is None)
        and type(eps) is float
        and eps > 0
        and type(momentum) is float
        and (running_mean is None) == (running_var is None)
        and (
            (x.size(0) > 1 or not _checks.one_value(x.shape))
            if training
            else running_mean is not None
        )
    ):
        return batch_norm_act_at_once(x, channel, residual, training, momentum, eps, activation)
    _checks.batch_norm_act(x, *channel, residual, training, activation)
    if training:
        _checks.more_than_one_value(x.shape)
    _checks.numbers(training, momentum, eps)
    if dispatch.choose("batch_norm_act", x, residual, *channel) == "reference":
        return reference.batch_norm_act(
            x,
            *channel,
            residual=residual,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
    relu = activation == "relu"
    rest = running_mean, running_var, training, momentum, eps, relu, False
    if torch.is_grad_enabled() and needs_gradient(x, weight, bias, residual):
        return cast(Tensor, _BatchNormAct.apply(x, weight, bias, residual, rest))  # type: ignore[no-untyped-call]
    return cast(Tensor, _traced_forward(x, weight, bias, residual, *rest[:-1], False)[0])


def batch_norm_act_at_once(
    x: Tensor,
    channel: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """batch_norm_act for what dispatch.at_once() lets through."""
    weight, bias, mean, var = channel
    relu = activation == "relu"
    dispatch.took("batch_norm_act")
    try:
        if torch.is_grad_enabled() and needs_gradient(x, weight, bias, residual):
            rest = mean, var, training, momentum, eps, relu, True
            y = _batch_norm_act_straight(x, weight, bias, residual, rest)
        elif training:
            y = _batch_norm_act_forward(
                x, weight, bias, residual, mean, var, True, momentum, eps, relu, False
            )[0]
        else:
            y = _batch_norm_act_inference(x, weight, bias, residual, mean, var, eps, relu)
    except RuntimeError:
        # The op has looked at shapes before it did anything; this names the argument.
        _checks.batch_norm_act(x, *channel, residual, training, activation)
        raise
    return cast(Tensor, y)


def needs_gradient(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> bool:
    """True if any of them does, for calls where gradients are enabled."""
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


# running_mean, running_var, training, momentum, eps, relu, and whether dispatch.at_once() let the
# call through. They are one argument of the Function, since each costs and none has a gradient.
_Rest = tuple["Tensor | None", "Tensor | None", bool, float, float, bool, bool]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: _Rest,
    ) -> Tensor:
        running_mean, running_var, training, momentum, eps, relu, at_once = rest
        save_mask = relu and residual is not None
        op = _batch_norm_act_forward if at_once else _traced_forward
        y, mean, invstd, mask = op(
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
        ctx.settings = training, eps, relu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, invstd, mask if save_mask else None)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        want_x, want_weight, want_bias, want_residual, _ = ctx.needs_input_grad
        # Asked before the functions of ours that would: a call is what costs here.
        compiling, again = torch.compiler.is_dynamo_compiling(), torch.is_grad_enabled()
        if again and differentiable_backward():
            dx, dresidual, dweight, dbias = _second_order(ctx, grad)
        else:
            x, weight, bias, mean, invstd, mask = ctx.saved_tensors
            training, _, relu = ctx.settings
            wanted = [want_x, want_residual, want_weight, want_bias]
            large = not compiling and grad.numel() >= _reuse.SMALL
            if want_x and large and may_overwrite(grad, x):
                _, dresidual, dweight, dbias = _batch_norm_act_backward_(
                    grad, x, mean, invstd, weight, bias, mask, training, relu, wanted
                )
                dx = grad
            else:
                op = _traced_backward if compiling else _batch_norm_act_backward
                dx, dresidual, dweight, dbias = op(
                    grad, x, mean, invstd, weight, bias, mask, training, relu, wanted
                )
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            None,
        )


_batch_norm_act_straight = straight(_BatchNormAct)


def _second_order(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, as a graph that can be differentiated again."""
    x, weight, bias, mean, invstd, mask = ctx.saved_tensors
    training, eps, relu = ctx.settings
    keep = None if mask is None else _plain.unpack_mask(mask, x, is_channels_last(x))
    if training:
        mean, _, invstd = reference.batch_statistics(x, eps)
    dx, dresidual, dweight, dbias = reference.batch_norm_act_backward(
        grad, x, mean, invstd, weight, bias, keep, training, relu
    )
    param = _plain.param_dtype(dx.dtype, weight, bias)
    return dx.to(x.dtype), dresidual.to(x.dtype), dweight.to(param), dbias.to(param)


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
    Returns (N, C_out, H_out, W_out). The convolution is PyTorch's (oneDNN, cuDNN), or on the CPU
    one of convolution.py; under autocast too. Errors as in F.conv2d and batch_norm_act.
    """
    for name, t in (("x", x), ("conv_weight", conv_weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    z = conv2d(x, conv_weight, stride, padding, dilation, groups)
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
