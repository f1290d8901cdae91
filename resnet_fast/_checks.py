# SPDX-License-Identifier: BSD-3-Clause
"""What the public operators ask of their arguments, each refusal naming the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def add_relu(x: Tensor, residual: Tensor) -> None:
    for name, t in (("x", x), ("residual", residual)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if x.shape != residual.shape:
        broadcast(x, residual)


def factor(scale: object) -> float:
    """A scale that is not a tensor, as a number."""
    if isinstance(scale, (float, int)) and not isinstance(scale, bool):
        return float(scale)
    raise TypeError(f"scale must be a tensor, a float or None; got {type(scale).__name__}")


def scale(scale: Tensor | None, x: Tensor) -> None:
    """That a scale is of x's images and channels."""
    if scale is None:
        return
    if not scale.is_floating_point():
        raise TypeError(f"scale must be of a floating dtype; got {scale.dtype}")
    if scale.device != x.device:
        raise ValueError(f"scale must be on x's device {x.device}; got {scale.device}")
    if x.dim() < 2 or scale.shape not in (x.shape[:2], (*x.shape[:2], *[1] * (x.dim() - 2))):
        wanted = f"{tuple(x.shape[:2])}, one value for each image and channel of x"
        raise ValueError(
            f"scale must have shape {wanted}, or ones after it; got {tuple(scale.shape)}"
        )


def broadcast(x: Tensor, residual: Tensor) -> None:
    try:
        torch.broadcast_shapes(x.shape, residual.shape)
    except RuntimeError:
        raise ValueError(
            f"residual must have, or broadcast with, x's shape {tuple(x.shape)};"
            f" got {tuple(residual.shape)}"
        ) from None


def batch_norm_act(
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
            channel(name, t, x)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None; got {type(residual).__name__}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}; got {residual.device}")
        if residual.shape != shape:
            broadcast(x, residual)
    if training:
        if (running_mean is None) != (running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"running_mean and running_var must both be tensors or both None; {missing} is None"
            )
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} must be a tensor when training is False; got None")


def channel(name: str, t: Tensor, x: Tensor) -> None:
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


def numbers(training: bool, momentum: float, eps: float) -> None:
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (float, int)):
            raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    # As F.batch_norm has it.
    if training and eps <= 0:
        raise ValueError(f"eps must be positive when training; got {eps}")
    if eps < 0:
        raise ValueError(f"eps must be non-negative; got {eps}")


def one_value(shape: torch.Size) -> bool:
    """True for a single value a channel."""
    return shape[0] == 1 and math.prod(shape[2:]) == 1


def more_than_one_value(shape: torch.Size) -> None:
    if one_value(shape):
        # The error and the sentence of F.batch_norm.
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )
