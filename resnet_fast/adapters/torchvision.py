# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's ResNet, ResNeXt and Wide ResNet.

The classes bear torchvision's names, so that ``repr(model)`` and rules that go by class names stay
as they were. Each checks at the call that the method it stands for is still torchvision's own.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torchvision.models import resnet as tv

from resnet_fast import blocks
from resnet_fast.adapters import register_adapter, replaced

_BASIC_FORWARD = tv.BasicBlock.forward
_BOTTLENECK_FORWARD = tv.Bottleneck.forward
_FORWARD_IMPL = tv.ResNet._forward_impl


class BasicBlock(tv.BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock, fused."""

    _resnet_fast_norms = blocks.BASIC

    def forward(self, x: Tensor) -> Tensor:
        if replaced(self, x, "forward", _BASIC_FORWARD):
            return self._resnet_fast_plain(x)
        return blocks.basic_block(self, x, self._resnet_fast_plain)

    def _resnet_fast_plain(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))


class Bottleneck(tv.Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck, fused."""

    _resnet_fast_norms = blocks.BOTTLENECK

    def forward(self, x: Tensor) -> Tensor:
        if replaced(self, x, "forward", _BOTTLENECK_FORWARD):
            return self._resnet_fast_plain(x)
        return blocks.bottleneck(self, x, self._resnet_fast_plain)

    def _resnet_fast_plain(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))


class ResNet(tv.ResNet):  # type: ignore[misc]
    """torchvision's ResNet with a fused stem; its blocks are accelerated on their own."""

    _resnet_fast_norms = blocks.STEM

    def _forward_impl(self, x: Tensor) -> Tensor:
        if replaced(self, x, "_forward_impl", _FORWARD_IMPL):
            return cast(Tensor, super()._forward_impl(x))
        x = blocks.stem(self, blocks.convolve_alone(self.conv1, x))
        x = blocks.stem_pool(self.maxpool, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return cast(Tensor, self.fc(x))


register_adapter(tv.BasicBlock, BasicBlock)
register_adapter(tv.Bottleneck, Bottleneck)
register_adapter(tv.ResNet, ResNet, "_forward_impl")
