# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-20, 32, 44, 56 and 110 for small images: He et al. 2016, section 4.2.

A 3x3 stem, three stages of 16, 32 and 64 channels with n two-conv blocks each (depth 6n + 2), and a
linear layer on the average. The paper's shortcut between stages has no parameters (option A): every
second pixel, and zeros for the channels that are new.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.blocks import STEM, convolve_alone, stem
from resnet_fast.models._layers import NormLayer, conv1x1, conv3x3, init_conv_net
from resnet_fast.models._registry import register_model
from resnet_fast.models._weights import Weights, build
from resnet_fast.models.resnet import BasicBlock, zero_init_last_norms


class ZeroPadShortcut(nn.Module):
    """Option A: (N, inplanes, H, W) to (N, planes, H / stride, W / stride), without parameters.

    The zero channels go half before and half behind the old ones, where the PyTorch checkpoints of
    these networks have them (the paper leaves the place open).
    """

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.before = (planes - inplanes) // 2
        self.behind = planes - inplanes - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.behind))

    def extra_repr(self) -> str:
        return f"before={self.before}, behind={self.behind}, stride={self.stride}"


class CifarResNet(nn.Module):
    """The networks of section 4.2; module names as torchvision's ResNet, with three stages.

    blocks: in each stage. in_channels: of the image. shortcut: "A" (the paper's, without
    parameters) or "B" (a 1x1 convolution and a norm, as in the ImageNet networks). norm_layer:
    called with the number of channels; default nn.BatchNorm2d. forward: (N, in_channels, H, W) to
    (N, num_classes); any H and W. Raises ValueError for another shortcut.
    """

    _resnet_fast_norms = STEM

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
        shortcut: str = "A",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f'shortcut must be "A" or "B"; got {shortcut!r}')
        self._norm_layer: NormLayer = norm_layer or nn.BatchNorm2d
        self.shortcut = shortcut
        self.inplanes = 16
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = self._norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(16, blocks, stride=1)
        self.layer2 = self._make_layer(32, blocks, stride=2)
        self.layer3 = self._make_layer(64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        init_conv_net(self)
        if zero_init_residual:
            zero_init_last_norms(self)

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        norm = self._norm_layer
        downsample: nn.Module | None = None
        if stride != 1 or self.inplanes != planes:
            if self.shortcut == "A":
                downsample = ZeroPadShortcut(self.inplanes, planes, stride)
            else:
                downsample = nn.Sequential(conv1x1(self.inplanes, planes, stride), norm(planes))
        first = BasicBlock(self.inplanes, planes, stride, downsample, norm_layer=norm)
        self.inplanes = planes
        rest = [BasicBlock(planes, planes, norm_layer=norm) for _ in range(1, blocks)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = stem(self, convolve_alone(self.conv1, x))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return cast(Tensor, self.fc(x))


@register_model
def resnet20(*, weights: Weights = None, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for small images. weights: None, the path of a state_dict file, or a state_dict.

    kwargs: CifarResNet's. So for all builders of this file.
    """
    return build(CifarResNet, (3,), weights, **kwargs)


@register_model
def resnet32(*, weights: Weights = None, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for small images."""
    return build(CifarResNet, (5,), weights, **kwargs)


@register_model
def resnet44(*, weights: Weights = None, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for small images."""
    return build(CifarResNet, (7,), weights, **kwargs)


@register_model
def resnet56(*, weights: Weights = None, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for small images."""
    return build(CifarResNet, (9,), weights, **kwargs)


@register_model
def resnet110(*, weights: Weights = None, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for small images."""
    return build(CifarResNet, (18,), weights, **kwargs)
