# SPDX-License-Identifier: BSD-3-Clause
"""Convs on the CPU: our Winograd, or oneDNN with pre-packed weights and fused bias, sum and ReLU.

oneDNN's operators are those that PyTorch ships for torch.compile. They are private: where one is
missing or refuses the weights, F.conv2d runs, followed by the sum and the ReLU in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from resnet_fast import _conv, _conv_sequence
from resnet_fast._conv_ways import has_instructions
from resnet_fast.inference import direct, winograd
from resnet_fast.inference.fold import MAX_SIZES, Conv, ConvSpec, Part, Writes, folded

PACKED, PLAIN = "oneDNN, packed", "F.conv2d"
WINOGRAD, DIRECT = "Winograd, or direct for small maps", "direct"
STEM, POOLED_STEM = "stem", "stem, pooled line by line"
FAST = (PACKED, WINOGRAD, DIRECT, STEM, POOLED_STEM)
FEW_CHANNELS = 8  # of a picture: more, and gathering its rows costs less than it saves


def compute_dtype(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype to calculate in for a result of ``dtype``, and why it is another one ("" if not).

    Without bfloat16 instructions oneDNN emulates them, slower than float32 and less exact.
    """
    if dtype is torch.bfloat16 and not has_instructions(dtype):
        return torch.float32, "calculated in float32: this CPU has no bfloat16 instructions"
    if dtype is torch.float16:
        return torch.float32, "calculated in float32: float16 convs are not packed on the CPU"
    return dtype, ""


def why_not_packed(dtype: torch.dtype) -> str:
    """Why the packed operators cannot run; "" if they can."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN, or it is switched off"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no {dtype} convs"
    for name in (
        "_convolution_pointwise",
        "_convolution_pointwise_",
        "_reorder_convolution_weight",
    ):
        if not hasattr(torch.ops.mkldnn, name):
            return f"this PyTorch has no mkldnn::{name}"
    return ""


def let_malloc_keep() -> None:
    """Let glibc keep blocks of up to 32 MiB for the next call, as it does once one was freed.

    Freeing a mapped block raises the size from which glibc maps blocks to that block's, and what it
    keeps at the heap's end to twice that (mallopt(3), M_MMAP_THRESHOLD; 32 MiB is the most). Before
    that every call faults its memory in anew. Elsewhere this is an allocation and nothing else.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


def make_conv(
    spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype
) -> tuple[Conv, str, str]:
    """(what computes the conv, its name, why not the fast one)."""
    weight, bias = folded(spec, values)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if spec.max_pool:
        return _pooled(spec, weight, bias)
    return _unpooled(spec, weight, bias)


def _unpooled(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> tuple[Conv, str, str]:
    if _is_stem(spec, weight):
        return _stem(spec, weight, bias), STEM, ""
    if winograd.suits(spec, weight):
        conv = winograd.make_conv(spec, weight, bias, lambda: direct.make_conv(spec, weight, bias))
        return conv, WINOGRAD, ""
    if direct.suits(spec, weight):
        return direct.make_conv(spec, weight, bias), DIRECT, ""
    return _of_library(spec, weight, bias)


def _of_library(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None
) -> tuple[Callable[..., Tensor], str, str]:
    why = why_not_packed(weight.dtype)
    if not why:
        try:
            return _packed(spec, weight, bias), PACKED, ""
        except RuntimeError as error:
            why = f"oneDNN did not pack the weights: {str(error).splitlines()[0]}"
    return _plain(spec, weight, bias), PLAIN, why


def _pooled(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> tuple[Conv, str, str]:
    """With the max-pooling: in one, where the input has few channels, or one after the other."""
    if _is_stem(spec, weight):
        return _stem(spec, weight, bias), POOLED_STEM, ""
    conv, how, why = _unpooled(spec, weight, bias)
    run = (lambda x: conv.function(x, None, None)) if isinstance(conv, Writes) else conv
    return lambda x: F.max_pool2d(run(x), 3, 2, 1), how, why


def _is_stem(spec: ConvSpec, weight: Tensor) -> bool:
    """Whether conv_stem computes it: few channels, nothing added."""
    few = weight.shape[1] <= FEW_CHANNELS and list(spec.dilation) == [1, 1]
    return few and not spec.residual and direct.suits(spec, weight)


def _stem(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Writes:
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    packed = _conv.pack(weight)
    geometry = (list(weight.shape[2:]), spec.stride, spec.padding)
    rest = (*geometry, spec.relu, spec.max_pool)
    new = torch.ops.resnet_fast.conv_stem.default
    write = torch.ops.resnet_fast.conv_stem_.default

    def conv(x: Tensor, residual: Tensor | None, into: Tensor | None) -> Tensor:
        if into is None:
            result: Tensor = new(x, packed, bias, *rest)
            return result
        write(into, x, packed, bias, *rest)
        return into

    kind = _conv_sequence.POOLED_STEM if spec.max_pool else _conv_sequence.STEM
    part = Part(kind, packed, bias, (*geometry, spec.dilation), spec.relu)
    return Writes(conv, lambda size: part)


def _packed(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    ops: Any = torch.ops.mkldnn
    weights = _Weights(weight, spec)
    rest = (bias, spec.padding, spec.stride, spec.dilation, spec.groups)
    known, pack = weights.known.get, weights.pack
    relu = "relu" if spec.relu else None
    if not spec.residual:
        forward = ops._convolution_pointwise.default
        attribute = relu or "none"

        def conv(x: Tensor) -> Any:
            size = x.shape
            w = known(size)
            return forward(x, pack(size) if w is None else w, *rest, attribute, [], "")

        return conv
    onto, binary = ops._convolution_pointwise_.binary, ops._convolution_pointwise.binary

    def conv_onto(x: Tensor, residual: Tensor) -> Any:
        size = x.shape
        w = known(size)
        w = pack(size) if w is None else w
        return onto(residual, x, w, *rest, "add", 1.0, relu, [], "")

    def conv_add(x: Tensor, residual: Tensor) -> Any:
        size = x.shape
        w = known(size)
        w = pack(size) if w is None else w
        return binary(x, residual, w, *rest, "add", 1.0, relu, [], "")

    return conv_onto if spec.inplace else conv_add


class _Weights:
    """The weights of one conv, packed for every input size that came.

    oneDNN chooses another layout for another batch or picture size, and weights in the wrong one
    are reordered in each call, which can cost many times the conv. Sizes that want the same
    layout share one copy.
    """

    def __init__(self, weight: Tensor, spec: ConvSpec) -> None:
        self.known: dict[torch.Size, Tensor] = {}
        self._layouts: dict[bytes, Tensor] = {}
        self._settings = (spec.padding, spec.stride, spec.dilation, spec.groups)
        self._lock = threading.Lock()
        self._last = weight
        self._add(weight, None)

    def pack(self, size: torch.Size) -> Tensor:
        """The weights for inputs of this size."""
        with self._lock:
            if len(self.known) >= MAX_SIZES:
                self.known.clear()
            if size not in self.known:
                self.known[size] = self._add(self._last.to_dense(), list(size))
            return self.known[size]

    def _add(self, weight: Tensor, size: list[int] | None) -> Tensor:
        ops = torch.ops.mkldnn
        packed = ops._reorder_convolution_weight(weight, *self._settings, size)
        layout = ops._get_mkldnn_serialized_md(packed).numpy().tobytes()
        if not self.known:
            self._layouts.clear()  # the first packing was made before any size was known
        self._last = self._layouts.setdefault(layout, packed)
        return self._last


def _plain(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    rest = (weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)

    def conv(x: Tensor) -> Tensor:
        y = F.conv2d(x, *rest)
        return y.relu_() if spec.relu else y

    def conv_add(x: Tensor, residual: Tensor) -> Tensor:
        y = F.conv2d(x, *rest).add_(residual)
        return y.relu_() if spec.relu else y

    return conv_add if spec.residual else conv
