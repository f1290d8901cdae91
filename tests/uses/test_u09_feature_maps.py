# SPDX-License-Identifier: BSD-3-Clause
"""U09: a backbone for something else: getters, truncations, skips of a U-Net."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import with_torchvision  # noqa: F401
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from twins import Results
from ways import EXCEPT, Way, gradients, photos, small_basic, small_bottleneck, state, tv

import resnet_fast as rf

WAY = Way(
    "U09",
    "feature maps",
    EXCEPT,
    "create_feature_extractor: its graph holds standard operators",
)
LAYERS = {"layer1": "a", "layer2": "b", "layer3": "c", "layer4": "d"}


class UNet(nn.Module):
    """A decoder that takes every stage's map as a skip (segmentation of nuclei)."""

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = IntermediateLayerGetter(backbone, LAYERS)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.backbone(x).values())
        y = self.lateral[-1](maps[-1])
        for i in (2, 1, 0):
            y = F.interpolate(y, maps[i].shape[-2:], mode="nearest") + self.lateral[i](maps[i])
        return y


def unet(channels: tuple[int, ...]) -> Any:
    def use(model: Any) -> Results:
        torch.manual_seed(2)
        net = UNet(model, channels).double()
        y = net(photos())
        (y.square().mean() + y[:, 0].mean()).backward()
        return {"y": y.detach()} | gradients(net) | state(net)

    return use


def truncated(model: Any) -> Results:
    """layer4 and the head cut off, by children (RTM weather, a truncated ResNet-50)."""
    net = nn.Sequential(*list(model.children())[:-3])
    y = net(photos())
    y.square().mean().backward()
    return {"y": y.detach()} | gradients(net) | state(net)


def extractor(model: Any) -> Results:
    nodes = ["relu", "layer1.0.relu", "layer2.0.add", "layer3", "flatten"]
    return dict(create_feature_extractor(model.eval(), nodes)(photos()))


def test_unet() -> None:
    WAY.check(small_basic, unet((64, 128, 256, 512)))
    WAY.check(small_bottleneck, unet((256, 512, 1024, 2048)))


def test_truncated() -> None:
    WAY.check(small_bottleneck, truncated)


def test_feature_extractor_gives_the_same_maps_by_plain_operators() -> None:
    def use(model: Any) -> Results:
        return extractor(model) | {"fast again": model(photos())}

    WAY.check(small_basic, use, libraries=("torchvision",))


def test_getter_before_accelerate() -> None:
    """What is wrapped first is found inside the wrapper."""

    def use(model: Any) -> Results:
        getter = rf.accelerate(IntermediateLayerGetter(rf.restore(model), LAYERS))
        return dict(getter(photos()))

    def plain(lib: Any) -> nn.Module:
        return small_basic(lib)

    theirs = plain(tv).double()
    want = IntermediateLayerGetter(theirs, LAYERS)(photos())
    theirs_again = plain(tv).double()
    theirs_again.load_state_dict(theirs.state_dict())
    got = use(theirs_again)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-9, atol=1e-9)
