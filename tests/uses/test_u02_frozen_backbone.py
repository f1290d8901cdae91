# SPDX-License-Identifier: BSD-3-Clause
"""U02: transfer learning: a new head, parts frozen, and no gradient computed for what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins import Results
from ways import Way, digits, small_basic, small_bottleneck, train

from resnet_fast import functional

WAY = Way("U02", "new head, frozen backbone")


def transfer(model: Any) -> Results:
    """Freeze all but layer4, give it three classes more, train."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.layer4.requires_grad_(True)
    torch.manual_seed(1)
    model.fc = nn.Linear(model.fc.in_features, 13).double()
    return train(model)


def probe(model: Any) -> Results:
    """Features of a headless, frozen model under a linear classifier."""
    model.fc = nn.Identity()
    model.requires_grad_(False).eval()
    images, labels = digits()
    features = model(images)
    assert not features.requires_grad
    one_hot = nn.functional.one_hot(labels, 10).double()
    ridge = features.T @ features + torch.eye(features.shape[1], dtype=features.dtype)
    return {"features": features, "head": torch.linalg.solve(ridge, features.T @ one_hot)}


@pytest.mark.parametrize("build", [small_basic, small_bottleneck])
def test_transfer(build: Any) -> None:
    WAY.check(build, transfer)


def test_linear_probe() -> None:
    WAY.check(small_basic, probe)


def test_nothing_is_computed_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the norms frozen, no call of the backward is asked for dweight or dbias."""
    asked: list[list[bool]] = []

    def spied(backward: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            asked.append(args[-1])
            return backward(*args)

        return spy

    for name in ("_batch_norm_act_backward", "_batch_norm_act_backward_"):
        monkeypatch.setattr(functional, name, spied(getattr(functional, name)))

    def use(model: Any) -> Results:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("conv" in name)
        return train(model, steps=1)

    WAY.check(small_basic, use, libraries=("torchvision",))
    assert asked
    assert not any(want_weight or want_bias for _, _, want_weight, want_bias in asked)
