# SPDX-License-Identifier: BSD-3-Clause
"""What each process of test_u29_many_processes.py does; float64, small ResNets, digits."""

from __future__ import annotations

import copy
from typing import Any

import shims

shims.import_torchvision()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from twins import Results, image, reasons  # noqa: E402
from ways import batches, fast_twin, gradients, make, small_bottleneck, state, tv  # noqa: E402

import resnet_fast as rf  # noqa: E402

STEPS = 3
PARTS = (slice(0, 5), slice(5, 8))  # of a batch of 8: uneven


def step_sgd(model: nn.Module, losses: list[Tensor]) -> Results:
    """Steps of SGD; losses[i] is a function of (model, i). Gradients and the state after them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for loss in losses:
        optimizer.zero_grad()
        loss(model).backward()  # type: ignore[operator]
        optimizer.step()
    return {k.removeprefix("module."): t for k, t in (gradients(model) | state(model)).items()}


def one_process() -> Results:
    data = list(batches(STEPS))
    losses: Any = [
        lambda model, x=x, y=y: F.cross_entropy(model(x), y, reduction="sum") / 8 for x, y in data
    ]
    return step_sgd(make(small_bottleneck, tv), losses)


def parts_of(rank: int) -> Any:
    """This process's share of each loss: DDP averages gradients over the processes."""
    return [
        lambda model, x=x[PARTS[rank]], y=y[PARTS[rank]]: (
            F.cross_entropy(model(x), y, reduction="sum") / 8 * dist.get_world_size()
        )
        for x, y in batches(STEPS)
    ]


def build(order: str) -> nn.Module:
    """A model under DDP with synchronised norms.

    NOTE: DDP refuses nn.SyncBatchNorm on the CPU when it wraps, for PyTorch's own has no CPU
    kernels. So it wraps first here; on a GPU any order does.
    """
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    untouched = make(small_bottleneck, tv)
    ours = order == "ours"
    ddp = DistributedDataParallel(
        fast_twin("ours", small_bottleneck, untouched) if ours else untouched
    )
    model: nn.Module = convert(ddp if order == "convert, accelerate" else rf.accelerate(ddp))
    assert sum(type(m) is nn.SyncBatchNorm for m in model.modules()) > 15
    return rf.accelerate(model)


def synchronised(rank: int, order: str) -> dict[str, Any]:
    model = build(order)
    results: dict[str, Any] = {}
    slow = reasons(lambda: results.update(step_sgd(model, parts_of(rank))))
    return results | {"slow": slow}


def synchronised_bfloat16(rank: int) -> Results:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make(small_bottleneck, tv)).bfloat16()
    rf.accelerate(model)
    for x, _ in batches(2):
        model(x[PARTS[rank]].bfloat16()).square().mean().backward()
    return {name: t.clone() for name, t in model.named_buffers()}


def groups(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (ours, truth) of single norms."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    x, weight = image(4, 6, 3, 3, seed=rank + 1), image(6, seed=9)
    sync, plain = nn.SyncBatchNorm(6, process_group=alone).double(), nn.BatchNorm2d(6).double()
    results = {"alone": (rf.blocks.bn_act(sync, x), F.relu(plain(x)))}
    results["alone, mean"] = (sync.running_mean, plain.running_mean)

    both = nn.SyncBatchNorm(6, momentum=None).double()
    both.weight.data.copy_(weight)
    reference = copy.deepcopy(plain)
    reference.weight.data.copy_(weight)
    reference.reset_running_stats()
    reference.momentum = None
    mine = x if rank == 0 else x[:0]  # process 1 has nothing
    mine = mine.clone().requires_grad_()
    y = rf.blocks.bn_act(both, mine, residual=mine)
    y.square().sum().backward()
    other = image(4, 6, 3, 3, seed=1).requires_grad_()
    want = F.relu(reference(other) + other)
    want.square().sum().backward()
    here = slice(0, 4 if rank == 0 else 0)
    results["y"] = (y.detach(), want.detach()[here])
    results["x.grad"] = (mine.grad, other.grad[here])
    if rank == 0:
        results["weight.grad"] = (both.weight.grad, reference.weight.grad)
    results["running_var"] = (both.running_var, reference.running_var)
    results["eval"] = (rf.blocks.bn_act(both.eval(), x), F.relu(reference.eval()(x)))
    return {k: (a.detach(), b.detach()) for k, (a, b) in results.items()}


def local_norms(rank: int) -> tuple[Results, Results]:
    untouched = make(small_bottleneck, tv)
    fast, plain = (
        step_sgd(DistributedDataParallel(model), parts_of(rank))
        for model in (rf.accelerate(copy.deepcopy(untouched)), untouched)
    )
    return fast, plain


def fully_sharded(rank: int) -> tuple[Results, Results]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    untouched = make(small_bottleneck, tv)
    results = []
    for model in (rf.accelerate(copy.deepcopy(untouched)), untouched):
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4, model):
            fully_shard(layer)
        after = step_sgd(model, parts_of(rank))
        results.append(
            {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in after.items()}
        )
    return results[0], results[1]
