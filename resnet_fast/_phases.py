# SPDX-License-Identifier: BSD-3-Clause
"""The phases of batch_norm_act as raw operators, between which a synchronised form communicates.

forward: statistics of this process's batch | apply (batch_norm_act_forward in eval mode).
backward: reduce | apply. What crosses the line is two values a channel, in float64, so that the
result does not depend on how a batch is split. Plain PyTorch, for every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _plain, reference
from resnet_fast.layout import new_like, normalise, to_layout

SCHEMAS = (
    "batch_norm_statistics(Tensor x) -> (Tensor mean, Tensor m2)",
    "batch_norm_act_backward_reduce(Tensor grad, Tensor x, Tensor mean, Tensor invstd,"
    " Tensor? weight, Tensor? bias, Tensor? mask, bool relu)"
    " -> (Tensor masked, Tensor sum, Tensor dot)",
    "batch_norm_act_backward_apply(Tensor masked, Tensor x, Tensor mean, Tensor invstd,"
    " Tensor? weight, Tensor sum, Tensor dot, float count) -> Tensor",
)


# ---- forward -------------------------------------------------------------------------------------
def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel of x (N, C, *): the mean, and the sum of squared deviations from it, float64."""
    _plain.check_dimensions(x)
    values = x.transpose(0, 1).flatten(1).double()
    if values.size(1) == 0:
        return values.new_zeros(values.size(0)), values.new_zeros(values.size(0))
    mean = values.mean(1)
    centred = values - mean[:, None]
    rest = centred.mean(1)  # the rounding of the mean, corrected in both
    return mean + rest, (centred - rest[:, None]).square().sum(1)


def fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    _plain.check_dimensions(x)
    mean = x.new_empty(x.size(1), dtype=torch.float64)
    return mean, torch.empty_like(mean)


# ---- backward ------------------------------------------------------------------------------------
def batch_norm_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, sum of g, sum of g (x - mean)): g the gradient behind the ReLU, of x's shape and dtype.

    mean, invstd, mask: what the forward gave. Without a ReLU g is grad, and an empty tensor is
    returned for it. The sums are per channel, float64.
    """
    _plain.check_backward(grad, x, mean, invstd, weight, bias, mask)
    x, channels_last = normalise(x)
    g = to_layout(grad, channels_last)
    centred, _, y = reference.affine(x, mean, invstd, weight, bias)
    masked = _plain.nothing(x, x.dtype)
    if relu:
        stored = None if mask is None else _plain.unpack_mask(mask, x, channels_last)
        keep = ~(y.to(x.dtype) <= 0) if stored is None else stored
        masked = g = to_layout(torch.where(keep, g, torch.zeros_like(g)), channels_last)
    dims = [0, *range(2, x.dim())]
    wide = g.double()
    return masked, wide.sum(dims), (wide * centred.double()).sum(dims)


def fake_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _plain.check_backward(grad, x, mean, invstd, weight, bias, mask)
    total = x.new_empty(x.size(1), dtype=torch.float64)
    masked = new_like(x) if relu else _plain.nothing(x, x.dtype)
    return masked, total, torch.empty_like(total)


def batch_norm_act_backward_apply(
    masked: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum: Tensor,
    dot: Tensor,
    count: float,
) -> Tensor:
    """dx = weight * invstd * (g - sum / count - (x - mean) * invstd^2 * dot / count).

    masked: g. sum, dot: of all processes, as is count, the number of values a channel has.
    """
    _plain.check_backward(masked, x, mean, invstd, weight, None, None)
    x, channels_last = normalise(x)
    centred, scale, _ = reference.affine(x, mean, invstd, weight, None)
    acc = centred.dtype
    shape = [1, -1, *([1] * (x.dim() - 2))]
    slope = (dot * invstd.double().square() / count).to(acc).view(shape)
    offset = (sum / count).to(acc).view(shape)
    dx = (masked.to(acc) - offset - centred * slope) * scale
    return to_layout(dx.to(x.dtype), channels_last)


def fake_apply(
    masked: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum: Tensor,
    dot: Tensor,
    count: float,
) -> Tensor:
    _plain.check_backward(masked, x, mean, invstd, weight, None, None)
    return new_like(x)
