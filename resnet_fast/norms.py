# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm modules as the fused op: which can be, and what each one's own forward would do.

Known are nn.BatchNorm2d, nn.SyncBatchNorm, and frozen norms (torchvision's FrozenBatchNorm2d;
register_frozen_norm).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from resnet_fast import functional, synchronised
from resnet_fast._ready import (
    State,
    frozen_norm,
    plain_module,
    plain_norm,
    plain_state,
    plain_tensor,
    prune_now,
    why_not_context,
    why_not_module,
    why_not_norm,
    why_not_state,
)


def fusable(bn: nn.Module, x: Tensor) -> State | None:
    """bn's tensors if the fused op can stand for bn(x), or None."""
    if plain_module(bn, nn.BatchNorm2d):  # said first of the common norm, to ask it once
        return plain_state(bn) if plain_tensor(x) else None
    if not (plain_tensor(x) and plain_norm(bn)):
        return None
    if type(bn) is nn.SyncBatchNorm and torch.compiler.is_compiling():
        return None  # its collectives are the compiler's to place
    if bn._forward_pre_hooks:
        prune_now(bn, x)
    state = plain_state(bn)
    return None if state is None or (frozen_norm(bn) and _why_not_frozen(state, x)) else state


def fused(
    bn: nn.Module, state: State, x: Tensor, residual: Tensor | None, activation: str | None
) -> Tensor:
    """bn(x), then + residual, then the activation; `state` is what fusable() gave."""
    if type(bn) is nn.BatchNorm2d or not frozen_norm(bn):
        return batch_norm(cast(nn.BatchNorm2d, bn), state, x, residual, activation)
    eps = cast(float, bn.eps)
    return functional.batch_norm_act(x, *state, residual=residual, eps=eps, activation=activation)


def batch_norm(
    bn: nn.BatchNorm2d | nn.SyncBatchNorm,
    state: State,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """nn.BatchNorm2d.forward, or nn.SyncBatchNorm's, with a residual and an activation."""
    bn._check_input_dim(x)
    group = synchronised.group_of(bn) if isinstance(bn, nn.SyncBatchNorm) else None
    weight, bias, mean, var = state
    from_batch = bn.training or mean is None
    counter, momentum = None, bn.momentum
    if bn.training:
        if bn.track_running_stats:
            # Read past nn.Module.__getattr__, as _ready.plain_state() reads the others.
            counter = bn._buffers.get("num_batches_tracked")
            if counter is None or "num_batches_tracked" in bn.__dict__:
                counter = bn.num_batches_tracked
        else:
            mean = var = None
    # NOTE: counted before the op, as nn.BatchNorm2d does: checkpoint(use_reentrant=False) leaves
    # the last op of a recomputation by an exception. A refused call takes the count back.
    if counter is not None:
        counter.add_(1)
    if momentum is None:  # the cumulative average
        momentum = 0.0 if counter is None else 1.0 / float(counter)
    eps = bn.eps
    try:
        if group is not None:
            return synchronised.batch_norm_act(
                x,
                weight,
                bias,
                mean,
                var,
                group,
                residual=residual,
                momentum=momentum,
                eps=eps,
                activation=activation,
            )
        return functional.batch_norm_act(
            x,
            weight,
            bias,
            mean,
            var,
            residual=residual,
            training=from_batch,
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
    except (ValueError, TypeError, RuntimeError):
        if counter is not None:
            counter.sub_(1)
        raise


def why_not_fused(bn: nn.Module, x: Tensor, relu: object = None) -> str:
    """Why bn(x), and relu if one is given, cannot be the fused op."""
    why = why_not_context(x) or why_not_norm("the norm", bn)
    if not why and relu is not None:
        why = why_not_module("relu", relu, nn.ReLU)
    why = why or why_not_state("the norm", bn)
    state = plain_state(bn) if not why and frozen_norm(bn) else None
    return why if state is None else _why_not_frozen(state, x)


def _why_not_frozen(state: State, x: Tensor) -> str:
    """Why x times a scale and plus a shift, with PyTorch's promotion, is not the fused op."""
    if x.dim() != 4:
        return f"the norm is frozen and x has {x.dim()} dimensions, not 4"
    for t in state:
        if t is None or t.dtype != x.dtype:
            return f"the norm is frozen in {None if t is None else t.dtype} and x is {x.dtype}"
    return ""
