# SPDX-License-Identifier: BSD-3-Clause
"""U25: pipelines, head and tail, stitched models, layers frozen in turn, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from twins import Results
from ways import Way, batches, digits, gradients, photos, small_basic, small_bottleneck, state

WAY = Way("U25", "split at blocks")


def stages(model: Any) -> list[nn.Module]:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    head = nn.Sequential(model.avgpool, nn.Flatten(), model.fc)
    return [stem, model.layer1, model.layer2, model.layer3, model.layer4, head]


def pipeline(model: Any) -> Results:
    """GPipe by hand: two micro-batches through stages that see only tensors, gradients passed
    back from stage to stage."""
    images, labels = digits(8)
    parts = stages(model)
    for x, y in zip(images.split(4), labels.split(4), strict=True):
        kept: list[tuple[Tensor, Tensor]] = []
        out = x
        for part in parts:
            inputs = out.detach().requires_grad_()
            out = part(inputs)
            kept.append((inputs, out))
        (grad,) = torch.autograd.grad(F.cross_entropy(out, y), out, retain_graph=True)
        for inputs, outputs in reversed(kept):
            outputs.backward(grad)
            grad = inputs.grad
    return gradients(model) | state(model)


def checkpointed(reentrant: bool) -> Any:
    def use(model: Any) -> Results:
        images, labels = digits(8)
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
        for layer in (model.layer1, model.layer2):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        x = checkpoint_sequential([model.layer3, model.layer4], 2, x, use_reentrant=reentrant)
        loss = F.cross_entropy(model.fc(model.avgpool(x).flatten(1)), labels)
        loss.backward()
        return {"loss": loss.detach()} | gradients(model) | state(model)

    return use


def stitched(model: Any) -> Results:
    """SN-Net: the front of one network, a 1x1 convolution, the back of another."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    stitch = nn.Conv2d(128, 128, 1).double()
    front = nn.Sequential(*stages(model)[:3])
    back = nn.Sequential(*stages(other)[3:])
    y = back(stitch(front(photos())))
    y.square().mean().backward()
    return {"y": y.detach()} | gradients(front) | gradients(back) | gradients(stitch)


def frozen_in_turn(model: Any) -> Results:
    """Layer-wise training: one layer learns at a time, another is swapped for a copy of it."""
    for i, (images, labels) in enumerate(batches(3)):
        model.requires_grad_(False)
        layer = getattr(model, f"layer{i + 1}").requires_grad_(True)
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.01 * p.grad
                p.grad = None
        setattr(model, f"layer{i + 1}", copy.deepcopy(layer))
    return state(model)


def test_pipeline() -> None:
    # The stages hold the stem in a Sequential of their own, which nobody has accelerated.
    WAY.check(small_bottleneck, pipeline)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    WAY.check(small_basic, checkpointed(reentrant))


def test_stitching() -> None:
    WAY.check(small_basic, stitched)


def test_frozen_in_turn() -> None:
    WAY.check(small_basic, frozen_in_turn)
