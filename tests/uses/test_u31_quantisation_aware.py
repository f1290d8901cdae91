# SPDX-License-Identifier: BSD-3-Clause
"""U31: fake quantisation around convolutions in training; a quantiser that reads the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from twins import Results
from ways import EXCEPT, Way, make, photos, small_basic, train, tv

import resnet_fast as rf

WAY = Way(
    "U31",
    "quantisation-aware",
    EXCEPT,
    "the exported graph that a quantiser works on: it holds standard operators",
)


class FakeQuant(nn.Module):
    """Symmetric int8 with a straight-through gradient, the scale a running maximum."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.copy_(torch.maximum(self.scale, x.detach().abs().max() / 127))
        rounded = (x.detach() / self.scale).round().clamp(-127, 127) * self.scale
        return x + (rounded - x.detach())


class Quantised(nn.Module):
    """A convolution with its input fake-quantised."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.observer = FakeQuant()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.observer(x))
        return out


def quantise(model: nn.Module) -> None:
    for m in list(model.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.Conv2d):
                parametrize.register_parametrization(child, "weight", FakeQuant())
                setattr(m, name, Quantised(child))


def test_training_with_fake_quantisation() -> None:
    def use(model: Any) -> Results:
        quantise(model)
        model.double()
        # Not on levels of quantised values, where the largest of four is decided by rounding.
        model.maxpool = nn.Identity()
        return train(model, steps=1)

    WAY.check(small_basic, use)


def test_a_quantiser_sees_the_graph_it_expects() -> None:
    """PT2E annotates conv, batch_norm, relu and add by their targets in the exported graph."""
    plain = make(small_basic, tv).eval()
    fast = rf.accelerate(make(small_basic, tv).eval())
    graphs = [torch.export.export(model, (photos(),)).graph for model in (plain, fast)]
    patterns = [
        [str(node.target) for node in graph.nodes if node.op == "call_function"] for graph in graphs
    ]
    assert patterns[0] == patterns[1]
    assert sum("batch_norm" in name for name in patterns[1]) == 12
