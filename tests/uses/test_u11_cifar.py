# SPDX-License-Identifier: BSD-3-Clause
"""U11: the CIFAR ResNets, and ResNet-18 with a 3x3 stem and no pooling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn
from twins import Results, assert_same, randomise
from ways import Way, assert_path, small_basic, train

from resnet_fast import dispatch, models
from resnet_fast.demo.plain import plain_resnet20

WAY = Way("U11", "CIFAR stem")


def small_stem(model: Any) -> Results:
    """kuangliu's stem: what most CIFAR repositories put on a ResNet-18."""
    conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double()
    conv.weight.data.copy_(model.conv1.weight.data[:, :, 2:5, 2:5])
    model.conv1 = conv
    model.maxpool = nn.Identity()
    return train(model, steps=2)


def test_resnet18_with_a_small_stem() -> None:
    WAY.check(small_basic, small_stem)


def test_resnet20_against_the_plain_one() -> None:
    theirs = randomise(plain_resnet20(10))
    ours = models.resnet20(num_classes=10).double()
    ours.load_state_dict(theirs.state_dict())
    with dispatch.recording() as events:
        got = train(ours)
    assert_same(got, train(theirs), rtol=1e-7)
    assert_path(events)


@pytest.mark.parametrize("depth", [32, 44, 56, 110])
def test_deeper_ones_fall_back_nowhere(depth: int) -> None:
    model = models.create_model(f"resnet{depth}", num_classes=10).double()
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) + 1 == depth
    with dispatch.recording() as events:
        got = train(copy.deepcopy(model), steps=1)
    assert_path(events)
    assert len(events) >= depth - 1
    assert all(t.isfinite().all() for t in got.values())
