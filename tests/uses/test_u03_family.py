# SPDX-License-Identifier: BSD-3-Clause
"""U03: a sweep over the family by name, one head for several concepts, through one factory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from twins import Results
from ways import Way, gradients, photos, state, tv

from resnet_fast import models

WAY = Way("U03", "the family by name")

SHORT = ("resnet18", "resnet50", "resnext50_32x4d")
LONG = (
    "resnet34",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext101_32x8d",
    "resnext101_64x4d",
)


def concepts(model: Any) -> Results:
    """A step of hard concept prediction: eight yes-or-no answers a picture."""
    targets = torch.tensor([[0.0, 1.0] * 4, [1.0, 0.0] * 4] * 2, dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits(model(photos(32, 4)), targets)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model) | state(model)


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
)
def test_concepts(name: str) -> None:
    # The statistics of four values a channel, over up to 150 layers, amplify rounding.
    WAY.check(lambda lib: getattr(lib, name)(num_classes=8), concepts, rtol=1e-5)


def test_the_factory_knows_every_name() -> None:
    known = models.list_models()
    assert set(SHORT + LONG) <= set(known)
    assert all(hasattr(tv, name) for name in SHORT + LONG)
    for depth in (20, 32, 44, 56, 110):
        assert f"resnet{depth}" in known
    assert len(models.list_models("preact_*")) == 5
