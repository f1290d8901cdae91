# SPDX-License-Identifier: BSD-3-Clause
"""U20: SiLU, GELU, leaky, learned, spiking: the activation is called, never taken for a ReLU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import shims
import torch
from torch import Tensor, nn
from twins import Results, assert_same, randomise
from ways import (
    FALLS_BACK,
    Way,
    assert_path,
    digits,
    fast_twin,
    make,
    small_basic,
    small_bottleneck,
    train,
    tv,
)

import resnet_fast as rf
from resnet_fast import dispatch

timm = shims.timm_or_skip()

WAY = Way(
    "U20",
    "other activations",
    FALLS_BACK,
    "the activation is called, the norms before it stay fused",
)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + (3 * x).square())


class Spike(nn.Module):
    """A Heaviside step with a surrogate gradient (SEW-ResNet)."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Spike.apply(x)
        return out


ACTIVATIONS = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "PReLU": lambda: nn.PReLU().double(),
    "Spike": Spike,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("build", [small_basic, small_bottleneck])
def test_in_torchvision_blocks(name: str, build: Any) -> None:
    def use(model: Any) -> Results:
        for m in list(model.modules()):
            if hasattr(m, "relu"):
                m.relu = ACTIVATIONS[name]()
        return train(model, steps=1)

    WAY.check(build, use, falls_back=(f"relu is a {name}, not exactly nn.ReLU",))
    model = fast_twin("torchvision", build, make(build, tv))
    use(model)
    with dispatch.recording() as events:
        model(digits()[0])
    if rf.is_available():
        fused = [e for e in events if e.op == "batch_norm_act" and e.impl != "reference"]
        assert len(fused) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("act", ["silu", "gelu", "leaky_relu", "prelu"])
def test_in_timm_blocks_the_norms_stay_fused(act: str) -> None:
    torch.manual_seed(0)
    theirs = randomise(timm.create_model("resnet18", num_classes=10, act_layer=act))
    ours = rf.accelerate(copy.deepcopy(theirs))
    with dispatch.recording() as events:
        got = train(ours, steps=1)
    assert_same(got, train(theirs, steps=1), rtol=1e-6)
    assert_path(events)


def test_one_block_of_another_activation() -> None:
    """Only that block falls back."""

    def use(model: Any) -> Results:
        model.layer3[0].relu = nn.SiLU()
        results = train(model, steps=1)
        rows = rf.explain(model, torch.zeros(2, 3, 32, 32, dtype=torch.float64)).rows
        if rf.is_available() and hasattr(type(model), "_resnet_fast_norms"):
            assert {row.module for row in rows if row.implementation == "reference"} == {"layer3.0"}
        return results

    WAY.check(small_basic, use, falls_back=("relu is a SiLU",))
