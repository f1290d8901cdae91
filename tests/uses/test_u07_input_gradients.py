# SPDX-License-Identifier: BSD-3-Clause
"""U07: gradients of the input: integrated gradients, adversarial pictures, visual prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from twins import Results
from ways import Way, digits, gradients, photos, small_basic, small_bottleneck, state

WAY = Way("U07", "gradients of the input")


def integrated_gradients(model: Any) -> Results:
    """Sundararajan et al. 2017, five steps from grey; the weights are frozen."""
    model.eval().requires_grad_(False)
    x = photos()
    total = torch.zeros_like(x)
    for share in torch.linspace(0.2, 1, 5):
        at = (x * share).requires_grad_()
        (grad,) = torch.autograd.grad(model(at)[:, 2].sum(), at)
        total += grad / 5
    assert not gradients(model)
    return {"attribution": total * x} | state(model)


def adversarial(model: Any) -> Results:
    """Madry et al. 2018: four steps of PGD in eval mode, then a training step on what they gave."""
    images, labels = digits(16)
    x = images.clone()
    model.eval()
    for _ in range(4):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        # Not the sign: that of a gradient near zero is rounding.
        step = grad / grad.abs().amax((1, 2, 3), keepdim=True)
        x = (images + (x.detach() + 0.1 * step - images).clamp(-0.3, 0.3)).detach()
    model.train()
    F.cross_entropy(model(x), labels).backward()
    return {"x": x} | gradients(model) | state(model)


def prompt(model: Any) -> Results:
    """Reprogramming (AttrVR): a trained border around small pictures, the network frozen."""
    model.eval().requires_grad_(False)
    images, labels = digits(16)
    border = nn.Parameter(torch.zeros(3, 64, 64, dtype=torch.float64))
    optimizer = torch.optim.SGD([border], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(F.pad(images, (16,) * 4) + border), labels).backward()
        optimizer.step()
    assert not gradients(model)
    return {"border": border.detach(), "grad": border.grad}


def test_integrated_gradients() -> None:
    WAY.check(small_basic, integrated_gradients)
    WAY.check(small_bottleneck, integrated_gradients)


def test_adversarial_training() -> None:
    WAY.check(small_basic, adversarial)


def test_visual_prompt() -> None:
    WAY.check(small_basic, prompt)
