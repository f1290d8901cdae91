# SPDX-License-Identifier: BSD-3-Clause
"""What a conv may run on a GPU: the plain one, and a registry of those that may be faster.

A candidate computes all that its spec names: conv, bias, residual, ReLU, max-pooling. It is let in
at a shape only where it agrees with float64 as the plain one does, and runs only where it was
measured to be the fastest (choose.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import env
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.plan import PLAIN

Conv = Callable[..., Tensor]  # of (x) or (x, residual)


class Unsuitable(Exception):
    """Why a candidate does not serve a conv; the plan keeps the sentence."""


@dataclass(frozen=True)
class Candidate:
    """A way to run convs.

    make: from (spec, weight, bias) to the function of (x) or (x, residual), which gives a new
    tensor, or writes into the residual where ``spec.inplace`` allows it. It raises Unsuitable, or
    anything else, where it does not serve the conv. weight: (C_out, C_in / groups, kH, kW) in the
    dtype of x, in x's memory format. bias: (C_out,) in float32 (float64 for float64), or None.
    devices: types of the devices it runs on. fits: whether it is for convs of this kind at all;
    where not, no plan mentions it.
    """

    name: str
    make: Callable[[ConvSpec, Tensor, Tensor | None], Conv]
    devices: tuple[str, ...] = ("cuda",)
    fits: Callable[[ConvSpec], bool] = lambda spec: True


_registry: dict[str, Candidate] = {}
_lock = threading.Lock()


def register(candidate: Candidate) -> None:
    """Let a candidate be tried for every conv from here on; ValueError if the name is taken.

    Plan entries that do not name it are measured anew when they are next met.
    """
    with _lock:
        if candidate.name == PLAIN or candidate.name in _registry:
            raise ValueError(f"name {candidate.name!r} is taken by another candidate")
        _registry[candidate.name] = candidate


def unregister(name: str) -> None:
    """Take a candidate out; modules that chose it go on with it. KeyError if there is none."""
    with _lock:
        del _registry[name]


def registered(device: str, spec: ConvSpec) -> list[Candidate]:
    """Candidates for a conv beside the plain one, in the order they were registered.

    device: the type of its device.
    """
    with _lock:
        known = list(_registry.values())
    return [c for c in known if device in c.devices and c.fits(spec)]


def pooled(spec: ConvSpec, conv: Conv) -> Conv:
    """The conv with its max-pooling after it, where the spec has one."""
    if not spec.max_pool:
        return conv
    return lambda *inputs: F.max_pool2d(conv(*inputs), 3, 2, 1)


def _settings(spec: ConvSpec) -> tuple[list[int], list[int], list[int], int]:
    return spec.stride, spec.padding, spec.dilation, spec.groups


def plain(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
    """F.conv2d, then sum and ReLU in place: what always runs, and what others are held to."""
    rest = (weight, None if bias is None else bias.to(weight.dtype), *_settings(spec))

    def conv(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, *rest)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if spec.relu else y

    return pooled(spec, conv)


# ---- with our kernels after the conv -------------------------------------------------------------
def _need_kernels(weight: Tensor) -> None:
    device = weight.device
    why = env.why_unavailable(device.type)
    if not why and device.type == "cuda":
        why = env.why_not_card(device.index or 0)
    if why:
        raise Unsuitable(why)


def _conv_add_relu(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
    """conv with bias, then our add_relu."""
    _need_kernels(weight)
    rest = (weight, None if bias is None else bias.to(weight.dtype), *_settings(spec))
    add_relu = torch.ops.resnet_fast.add_relu_forward.default

    def conv(x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = add_relu(F.conv2d(x, *rest), residual, False)[0]
        return y

    return pooled(spec, conv)


def _conv_apply(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
    """conv without bias, then bias, sum and ReLU in our one pass of batch norm.

    PyTorch adds the bias of cuDNN's convs in a pass of its own; here it costs nothing more.
    """
    if bias is None:
        raise Unsuitable("there is no bias to add")
    _need_kernels(weight)
    rest = (weight, None, *_settings(spec))
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
    apply = torch.ops.resnet_fast.batch_norm_act_forward.default
    relu = spec.relu

    def conv(x: Tensor, residual: Tensor | None = None) -> Tensor:
        # (y - 0) / sqrt(1 + 0) * 1 + bias; nothing is written to the statistics in eval mode.
        done = apply(
            F.conv2d(x, *rest), ones, bias, residual, zeros, ones, False, 0.0, 0.0, relu, False
        )
        y: Tensor = done[0]
        return y

    return pooled(spec, conv)


# ---- cuDNN's fused convs -------------------------------------------------------------------------
def _cudnn(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
    """aten::cudnn_convolution_relu and _add_relu: private operators, so each may be missing."""
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        raise Unsuitable("cuDNN is missing or switched off")
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        raise Unsuitable("deterministic algorithms are asked for, which its fused convs ignore")
    name = "cudnn_convolution_add_relu" if spec.residual else "cudnn_convolution_relu"
    found = getattr(torch.ops.aten, name, None)
    if found is None:
        raise Unsuitable(f"this PyTorch has no aten::{name}")
    op = found.default
    # Without a bias PyTorch would fill one with zeros at each call.
    shift = weight.new_zeros(len(weight)) if bias is None else bias.to(weight.dtype)
    rest = (shift, *_settings(spec))

    def conv(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = op(x, weight, *rest) if residual is None else op(x, weight, residual, 1, *rest)
        return y

    return pooled(spec, conv)


ADD_RELU, APPLY, CUDNN = "conv, add_relu", "conv, bias + add + relu in one", "cuDNN, fused"
register(Candidate(CUDNN, _cudnn, fits=lambda spec: spec.relu))
register(Candidate(APPLY, _conv_apply, fits=lambda spec: spec.residual or spec.relu))
register(Candidate(ADD_RELU, _conv_add_relu, fits=lambda spec: spec.residual and spec.relu))
