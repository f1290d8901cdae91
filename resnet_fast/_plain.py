# SPDX-License-Identifier: BSD-3-Clause
"""The raw operators in plain PyTorch: what they are on a device with no kernel of its own.

The mask is the interesting part: one bit an element, in memory order of the output (layout.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast import reference
from resnet_fast.layout import (
    accumulate_dtype,
    from_memory_order,
    mask_bytes,
    memory_order,
    normalise,
    to_layout,
)


# ---- the mask ------------------------------------------------------------------------------------
def pack_mask(y: Tensor, channels_last: bool) -> Tensor:
    """One bit an element of y in memory order: 1 where ReLU's gradient passes, not (y <= 0)."""
    bits = ~(memory_order(y, channels_last) <= 0)
    padded = bits.new_zeros(8 * mask_bytes(y.numel()))
    padded[: bits.numel()] = bits
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=y.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The mask as a boolean tensor of like's shape."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(-1, 1) >> shifts) & 1
    return from_memory_order(bits.view(-1)[: like.numel()].bool(), like, channels_last)


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    torch._check(
        t.device == x.device,
        lambda: f"{name} must be on x's device {x.device}; got {t.device}",
    )


def check_mask(mask: Tensor, x: Tensor) -> None:
    numel = x.numel()
    expected = mask_bytes(numel)
    check_device("mask", mask, x)
    torch._check(
        mask.dtype == torch.uint8 and mask.dim() == 1 and mask.numel() == expected,
        lambda: (
            f"mask must be a 1-D uint8 tensor of {expected} bytes for {numel} elements;"
            f" got {mask.dtype} of shape {tuple(mask.shape)}"
        ),
    )


def check_channel(name: str, t: Tensor | None, x: Tensor) -> None:
    if t is not None:
        channels = x.size(1)
        check_device(name, t, x)
        torch._check(
            t.dim() == 1 and t.size(0) == channels,
            lambda: f"{name} must have shape ({channels},); got {tuple(t.shape)}",
        )


def check_same(name: str, t: Tensor, x: Tensor) -> None:
    check_device(name, t, x)
    torch._check(
        t.shape == x.shape and t.dtype == x.dtype,
        lambda: (
            f"{name} must have x's shape {tuple(x.shape)} and dtype {x.dtype};"
            f" got {tuple(t.shape)} and {t.dtype}"
        ),
    )


def check_dimensions(x: Tensor) -> None:
    torch._check(
        x.dim() >= 2, lambda: f"x must have 2 or more dimensions (N, C, *); got {tuple(x.shape)}"
    )


def check_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> None:
    check_dimensions(x)
    channel = {"weight": weight, "bias": bias}
    channel |= {"running_mean": running_mean, "running_var": running_var}
    for name, t in channel.items():
        check_channel(name, t, x)
    if residual is not None:
        check_same("residual", residual, x)
    has_stats = running_mean is not None and running_var is not None
    torch._check(
        training or has_stats,
        lambda: "running_mean and running_var must be given when training is False",
    )


def check_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_dimensions(x)
    check_same("grad", grad, x)
    channel = {"mean": mean, "invstd": invstd, "weight": weight, "bias": bias}
    for name, t in channel.items():
        check_channel(name, t, x)
    if mask is not None:
        check_mask(mask, x)


def param_dtype(acc: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    given = weight if weight is not None else bias
    return acc if given is None else given.dtype


def nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(0, dtype=dtype)


# ---- add_relu ------------------------------------------------------------------------------------
def add_relu_forward(x: Tensor, residual: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    check_same("residual", residual, x)
    x, channels_last = normalise(x)
    y = torch.relu(x + to_layout(residual, channels_last))
    return y, pack_mask(y, channels_last) if save_mask else nothing(x, torch.uint8)


def add_relu_inference(x: Tensor, residual: Tensor) -> Tensor:
    return add_relu_forward(x, residual, False)[0]


def add_relu_backward(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    check_mask(mask, grad)
    grad = to_layout(grad, channels_last)
    keep = unpack_mask(mask, grad, channels_last)
    return to_layout(torch.where(keep, grad, torch.zeros_like(grad)), channels_last)


# ---- batch_norm_act ------------------------------------------------------------------------------
def batch_norm_act_forward(
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
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_forward(x, weight, bias, residual, running_mean, running_var, training)
    x, channels_last = normalise(x)
    acc = accumulate_dtype(x.dtype)
    if training:
        mean, var, invstd = reference.batch_statistics(x, eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(acc, copy=True), running_var.to(acc)
        invstd = torch.rsqrt(var + eps)
    _, _, y = reference.affine(x, mean, invstd, weight, bias)
    if residual is not None:
        y = y + residual.to(acc)
    y = to_layout((torch.relu(y) if relu else y).to(x.dtype), channels_last)
    mask = pack_mask(y, channels_last) if save_mask else nothing(x, torch.uint8)
    if training and x.numel() > 0:
        count = x.numel() // x.size(1)
        update_running(running_mean, mean, momentum)
        update_running(running_var, var * (count / max(count - 1, 1)), momentum)
    return y, mean, invstd, mask


def batch_norm_act_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    statistics = (running_mean, running_var, False, 0.0)
    return batch_norm_act_forward(x, weight, bias, residual, *statistics, eps, relu, False)[0]


def update_running(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(grad, x, mean, invstd, weight, bias, mask)
    x, channels_last = normalise(x)
    keep = None if mask is None else unpack_mask(mask, x, channels_last)
    grad = to_layout(grad, channels_last)
    dx, dresidual, dweight, dbias = reference.batch_norm_act_backward(
        grad, x, mean, invstd, weight, bias, keep, training, relu
    )
    param = param_dtype(dx.dtype, weight, bias)
    of_x = [
        to_layout(g.to(x.dtype, copy=True), channels_last) if want else nothing(x, x.dtype)
        for g, want in zip((dx, dresidual), output_mask[:2], strict=True)
    ]
    of_parameters = [
        g.to(param) if want else nothing(x, param)
        for g, want in zip((dweight, dbias), output_mask[2:], strict=True)
    ]
    return of_x[0], of_x[1], of_parameters[0], of_parameters[1]


def batch_norm_act_backward_(
    grad: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """batch_norm_act_backward, with dx written over grad if it is wanted."""
    dx, dresidual, dweight, dbias = batch_norm_act_backward(grad, x, *rest)
    if rest[-1][0]:
        grad.copy_(dx)
    return nothing(x, x.dtype), dresidual, dweight, dbias
