# SPDX-License-Identifier: BSD-3-Clause
"""What a device brings to a compiled trace: its convs, their dtype and layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from resnet_fast.inference import cpu
from resnet_fast.inference.choose import MeasuredKernels
from resnet_fast.inference.cuda import Cuda
from resnet_fast.inference.fold import Conv, ConvSpec
from resnet_fast.inference.plan import Plan
from resnet_fast.inference.trace import NotTraceable

# Of a conv, for explain: (what runs, why not the fast one).
Describe = Callable[[], tuple[str, str]]


class Kernels(Protocol):
    """A device's part. Inputs and values of four dimensions are in its memory format."""

    device: torch.device
    in_pieces: bool  # whether a large batch runs in pieces

    @property
    def plan(self) -> Plan | None:
        """The choices measured; None where nothing is."""

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        """The dtype to calculate in for results of ``dtype``, and why it is another one."""

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        """The layout to calculate in."""

    def begin(self, dtype: torch.dtype) -> str:
        """Called before each call; PyTorch's settings that choices depend on."""

    def make_conv(
        self, spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype
    ) -> tuple[Conv, Describe]:
        """What computes one conv, and what is to be said of it."""


class CpuKernels:
    """Our Winograd and stem, and oneDNN's convs; chosen by counting."""

    plan: Plan | None = None
    in_pieces = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cpu.let_malloc_keep()

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        return cpu.compute_dtype(dtype)

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        return torch.channels_last

    def begin(self, dtype: torch.dtype) -> str:
        return ""

    def make_conv(
        self, spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype
    ) -> tuple[Conv, Describe]:
        function, how, why = cpu.make_conv(spec, values, dtype)
        return function, lambda: (how, why)


class NoKernels(CpuKernels):
    """A device for which there is nothing: the model runs whole."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        return dtype, ""

    def make_conv(
        self, spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype
    ) -> tuple[Conv, Describe]:
        raise NotTraceable(f"there are no fused convs for {self.device.type}")


def kernels_for(device: torch.device, plan: Plan | None) -> Kernels:
    """The kernels of a device. Raises ValueError for a plan where nothing is measured."""
    if device.type == "cuda":
        return MeasuredKernels(device, Cuda(device), Plan() if plan is None else plan)
    if plan is not None:
        raise ValueError(f"plan must be None on {device}: only on CUDA convs are measured")
    return CpuKernels(device) if device.type == "cpu" else NoKernels(device)
