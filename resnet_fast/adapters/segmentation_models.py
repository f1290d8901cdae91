# SPDX-License-Identifier: BSD-3-Clause
"""segmentation_models_pytorch's ResNetEncoder: a torchvision ResNet that gives every stage's map.

Its forward runs the stem itself. Blocks are torchvision's, and decoders are made of nn.Sequential:
those need nothing here.
"""

from __future__ import annotations

from typing import cast

from segmentation_models_pytorch.encoders.resnet import ResNetEncoder as Original
from torch import Tensor

from resnet_fast import blocks
from resnet_fast.adapters import register_adapter, replaced

_FORWARD = Original.forward
# What the forward asks for by name, in this order, in the versions whose forward this file knows.
_NAMES = ("_depth", "conv1", "bn1", "relu", "append", "maxpool", "layer1", "layer2", "layer3")
_KNOWN = (*_NAMES, "layer4")


class ResNetEncoder(Original):  # type: ignore[misc]
    """segmentation_models_pytorch's ResNetEncoder with a fused stem."""

    _resnet_fast_norms = blocks.STEM

    def forward(self, x: Tensor) -> list[Tensor]:
        if replaced(self, x, "forward", _FORWARD):
            return cast("list[Tensor]", super().forward(x))
        features, depth = [x], self._depth
        if depth >= 1:
            x = blocks.stem(self, blocks.convolve_alone(self.conv1, x))
            features.append(x)
        if depth >= 2:
            x = self.layer1(blocks.stem_pool(self.maxpool, x))
            features.append(x)
        for number, layer in enumerate(("layer2", "layer3", "layer4"), 3):
            if depth >= number:
                x = getattr(self, layer)(x)
                features.append(x)
        return features


if Original.forward.__code__.co_names == _KNOWN:  # else its stem runs plain, and explain() says so
    register_adapter(Original, ResNetEncoder)
