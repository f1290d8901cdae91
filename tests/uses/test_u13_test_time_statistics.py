# SPDX-License-Identifier: BSD-3-Clause
"""U13: batch statistics at test time, and statistics estimated again after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from twins import Results
from ways import Way, batches, gradients, photos, small_basic, small_bottleneck, state

WAY = Way("U13", "batch statistics at test time")


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def adaptive(model: Any) -> Results:
    """Norms in train mode inside an eval model, without moving what they have stored."""
    model.eval()
    kept = state(model)
    for m in norms(model):
        m.train()
        m.track_running_stats = False
    with torch.no_grad():
        y = model(photos())
    after = state(model)
    assert all(torch.equal(after[name], t) for name, t in kept.items())
    return {"y": y} | after


def untracked(model: Any) -> Results:
    """Statistics thrown away altogether: batch statistics in eval mode too."""
    for m in norms(model):
        m.track_running_stats = False
        m.running_mean = m.running_var = m.num_batches_tracked = None
    return {"train": model(photos()).detach(), "eval": model.eval()(photos()).detach()}


def tent(model: Any) -> Results:
    """Wang et al. 2021: minimise the entropy of the answers over the affine parameters alone."""
    model.train().requires_grad_(False)
    for m in norms(model):
        m.requires_grad_(True)
        m.track_running_stats = False
        m.running_mean = m.running_var = None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for images, _ in batches(2):
        log = model(images).log_softmax(1)
        loss = -(log.exp() * log).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gradients(model) | state(model)


def estimated_again(model: Any) -> Results:
    """Statistics reset and taken as the plain average over batches (momentum None), as for SWA."""
    model.train()
    for m in norms(model):
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        for images, _ in batches(3):
            model(images)
    return state(model) | {"y": model.eval()(photos()).detach()}


def test_adaptive() -> None:
    WAY.check(small_basic, adaptive)


def test_untracked() -> None:
    WAY.check(small_bottleneck, untracked)


def test_entropy_minimisation() -> None:
    WAY.check(small_basic, tent)


def test_estimated_again() -> None:
    WAY.check(small_bottleneck, estimated_again)
