# SPDX-License-Identifier: BSD-3-Clause
"""batch_norm_act with the statistics of all processes of a group: what nn.SyncBatchNorm asks for.

One collective forward (all_gather of count, mean and squared deviations, merged by Chan's rule, so
batches may be uneven or empty) and one backward (all_reduce of two sums a channel). Any backend of
torch.distributed that takes the tensors: gloo on the CPU, nccl on GPUs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet_fast import _checks, _phases, _plain, dispatch
from resnet_fast.layout import accumulate_dtype

_ops = torch.ops.resnet_fast


def group_of(bn: nn.SyncBatchNorm) -> Any:
    """The group that a call of bn takes its statistics of; None where it is this process alone."""
    if not (bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    group: Any,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """functional.batch_norm_act in training mode, over the batches of all processes of `group`.

    A collective call: every process of the group makes it, with the same channels; x may differ in
    all other dimensions and be empty. Gradients of weight and bias are this process's share, as
    DistributedDataParallel expects. Errors as functional.batch_norm_act's, before anything is sent.
    """
    _checks.batch_norm_act(x, weight, bias, running_mean, running_var, residual, True, activation)
    _checks.numbers(True, momentum, eps)
    impl = dispatch.choose("batch_norm_act", x, residual, weight, bias, running_mean, running_var)
    if residual is not None and residual.shape != x.shape:
        residual = residual.expand_as(x)
    out = _SyncBatchNormAct.apply(  # type: ignore[no-untyped-call]
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        group,
        momentum,
        eps,
        activation == "relu",
        impl == "reference",
    )
    return cast(Tensor, out)


def gather_statistics(
    mean: Tensor, m2: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, count) of all processes' values, float64; mean, m2: of this one's."""
    mine = torch.cat((mean, m2, mean.new_tensor([count])))
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group)
    stacked = torch.stack(all_of_them)
    means, m2s, counts = stacked.split((len(mean), len(mean), 1), 1)
    total = counts.sum()
    divisor = total.clamp(min=1)
    mean = (counts * means).sum(0) / divisor
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return mean, m2 / divisor, total


class _SyncBatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        group: Any,
        momentum: float,
        eps: float,
        relu: bool,
        plain: bool,
    ) -> Tensor:
        statistics = _phases.batch_norm_statistics if plain else _ops.batch_norm_statistics
        apply = _plain.batch_norm_act_forward if plain else _ops.batch_norm_act_forward
        count = x.numel() // max(x.size(1), 1)
        mean, m2 = statistics(x)
        mean, var, total = gather_statistics(mean, m2, count, group)
        ctx.count = float(total)
        acc = accumulate_dtype(x.dtype)
        batch = mean.to(acc), var.to(acc)
        save_mask = relu and residual is not None
        y, saved, invstd, mask = apply(
            x, weight, bias, residual, *batch, False, 0.0, eps, relu, save_mask
        )
        if ctx.count > 0:
            unbiased = var * (ctx.count / max(ctx.count - 1, 1))
            for running, value in ((running_mean, mean), (running_var, unbiased)):
                _plain.update_running(running, value, momentum)
        ctx.save_for_backward(x, weight, bias, saved, invstd, mask if save_mask else None)
        ctx.group, ctx.relu, ctx.plain = group, relu, plain
        return cast(Tensor, y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, mask = ctx.saved_tensors
        from_ = _phases if ctx.plain else _ops
        masked, total, dot = from_.batch_norm_act_backward_reduce(
            grad, x, mean, invstd, weight, bias, mask, ctx.relu
        )
        masked = masked if ctx.relu else grad
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        dweight = (dot * invstd).to(weight.dtype) if want_weight else None
        dbias = total.to(bias.dtype) if want_bias else None
        dx = None
        if want_x:
            both = torch.cat((total, dot))
            dist.all_reduce(both, group=ctx.group)
            dx = from_.batch_norm_act_backward_apply(
                masked, x, mean, invstd, weight, *both.split(len(dot)), max(ctx.count, 1.0)
            )
        return dx, dweight, dbias, masked if want_residual else None, *(None,) * 7
