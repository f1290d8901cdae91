# SPDX-License-Identifier: BSD-3-Clause
"""U21: any groups, depthwise, dilation, output stride 8 and 16."""

from __future__ import annotations

from typing import Any

import pytest
import with_torchvision  # noqa: F401
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from twins import Results, step
from ways import Way, photos, small_basic, small_bottleneck, train

WAY = Way("U21", "grouped and dilated convs")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"groups": 4, "width_per_group": 16},
        {"groups": 64, "width_per_group": 1},
        {"replace_stride_with_dilation": [False, True, True]},
        {"replace_stride_with_dilation": [False, False, True], "groups": 2, "width_per_group": 32},
    ],
    ids=["groups 4", "depthwise", "output stride 8", "output stride 16, grouped"],
)
def test_bottlenecks(kwargs: dict[str, Any]) -> None:
    WAY.check(lambda lib: small_bottleneck(lib, **kwargs), lambda model: train(model, steps=1))


def test_basic_blocks_made_depthwise_and_dilated() -> None:
    """By hand, as people do it: basic blocks take neither as an argument."""

    def use(model: Any) -> Results:
        block = model.layer2[0]
        block.conv2 = nn.Conv2d(128, 128, 3, 1, 4, dilation=4, groups=128, bias=False).double()
        nn.init.constant_(block.conv2.weight, 1 / 9)
        return train(model, steps=1)

    WAY.check(small_basic, use)


def test_deeplab_on_output_stride_8() -> None:
    """A DeepLab head on a dilated backbone, trained as one: its own norms are fused too."""

    class Segmenter(nn.Module):
        def __init__(self, backbone: Any) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(backbone.children())[:-2])
            self.head = DeepLabHead(2048, 5, atrous_rates=(2, 3, 4))
            self.head[0].project[3].p = 0.0

        def forward(self, x: Any) -> Any:
            return self.head(self.backbone(x))

    def build(lib: Any) -> nn.Module:
        net = small_bottleneck(lib, replace_stride_with_dilation=[False, True, True])
        return Segmenter(net)

    WAY.check(build, lambda model: step(model, photos(40)), libraries=("torchvision",))
