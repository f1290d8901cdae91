# SPDX-License-Identifier: BSD-3-Clause
"""The reference: every op in plain PyTorch, on any device and dtype, differentiable to any order.

It is what the ops mean. Tests take it in float64 as the oracle, and any call that no fast
implementation can serve runs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.layout import accumulate_dtype


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual). See functional.add_relu."""
    return F.relu(x + residual)


def scaled_add_relu(x: Tensor, residual: Tensor, scale: Tensor | float) -> Tensor:
    """relu(x * scale + residual), scale (N, C, ...) or a number. See functional.add_relu."""
    if isinstance(scale, Tensor) and scale.dim() != x.dim():
        scale = scale.reshape(*scale.shape, *[1] * (x.dim() - scale.dim()))
    return F.relu(x * scale + residual)


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
    """F.batch_norm, then + residual, then ReLU. See functional.batch_norm_act."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, inverse standard deviation) of each channel, differentiable in x."""
    var, mean = torch.var_mean(
        x.to(accumulate_dtype(x.dtype)), [0, *range(2, x.dim())], correction=0
    )
    return mean, var, torch.rsqrt(var + eps)


def affine(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean, scale, (x - mean) * scale + bias), scale = invstd * weight; accumulation dtype."""
    acc = accumulate_dtype(x.dtype)
    shape = [1, -1, *([1] * (x.dim() - 2))]
    centred = x.to(acc) - mean.view(shape)
    scale = (invstd if weight is None else invstd * weight.to(acc)).view(shape)
    y = centred * scale
    return centred, scale, y if bias is None else y + bias.to(acc).view(shape)


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    training: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias) in the accumulation dtype, differentiable in every input.

    ``keep`` is the ReLU mask as a boolean tensor, or None to recompute it from x. For the second
    order in training, mean and invstd come from batch_statistics(x), inside the graph.
    """
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *([1] * (x.dim() - 2))]
    centred, scale, y = affine(x, mean, invstd, weight, bias)
    g = grad.to(centred.dtype)
    if relu:
        keep = ~(y.to(x.dtype) <= 0) if keep is None else keep
        # NOTE: where, not a product: an infinite or NaN gradient is masked to zero, as in PyTorch.
        g = torch.where(keep, g, torch.zeros((), dtype=g.dtype, device=g.device))
    dbias, dot = g.sum(dims), (g * centred).sum(dims)
    dx = g
    if training:
        count = max(x.numel() // max(x.size(1), 1), 1)
        slope = (invstd * invstd * dot / count).view(shape)
        dx = g - (dbias / count).view(shape) - centred * slope
    return dx * scale, g, dot * invstd, dbias


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
    """F.conv2d without bias, then batch_norm_act. See functional.conv_bn_act."""
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
