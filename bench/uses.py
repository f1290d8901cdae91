# SPDX-License-Identifier: BSD-3-Clause
"""A small real step of each way of use (docs/uses.md), accelerated against the untouched model.

Only rows of docs/uses.md where a speed says something. Each pair starts from the same values and
must give the same result before it is timed; the two are timed in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fast as rf

from .job import Emit, Job, Progress, check_equal
from .models import on_reference, plain_resnet
from .overhead import emit_rows
from .timing import measure

Step = Callable[[nn.Module, Tensor], Tensor]


def _loss(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


# ---- models --------------------------------------------------------------------------------------
def _same(model: nn.Module) -> nn.Module:
    return model


def _frozen(model: nn.Module) -> nn.Module:
    """Everything but the head."""
    for parameter in model.requires_grad_(False).fc.parameters():
        parameter.requires_grad_()
    return model


def _frozen_norms(model: nn.Module) -> nn.Module:
    """Norms that stay in eval mode while the model trains."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _cifar(model: nn.Module) -> nn.Module:
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


class Checkpointed(nn.Module):
    """A module whose inside is calculated again in the backward."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.inside, x, use_reentrant=False))


def _checkpointed(model: nn.Module) -> nn.Module:
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, name, Checkpointed(getattr(model, name)))
    return model


def _blocks(_: nn.Module) -> nn.Module:
    """Somebody's own network: conv, norm and ReLU four times."""
    widths = (3, 32, 64, 64, 128)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in pairwise(widths)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], 10),
    )


def _own_blocks(plain: nn.Module, _: Tensor) -> nn.Module:
    """The same network of rf.nn.ConvBNAct2d, with the same values."""
    modules = list(cast(nn.Sequential, plain))
    made = []
    for block in modules[:4]:
        conv = cast(nn.Conv2d, cast(nn.Sequential, block)[0])
        made.append(rf.nn.ConvBNAct2d(conv.in_channels, conv.out_channels, 3))
    ours = nn.Sequential(*made, *copy.deepcopy(modules[4:]))
    values = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    for mine, theirs in values:
        mine.copy_(theirs)
    return ours


def _accelerated(plain: nn.Module, _: Tensor) -> nn.Module:
    return rf.accelerate(copy.deepcopy(plain))


def _folded(plain: nn.Module, images: Tensor) -> nn.Module:
    return cast(nn.Module, rf.optimize_for_inference(plain.eval(), images))


# ---- steps ---------------------------------------------------------------------------------------
def train(model: nn.Module, images: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = _loss(model(images))
    loss.backward()
    return loss.detach()


def train_in_bfloat16(model: nn.Module, images: Tensor) -> Tensor:
    """The same under autocast."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    loss = _loss(out.float())
    loss.backward()
    return loss.detach()


def input_gradient(model: nn.Module, images: Tensor) -> Tensor:
    """A saliency map."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).amax(1).sum(), images)
    return gradient


def siamese(model: nn.Module, images: Tensor) -> Tensor:
    """One model, two calls, one backward."""
    model.zero_grad(set_to_none=True)
    loss = F.cosine_similarity(model(images), model(images.flip(3))).mean()
    loss.backward()
    return loss.detach()


def gradient_penalty(model: nn.Module, images: Tensor) -> Tensor:
    """The gradient of a gradient's norm."""
    model.zero_grad(set_to_none=True)
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
    penalty = gradient.pow(2).sum((1, 2, 3)).add(1e-12).sqrt().mean()
    penalty.backward()
    return penalty.detach()


def infer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(images))


class Use(NamedTuple):
    """One row of docs/uses.md as it is timed: what is done to the model, how, and the step."""

    row: str
    what: str
    step: Step
    images: tuple[int, int] = (8, 112)  # how many, of how many pixels a side
    change: Callable[[nn.Module], nn.Module] = _same
    fast: Callable[[nn.Module, Tensor], nn.Module] = _accelerated
    training: bool = True
    dtype: str = "float32"


USES = (
    Use("U02", "training a new head on a frozen backbone", train, change=_frozen),
    Use("U07", "gradient of the input, eval mode", input_gradient, training=False),
    Use("U11", "training with a CIFAR stem", train, (32, 32), _cifar),
    Use("U12", "training with frozen batch norms", train, change=_frozen_norms),
    Use("U15", "training a Siamese pair", siamese, (4, 112)),
    Use("U22", "training rf.nn.ConvBNAct2d blocks", train, (8, 64), _blocks, _own_blocks),
    Use("U23", "gradient penalty, eval mode", gradient_penalty, (4, 64), training=False),
    Use("U27", "training under bfloat16 autocast", train_in_bfloat16, dtype="bfloat16"),
    Use("U30", "inference, folded", infer, (1, 224), fast=_folded, training=False),
    Use("U32", "training with checkpointed layers", train, change=_checkpointed),
)


def rivals_of(use: Use, quick: bool) -> tuple[dict[str, Callable[[], Tensor]], str, list[int]]:
    """Two calls of a step that do the same work; where the model is from; the images' shape."""
    base, source = plain_resnet("resnet18")
    count, pixels = (2, 64) if quick else use.images
    images = torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    plain = use.change(base.train(use.training))
    ours = use.fast(plain, images)
    is_ours = source == "resnet_fast"
    rivals = {
        "eager": on_reference(lambda: use.step(plain, images), is_ours),
        "ours": lambda: use.step(ours, images),
    }
    dtype = getattr(torch, use.dtype)
    check_equal(use.row, {"result": rivals["ours"]()}, {"result": rivals["eager"]()}, dtype)
    return rivals, source, list(images.shape)


def run_uses(job: Job, emit: Emit, progress: Progress) -> None:
    """Time every way of use that has a speed, and emit the rows."""
    limits = {"budget": 0.2, "max_rounds": 3} if job.quick else {"budget": 15, "max_rounds": 200}
    uses = USES[:2] if job.quick else USES
    for index, use in enumerate(uses):
        progress(index, len(uses), f"{use.row} {use.what}")
        torch.manual_seed(0)
        rivals, source, shape = rivals_of(use, job.quick)
        row: dict[str, Any] = {"kind": "use", "name": "resnet18", "row": use.row, "mode": use.what}
        if use.change is _blocks:
            row["name"] = "four blocks"
        facts = {"shape": shape, "dtype": use.dtype, "layout": "nchw", "source": source}
        emit_rows(row | facts, measure(rivals, **limits), emit)
    progress(len(uses), len(uses), "uses")
