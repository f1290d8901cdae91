# SPDX-License-Identifier: BSD-3-Clause
"""Convs by our matrix product with gathered rows: 1x1, strided, dilated, of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _conv, _conv_sequence, env
from resnet_fast.inference.fold import ConvSpec, Part, Writes


def suits(spec: ConvSpec, weight: Tensor) -> bool:
    """What our operators ask of any conv: float32, one group, C_out in sixteens."""
    return (
        weight.dtype is torch.float32
        and spec.groups == 1
        and weight.shape[0] % 16 == 0
        and weight.shape[1] > 0
        and env.is_available("cpu")
    )


def make_conv(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Writes:
    """The conv, for inputs of any size."""
    packed = _conv.pack(weight)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    geometry = (list(weight.shape[2:]), spec.stride, spec.padding, spec.dilation)
    new = torch.ops.resnet_fast.conv_direct.default
    write = torch.ops.resnet_fast.conv_direct_.default

    def conv(x: Tensor, residual: Tensor | None, into: Tensor | None) -> Tensor:
        if into is None:
            result: Tensor = new(x, packed, bias, residual, *geometry, spec.relu)
            return result
        write(into, x, packed, bias, residual is not None, *geometry, spec.relu)
        return into

    part = Part(_conv_sequence.DIRECT, packed, bias, geometry, spec.relu)
    return Writes(conv, lambda size: part)
