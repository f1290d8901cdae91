# SPDX-License-Identifier: BSD-3-Clause
"""U15: one module, many calls before one backward: siamese encoders, SAM, time steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from twins import Results
from ways import Way, batches, digits, gradients, photos, small_basic, small_bottleneck, state

WAY = Way("U15", "one module, many calls")


def siamese(model: Any) -> Results:
    """Two pictures through one encoder, a contrastive loss over both."""
    x = photos()
    a, b = model(x), model(x.flip(3) + 0.1)
    similar = F.normalize(a) @ F.normalize(b).T
    loss = F.cross_entropy(similar * 10, torch.arange(len(x)))
    loss.backward()
    return {"loss": loss.detach()} | gradients(model) | state(model)


def sam(model: Any) -> Results:
    """Foret et al. 2021: the gradient at a perturbed point, two passes a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for images, labels in batches(2):
        F.cross_entropy(model(images), labels).backward()
        parameters = list(model.parameters())
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        steps = [0.05 * p.grad / norm for p in parameters]
        with torch.no_grad():
            for p, e in zip(parameters, steps, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p, e in zip(parameters, steps, strict=True):
                p.sub_(e)
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def time_steps(model: Any) -> Results:
    """One block applied again and again to its own output; then one backward (a spiking net's
    time steps): each call keeps its own mask and statistics."""
    block = model.layer2[0]
    block.downsample = None
    block.conv1.stride = (1, 1)
    block.conv1 = torch.nn.Conv2d(128, 128, 3, 1, 1, bias=False).double()
    torch.manual_seed(4)
    torch.nn.init.kaiming_normal_(block.conv1.weight)
    x = torch.randn(2, 128, 5, 5, dtype=torch.float64, requires_grad=True)
    y, total = x, torch.zeros((), dtype=torch.float64)
    for _ in range(4):
        y = block(y) / 2
        total = total + y.square().mean()
    total.backward()
    return {"x.grad": x.grad, "total": total.detach()} | gradients(block) | state(block)


def interleaved(model: Any) -> Results:
    """A call without gradients, or in eval mode, between a forward and its backward."""
    images, labels = digits(8)
    loss = F.cross_entropy(model(images), labels)
    with torch.no_grad():
        model(images * 2)
    model.eval()
    evaluated = model(images).detach()
    model.train()
    loss.backward()
    return {"evaluated": evaluated} | gradients(model) | state(model)


def test_siamese() -> None:
    WAY.check(small_bottleneck, siamese)


def test_sharpness_aware_minimization() -> None:
    WAY.check(small_basic, sam)


def test_time_steps() -> None:
    WAY.check(small_basic, time_steps)


def test_calls_between_forward_and_backward() -> None:
    WAY.check(small_basic, interleaved)
