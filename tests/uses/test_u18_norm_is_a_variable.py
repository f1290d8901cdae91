# SPDX-License-Identifier: BSD-3-Clause
"""U18: GroupNorm, IBN, no norm at all, one norm per bit-width: what is not BatchNorm falls back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import Results, step
from ways import (
    FALLS_BACK,
    Way,
    fast_twin,
    make,
    photos,
    small_basic,
    small_bottleneck,
    state,
    train,
    tv,
)

import resnet_fast as rf
from resnet_fast import dispatch

WAY = Way(
    "U18",
    "norm is a variable",
    FALLS_BACK,
    "a norm that is not a BatchNorm is called; the others of its block stay fused, and so does one "
    "shared by blocks or switched between bit-widths",
)


class IBN(nn.Module):
    """IBN-a (Pan et al. 2018): instance norm on half of the channels, batch norm on the rest."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.half = planes // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(planes - self.half)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.half, 1)
        return torch.cat((self.IN(a.contiguous()), self.BN(b.contiguous())), 1)


def with_ibn(lib: Any) -> nn.Module:
    """As IBN-Net has it: the first norm of the blocks of the first three layers."""
    model = small_bottleneck(lib)
    for layer in (model.layer1, model.layer2, model.layer3):  # type: ignore[union-attr]
        for block in layer:
            block.bn1 = IBN(block.bn1.num_features)
    return model


NORMS = {"GroupNorm": partial(nn.GroupNorm, 8), "Identity": nn.Identity}


@pytest.mark.parametrize("name", NORMS)
def test_other_norms_throughout(name: str) -> None:
    def build(lib: Any) -> nn.Module:
        return small_basic(lib, norm_layer=NORMS[name])

    WAY.check(build, lambda model: step(model, photos()), falls_back=(f"bn1 is a {name}",))


def test_instance_batch_norm() -> None:
    WAY.check(with_ibn, lambda model: train(model, 2), falls_back=("bn1 is a IBN",))
    model = fast_twin("torchvision", with_ibn, make(with_ibn, tv))
    with dispatch.recording() as events:
        model(photos())
    if rf.is_available():  # the stem's, two or three in each block and the shortcuts'
        fused = [e for e in events if e.op == "batch_norm_act" and e.impl != "reference"]
        assert len(fused) == 1 + 3 * 2 + 3 + 4


def test_norms_taken_out_one_by_one() -> None:
    """The BN on/off study: each step another block loses its norms."""

    def use(model: Any) -> Results:
        results: Results = {}
        for i in (1, 3):
            block = getattr(model, f"layer{i}")[0]
            block.bn1 = nn.Identity()
            results |= {f"{i} {k}": t for k, t in step(model, photos()).items()}
        return results

    WAY.check(small_basic, use, falls_back=("bn1 is a Identity",))


def test_one_norm_for_each_bit_width() -> None:
    """EMQNet: the precision of the call chooses the norm."""

    def use(model: Any) -> Results:
        block = model.layer2[0]
        choices = [block.bn1, nn.BatchNorm2d(block.bn1.num_features).double()]
        results: Results = {}
        for i in (0, 1, 0):
            block.bn1 = choices[i]
            results |= {f"{len(results)} {k}": t for k, t in step(model, photos()).items()}
        return results | state(choices[0]) | state(choices[1])

    WAY.check(small_basic, use)


def test_one_norm_shared_by_two_convolutions() -> None:
    def use(model: Any) -> Results:
        block = model.layer1[0]
        block.bn2 = block.bn1
        return train(model, steps=2)

    WAY.check(small_basic, use)
