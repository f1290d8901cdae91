# SPDX-License-Identifier: BSD-3-Clause
"""Pre-activation ResNets: He et al. 2016, "Identity mappings in deep residual networks".

In a block each convolution comes after its norm and ReLU, and nothing follows the sum. A shortcut
that changes the shape is a 1x1 convolution of the first activation. The stem is a bare 7x7
convolution and max pooling (the first block brings its norm), and a norm and ReLU end the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fast.blocks import BASIC, BOTTLENECK, convolve_alone, preact_block, stem, stem_pool
from resnet_fast.models._layers import NormLayer, conv1x1, conv3x3, init_conv_net
from resnet_fast.models._registry import register_model
from resnet_fast.models._weights import Weights, build


class PreActBasicBlock(nn.Module):
    """norm, ReLU, 3x3; norm, ReLU, 3x3; the sum with the shortcut."""

    expansion: int = 1
    _resnet_fast_norms = BASIC

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W). Returns (N, planes, H / stride, W / stride)."""
        return preact_block(self, BASIC, x, self._plain_forward)

    def _plain_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out += identity
        return cast(Tensor, out)


class PreActBottleneck(nn.Module):
    """norm, ReLU, 1x1; norm, ReLU, 3x3 (with the stride); norm, ReLU, 1x1; the sum."""

    expansion: int = 4
    _resnet_fast_norms = BOTTLENECK

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W). Returns (N, 4 * planes, H / stride, W / stride)."""
        return preact_block(self, BOTTLENECK, x, self._plain_forward)

    def _plain_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        out += identity
        return cast(Tensor, out)


class PreActResNet(nn.Module):
    """Pre-activation ResNet for images of ImageNet's size.

    block: PreActBasicBlock or PreActBottleneck. layers: blocks in each of the four stages.
    norm_layer: called with the number of channels; default nn.BatchNorm2d. in_channels: of the
    image. forward: (N, in_channels, H, W) to (N, num_classes).
    """

    _resnet_fast_norms = ("bn",)

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self._norm_layer: NormLayer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0], stride=1)
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2)
        self.bn = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        init_conv_net(self)

    def _make_layer(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        planes: int,
        blocks: int,
        stride: int,
    ) -> nn.Sequential:
        norm = self._norm_layer
        outplanes = planes * block.expansion
        changes = stride != 1 or self.inplanes != outplanes
        downsample = conv1x1(self.inplanes, outplanes, stride) if changes else None
        first = block(self.inplanes, planes, stride, downsample, norm)
        self.inplanes = outplanes
        rest = [block(outplanes, planes, norm_layer=norm) for _ in range(1, blocks)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = convolve_alone(self.conv1, x)
        x = stem_pool(self.maxpool, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = stem(self, x, self._resnet_fast_norms)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return cast(Tensor, self.fc(x))


@register_model
def preact_resnet18(*, weights: Weights = None, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18. weights: None, the path of a state_dict file, or a state_dict.

    kwargs: PreActResNet's. So for all builders of this file.
    """
    return build(PreActResNet, (PreActBasicBlock, [2, 2, 2, 2]), weights, **kwargs)


@register_model
def preact_resnet34(*, weights: Weights = None, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-34."""
    return build(PreActResNet, (PreActBasicBlock, [3, 4, 6, 3]), weights, **kwargs)


@register_model
def preact_resnet50(*, weights: Weights = None, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50."""
    return build(PreActResNet, (PreActBottleneck, [3, 4, 6, 3]), weights, **kwargs)


@register_model
def preact_resnet101(*, weights: Weights = None, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-101."""
    return build(PreActResNet, (PreActBottleneck, [3, 4, 23, 3]), weights, **kwargs)


@register_model
def preact_resnet152(*, weights: Weights = None, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-152."""
    return build(PreActResNet, (PreActBottleneck, [3, 8, 36, 3]), weights, **kwargs)
