# SPDX-License-Identifier: BSD-3-Clause
"""The plain PyTorch ResNet-20 of the comparison, written as one writes it without this package.

It shares no code with resnet_fast.models, so equal losses mean something; only the names of its
parts are the same, so that both networks start from one state_dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class _Block(nn.Module):
    """Two 3x3 convolutions, and a shortcut without parameters (zeros for the new channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.stride != 1:
            strided = x[:, :, :: self.stride, :: self.stride]
            identity = F.pad(strided, (0, 0, 0, 0, self.new, self.new))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class _PlainResNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 32, 1))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1), _Block(64, 64, 1))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


def plain_resnet20(classes: int) -> nn.Module:
    """A plain ResNet-20: (N, 3, H, W) -> (N, classes); keys as rf.models.resnet20's."""
    return _PlainResNet(classes)
