# SPDX-License-Identifier: BSD-3-Clause
"""Convs on the CPU: oneDNN with pre-packed weights and fused bias, sum and ReLU.

The operators are those that PyTorch ships for torch.compile. They are private: where one is missing
or refuses the weights, F.conv2d runs, followed by the sum and the ReLU in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from resnet_fast.inference.fold import ConvSpec, folded

PACKED, PLAIN = "oneDNN, packed", "F.conv2d"


def compute_dtype(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype to calculate in for a result of ``dtype``, and why it is another one ("" if not).

    Without bfloat16 instructions oneDNN emulates them, slower than float32 and less exact.
    """
    if dtype is torch.bfloat16 and not _has_bfloat16():
        return torch.float32, "calculated in float32: this CPU has no bfloat16 instructions"
    if dtype is torch.float16:
        return torch.float32, "calculated in float32: float16 convs are not packed on the CPU"
    return dtype, ""


def _has_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def why_not_packed(dtype: torch.dtype) -> str:
    """Why the packed operators cannot run; "" if they can."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN, or it is switched off"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no {dtype} convs"
    for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight"):
        if not hasattr(torch.ops.mkldnn, name):
            return f"this PyTorch has no mkldnn::{name}"
    return ""


def make_conv(
    spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype, sizes: list[int] | None
) -> tuple[Callable[..., Tensor], str, str]:
    """(function of (x) or (x, residual), what runs, why not the fast one).

    sizes: of the input in the example, for the choice of the packed layout.
    """
    weight, bias = folded(spec, values)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    why = why_not_packed(dtype)
    if not why:
        try:
            return _packed(spec, weight, bias), PACKED, ""
        except RuntimeError as error:
            why = f"oneDNN did not pack the weights: {str(error).splitlines()[0]}"
    return _plain(spec, weight, bias), PLAIN, why


def _packed(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    ops = torch.ops.mkldnn
    stride, padding, dilation, groups = spec.stride, spec.padding, spec.dilation, spec.groups
    packed = ops._reorder_convolution_weight(weight, padding, stride, dilation, groups, None)
    # None stays out of the private operators: without a bias they take other code paths.
    rest = (packed, bias, padding, stride, dilation, groups)
    relu = "relu" if spec.relu else None
    if not spec.residual:
        forward = ops._convolution_pointwise.default
        attribute = relu or "none"
        return lambda x: forward(x, *rest, attribute, [], "")
    if spec.inplace:
        onto = ops._convolution_pointwise_.binary
        return lambda x, residual: onto(residual, x, *rest, "add", 1.0, relu, [], "")
    binary = ops._convolution_pointwise.binary
    return lambda x, residual: binary(x, residual, *rest, "add", 1.0, relu, [], "")


def _plain(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    rest = (weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)

    def conv(x: Tensor) -> Tensor:
        y = F.conv2d(x, *rest)
        return y.relu_() if spec.relu else y

    def conv_add(x: Tensor, residual: Tensor) -> Tensor:
        y = F.conv2d(x, *rest).add_(residual)
        return y.relu_() if spec.relu else y

    return conv_add if spec.residual else conv
