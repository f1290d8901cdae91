# SPDX-License-Identifier: BSD-3-Clause
"""The fused forwards of residual blocks, for our own models and for adapters of other libraries'.

Each takes a block with its ordinary submodules (conv1, bn1, relu, ...) and does what the plain
forward does, with BatchNorm, the residual sum and ReLU as one op. Convolutions are called as
modules unless they are plain ones, so whatever is in their place works. Batch norms and ReLUs are
stood in for only while that cannot be noticed (_ready.py); otherwise they are called, the reason is
recorded, and where no part of a block can be fused it runs its plain forward, `original`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast import _at_once, convolution, functional
from resnet_fast._max_pool import max_pool
from resnet_fast._ready import (
    block_parts,
    fell_back,
    legacy_hook,
    plain_context,
    plain_conv,
    plain_max_pool,
    plain_module,
    plain_norm,
    plain_tensor,
    why_not_module,
    why_not_norm,
)
from resnet_fast.gates import fits, scale_of
from resnet_fast.norms import fusable, fused, why_not_fused

STEM = ("bn1",)
BASIC = ("bn1", "bn2")
BOTTLENECK = ("bn1", "bn2", "bn3")


# ---- one batch norm ------------------------------------------------------------------------------
def bn_act(
    bn: nn.Module,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """What ``bn(x)``, then ``+ residual``, then ReLU do, as one op where bn is plain.

    bn: any module of one tensor. Exactly an nn.BatchNorm2d (or another norm of norms.py) without
    hooks is fused, with the same changes of running_mean, running_var and num_batches_tracked as
    calling it; anything else is called, and the reason recorded. x: (N, C, H, W). residual: of x's
    shape, or broadcastable to it, or None. activation: "relu" or None. Returns (N, C, H, W) in x's
    layout.

    Raises ValueError for another activation, and whatever bn raises.
    """
    if activation not in ("relu", None):
        raise ValueError(f'activation must be "relu" or None; got {activation!r}')
    state = fusable(bn, x) if plain_context(x) else None
    if state is not None:
        return fused(bn, state, x, residual, activation)
    fell_back("batch_norm_act", x, why_not_fused(bn, x))
    y = cast(Tensor, bn(x))
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


# ---- one convolution -----------------------------------------------------------------------------
def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by the kernels of convolution.py where conv is a plain nn.Conv2d without bias.

    conv: any module of one tensor. x: (N, C, H, W). For forwards that have found, as block_parts()
    does, that nothing watches the calls of all modules. Raises whatever conv raises.
    """
    if (
        type(x) is not Tensor
        or x.numel() < convolution.FROM_NUMEL
        or torch.compiler.is_compiling()
        or not plain_conv(conv)
    ):
        return cast(Tensor, conv(x))
    plain = cast(nn.Conv2d, conv)
    weight = plain._parameters["weight"]
    return convolution.conv2d(
        x, cast(Tensor, weight), plain.stride, plain.padding, plain.dilation, plain.groups
    )


# ---- steps of a block ----------------------------------------------------------------------------
def norm_relu(bn: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """relu(bn(x)). Asked again here: a hook on the conv before may have changed bn or relu."""
    state = fusable(bn, x)
    if state is not None and plain_module(relu, nn.ReLU):
        return fused(bn, state, x, None, "relu")
    fell_back("batch_norm_act", x, why_not_fused(bn, x, relu))
    return cast(Tensor, relu(bn(x)))


def norm_act(bn: nn.Module, act: nn.Module, x: Tensor, between: nn.Module | None = None) -> Tensor:
    """act(between(bn(x))) for any modules; between is passed by where it is a plain nn.Identity.

    One op where act is a plain nn.ReLU; the norm alone is the fused op before anything else.
    """
    if between is not None and not plain_module(between, nn.Identity):
        return cast(Tensor, act(between(bn_act(bn, x, activation=None))))
    if plain_module(act, nn.ReLU):
        return bn_act(bn, x)
    return cast(Tensor, act(bn_act(bn, x, activation=None)))


def gated_join(
    block: Any, bn: nn.Module, act: nn.Module, out: Tensor, x: Tensor, gates: Sequence[nn.Module]
) -> Tensor:
    """act(gates(bn(out)) + shortcut of x); gates: attention, stochastic depth, run in order.

    With a gate the norm is one op, and the sum with ReLU another, which takes the product of the
    last gate in where that is all it does.
    """
    relu = plain_module(act, nn.ReLU)
    if not gates and relu:
        return _join(block, bn, act, out, x)
    out = bn_act(bn, out, activation=None)
    scale = None
    for gate in gates:
        scale = scale_of(gate, out) if relu and gate is gates[-1] else None
        if scale is None:
            out = gate(out)
        elif not fits(scale, out):
            out, scale = out * scale, None
    identity = shortcut(block.downsample, x)
    # NOTE: a hook on the last gate may have kept its output, which the plain forward adds into.
    hooked = any(gate._forward_hooks or gate._backward_hooks for gate in gates)
    if relu and not hooked and not why_not_add(out, identity):
        return functional.add_relu(out, identity, scale=scale)
    out = out if scale is None else out * scale
    out += identity
    return cast(Tensor, act(out))


def _join(block: Any, bn: nn.Module, relu: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """relu(bn(out) + shortcut of x)."""
    if not (plain_norm(bn) and plain_module(relu, nn.ReLU)):
        fell_back("batch_norm_act", out, why_not_fused(bn, out, relu))
        return _join_in_steps(block, bn, relu, out, x)
    downsample: nn.Module | None = block.downsample
    if downsample is not None and _shares_state(downsample, bn):
        fell_back("batch_norm_act", out, "downsample holds the statistics of the block's last norm")
        out = bn(out)
        out += downsample(x)
        return cast(Tensor, relu(out))
    return _add(bn, relu, out, shortcut(downsample, x))


def _add(bn: nn.Module, relu: nn.Module, out: Tensor, identity: Tensor) -> Tensor:
    """relu(bn(out) + identity)."""
    y = fused_join(bn, relu, out, identity)
    if y is not None:
        return y
    out = bn(out)
    out += identity  # in place, as the plain forward: it decides the dtype and what may broadcast
    return cast(Tensor, relu(out))


def _norm_in_steps(bn: nn.Module, x: Tensor) -> Tensor:
    """bn(x): the fused op, or bn called where that can be noticed, which was recorded before."""
    state = fusable(bn, x)
    return cast(Tensor, bn(x)) if state is None else fused(bn, state, x, None, None)


def _join_in_steps(block: Any, bn: nn.Module, act: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """act(bn(out) + shortcut of x) in the order of the plain forward, where bn or act is hooked."""
    out = _norm_in_steps(bn, out)
    # In place, as the plain forward: a hook on bn or act may have kept what it was shown.
    out += shortcut(block.downsample, x)
    return cast(Tensor, act(out))


def _in_steps(block: Any, norms: tuple[str, ...], x: Tensor) -> Tensor:
    """The forward of a block of which a norm or the ReLU is not plain: the others stay fused."""
    act, out = block.relu, x
    *before, last = norms
    for i, name in enumerate(before, 1):
        out = convolve(getattr(block, f"conv{i}"), out)
        bn = getattr(block, name)
        state = fusable(bn, out) if plain_module(act, nn.ReLU) else None
        if state is not None:
            out = fused(bn, state, out, None, "relu")
        else:
            out = act(_norm_in_steps(bn, out))
    out = convolve(getattr(block, f"conv{len(norms)}"), out)
    bn = getattr(block, last)
    plain = plain_norm(bn) and plain_module(act, nn.ReLU)
    return (_join if plain else _join_in_steps)(block, bn, act, out, x)


def _has_parts(block: nn.Module, norms: tuple[str, ...], x: object) -> bool:
    """True if a block that is not ready as a whole may be fused in part."""
    return (
        plain_context(x)
        and not legacy_hook(block)
        and all(isinstance(getattr(block, name, None), nn.Module) for name in (*norms, "relu"))
    )


def fused_join(bn: nn.Module, relu: nn.Module, out: Tensor, identity: Tensor) -> Tensor | None:
    """relu(bn(out) + identity) as one op; None, and the reason recorded, if it cannot be one."""
    why = why_not_add(out, identity)
    state = fusable(bn, out) if not why and plain_module(relu, nn.ReLU) else None
    if state is not None:
        return fused(bn, state, out, identity, "relu")
    fell_back("batch_norm_act", out, why or why_not_fused(bn, out, relu))
    return None


def why_not_add(out: Tensor, identity: Tensor) -> str:
    """Why the sum of a branch and its shortcut is not the plain one of equals; "" if it is."""
    if not plain_tensor(identity):
        return f"the shortcut is a {type(identity).__name__}, not a plain torch.Tensor"
    if identity.shape != out.shape:
        return "the shortcut has another shape than the branch"
    if identity.dtype != out.dtype or identity.device != out.device:
        return "the shortcut has another dtype or device than the branch"
    return ""


def _shares_state(m: nn.Module, bn: nn.Module) -> bool:
    """True if m is or holds bn, or a module with the very running statistics of bn.

    The plain forward runs the last norm before the shortcut, the fused one after it. Only where
    both move the same running statistics could that be told: one norm for several convolutions.
    """
    mean = bn._buffers.get("running_mean")
    if m is bn or (mean is not None and m._buffers.get("running_mean") is mean):
        return True
    children = m._modules
    return bool(children) and any(
        child is not None and _shares_state(child, bn) for child in children.values()
    )


def shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """downsample(x), with the norm that ends a plain Sequential as the fused op; x for None.

    x: (N, C, H, W). Raises whatever downsample raises.
    """
    if downsample is None:
        return x
    if not (downsample._modules and plain_context(x)):
        return cast(Tensor, downsample(x))
    *head, last = cast("list[nn.Module]", downsample._modules.values())
    if not (plain_module(downsample, nn.Sequential) and plain_norm(last)):
        if isinstance(downsample, nn.Sequential) and isinstance(last, _BatchNorm):
            why = why_not_module("downsample", downsample, nn.Sequential)
            why = why or why_not_norm("the end of downsample", last)
            fell_back("batch_norm_act", x, why)
        return cast(Tensor, downsample(x))
    for module in head:
        x = convolve(module, x)
    state = fusable(last, x)
    if state is not None:
        return fused(last, state, x, None, None)
    fell_back("batch_norm_act", x, why_not_fused(last, x))
    return cast(Tensor, last(x))


# ---- blocks --------------------------------------------------------------------------------------
def basic_block(block: Any, x: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of He et al.'s two-conv block (torchvision's BasicBlock) on x (N, C, H, W).

    block: a module with conv1, bn1, relu, conv2, bn2 and downsample (a module or None). original:
    its plain forward, which runs instead where fusing could be noticed. Where only a norm or the
    ReLU is hooked or of another kind, that is called, and the rest stays fused.
    """
    y = _at_once.residual_block(block, _at_once.BASIC, x, _add)
    if y is not None:
        return y
    parts = block_parts(block, BASIC, x)
    if parts is None:
        return _in_steps(block, BASIC, x) if _has_parts(block, BASIC, x) else original(x)
    bn1, bn2, relu = parts
    out = norm_relu(bn1, relu, convolve(block.conv1, x))
    out = convolve(block.conv2, out)  # by this name, so that the activation before can be freed
    return _join(block, bn2, relu, out, x)


def bottleneck(block: Any, x: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of the three-conv block (torchvision's Bottleneck); see basic_block."""
    y = _at_once.residual_block(block, _at_once.BOTTLENECK, x, _add)
    if y is not None:
        return y
    parts = block_parts(block, BOTTLENECK, x)
    if parts is None:
        return _in_steps(block, BOTTLENECK, x) if _has_parts(block, BOTTLENECK, x) else original(x)
    bn1, bn2, bn3, relu = parts
    out = norm_relu(bn1, relu, convolve(block.conv1, x))
    out = norm_relu(bn2, relu, convolve(block.conv2, out))
    out = convolve(block.conv3, out)
    return _join(block, bn3, relu, out, x)


def preact_block(
    block: Any, norms: tuple[str, ...], x: Tensor, original: Callable[[Tensor], Tensor]
) -> Tensor:
    """The forward of a pre-activation block: relu(bn(.)) before each conv, then the plain sum.

    block: a module with relu, downsample (or None), and conv1, conv2, ... after the norms named
    `norms` (BASIC or BOTTLENECK). The shortcut of a block with a downsample starts at the first
    activation, as in He et al. 2016. x: (N, C, H, W).
    """
    parts = block_parts(block, norms, x)
    if parts is None:
        return original(x)
    *bns, relu = parts
    downsample = block.downsample
    out = norm_relu(bns[0], relu, x)
    identity = x if downsample is None else convolve(downsample, out)
    out = convolve(block.conv1, out)
    for i, bn in enumerate(bns[1:], 2):
        out = convolve(getattr(block, f"conv{i}"), norm_relu(bn, relu, out))
    out += identity
    return out


def stem(model: Any, x: Tensor, norms: tuple[str, ...] = STEM) -> Tensor:
    """relu(bn1(x)) of a whole model, x (N, C, H, W) being what its first convolution gave.

    model: a module with relu and the norm named in `norms`; they are called as modules where fusing
    could be noticed.
    """
    parts = block_parts(model, norms, x)
    if parts is None:
        bn, relu = getattr(model, norms[0]), model.relu
        fuse_norm = _has_parts(model, norms, x)  # where it is the ReLU that is called
        return cast(Tensor, relu(_norm_in_steps(bn, x) if fuse_norm else bn(x)))
    bn, relu = parts
    return norm_relu(bn, relu, x)


def convolve_alone(conv: nn.Module, x: Tensor) -> Tensor:
    """convolve(conv, x) where no block has asked whether anything watches."""
    return convolve(conv, x) if plain_context(x) else cast(Tensor, conv(x))


def stem_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(x), keeping less for the backward where pool is a plain nn.MaxPool2d."""
    if plain_context(x) and plain_module(pool, nn.MaxPool2d) and plain_max_pool():
        plain = cast(nn.MaxPool2d, pool)
        if not plain.return_indices:
            return max_pool(plain, x)
    return cast(Tensor, pool(x))
