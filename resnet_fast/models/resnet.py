# SPDX-License-Identifier: BSD-3-Clause
"""ResNet, Wide ResNet and ResNeXt: torchvision's modules, names, numbers and signatures.

He et al. 2016, "Deep residual learning for image recognition" (the v1.5 variant: the stride sits on
the 3x3 convolution); Xie et al. 2017, ResNeXt; Zagoruyko & Komodakis 2016, Wide ResNet. Under the
same seed the parameters are bitwise those of torchvision, and state_dicts load both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fast import adapters
from resnet_fast.blocks import (
    BASIC,
    BOTTLENECK,
    STEM,
    basic_block,
    bottleneck,
    convolve_alone,
    stem,
    stem_pool,
)
from resnet_fast.models._layers import NormLayer, conv1x1, conv3x3, init_conv_net
from resnet_fast.models._registry import register_model
from resnet_fast.models._weights import Weights, build


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. Raises as torchvision's for groups and dilation."""

    expansion: int = 1
    _resnet_fast_norms = BASIC

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W). Returns (N, planes, H / stride, W / stride)."""
        return basic_block(self, x, self._plain_forward)

    def _plain_forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return cast(Tensor, self.relu(out))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, groups and dilation) and 1x1 convolutions, and a shortcut."""

    expansion: int = 4
    _resnet_fast_norms = BOTTLENECK

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W). Returns (N, 4 * planes, H / stride, W / stride)."""
        return bottleneck(self, x, self._plain_forward)

    def _plain_forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return cast(Tensor, self.relu(out))


class ResNet(nn.Module):
    """torchvision's ResNet: same arguments, module tree, state_dict and initial values.

    block: BasicBlock, Bottleneck, or a class of their signature. layers: blocks in each of the four
    stages. norm_layer: called with the number of channels; default nn.BatchNorm2d. in_channels: of
    the image. forward: (N, in_channels, H, W) to (N, num_classes). Raises ValueError for a
    replace_stride_with_dilation that is not of three elements.
    """

    _resnet_fast_norms = STEM

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            adapters.load()  # it may be another library's, such as a frozen norm
        self._norm_layer: NormLayer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes = 64
        self.dilation = 1
        dilate = (
            (False, False, False)
            if replace_stride_with_dilation is None
            else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None or a 3-element tuple, "
                f"got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        init_conv_net(self)
        if zero_init_residual:
            zero_init_last_norms(self)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        downsample = None
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outplanes, stride), norm_layer(outplanes)
            )
        first = block(
            self.inplanes,
            planes,
            stride,
            downsample,
            self.groups,
            self.base_width,
            previous_dilation,
            norm_layer,
        )
        self.inplanes = outplanes
        rest = [
            block(
                self.inplanes,
                planes,
                groups=self.groups,
                base_width=self.base_width,
                dilation=self.dilation,
                norm_layer=norm_layer,
            )
            for _ in range(1, blocks)
        ]
        return nn.Sequential(first, *rest)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = stem(self, convolve_alone(self.conv1, x))
        x = stem_pool(self.maxpool, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return cast(Tensor, self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def zero_init_last_norms(model: nn.Module) -> None:
    """Start every residual branch at zero (Goyal et al. 2017): weight 0 in its last norm."""
    for m in model.modules():
        if isinstance(m, (BasicBlock, Bottleneck)):
            last = m.bn3 if isinstance(m, Bottleneck) else m.bn2
            if isinstance(getattr(last, "weight", None), Tensor):
                nn.init.constant_(cast(Tensor, last.weight), 0)


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: list[int],
    weights: Weights,
    kwargs: dict[str, Any],
    **fixed: int,
) -> ResNet:
    for name, value in fixed.items():
        if kwargs.setdefault(name, value) != value:
            raise ValueError(f"{name} must be {value} in this model; got {kwargs[name]}")
    return build(ResNet, (block, layers), weights, **kwargs)


@register_model
def resnet18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18. weights: None, the path of a state_dict file, or a state_dict. kwargs: ResNet's.

    progress is torchvision's and does nothing here, where nothing is downloaded. So for all
    builders of this file.
    """
    return _resnet(BasicBlock, [2, 2, 2, 2], weights, kwargs)


@register_model
def resnet34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34."""
    return _resnet(BasicBlock, [3, 4, 6, 3], weights, kwargs)


@register_model
def resnet50(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (v1.5)."""
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, kwargs)


@register_model
def resnet101(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (v1.5)."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, kwargs)


@register_model
def resnet152(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (v1.5)."""
    return _resnet(Bottleneck, [3, 8, 36, 3], weights, kwargs)


@register_model
def resnext50_32x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4."""
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, kwargs, groups=32, width_per_group=4)


@register_model
def resnext101_32x8d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, kwargs, groups=32, width_per_group=8)


@register_model
def resnext101_64x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, kwargs, groups=64, width_per_group=4)


@register_model
def wide_resnet50_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2: twice the channels inside each block."""
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, kwargs, width_per_group=128)


@register_model
def wide_resnet101_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2: twice the channels inside each block."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, kwargs, width_per_group=128)
