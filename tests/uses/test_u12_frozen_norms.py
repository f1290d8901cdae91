# SPDX-License-Identifier: BSD-3-Clause
"""U12: fine-tuning with BatchNorm frozen: backward through eval-mode norms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
import with_torchvision  # noqa: F401
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from twins import Results
from ways import Way, batches, gradients, small_basic, small_bottleneck, state

WAY = Way("U12", "frozen BN in training")


def fine_tune(model: Any, affine: bool) -> Results:
    """model.train(), but every norm in eval mode, as detection code does it."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(affine)
    before = {k: t for k, t in state(model).items() if "running" in k or "num_batches" in k}
    for images, labels in batches(2):
        F.cross_entropy(model(images), labels).backward()
    after = state(model)
    assert all((after[name] == t).all() for name, t in before.items())
    return gradients(model) | after


def test_frozen_statistics_trained_affine() -> None:
    WAY.check(small_basic, partial(fine_tune, affine=True))
    WAY.check(small_bottleneck, partial(fine_tune, affine=True))


def test_frozen_statistics_frozen_affine() -> None:
    WAY.check(small_bottleneck, partial(fine_tune, affine=False))


def test_frozen_batch_norm_modules() -> None:
    """torchvision's FrozenBatchNorm2d, as its detection backbones have it, fuses too."""

    def build(lib: Any) -> nn.Module:
        return small_bottleneck(lib, norm_layer=FrozenBatchNorm2d)

    WAY.check(build, partial(fine_tune, affine=False))
