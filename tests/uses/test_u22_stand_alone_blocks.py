# SPDX-License-Identifier: BSD-3-Clause
"""U22: the blocks and functionals in people's own networks, and their own plain networks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import assert_same, randomise
from ways import Way, assert_path, digits, train

import resnet_fast as rf
from resnet_fast import dispatch

WAY = Way("U22", "stand-alone blocks")


class Plain(nn.Module):
    """A small residual network, as one writes it in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.conv1 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.conv2(out))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Fused(nn.Module):
    """The same of our parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = rf.nn.ConvBNAct2d(3, 16, 3)
        self.conv1 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.join = rf.nn.AddReLU()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        bn = self.bn1
        z = self.conv1(x)
        if self.training:
            bn.num_batches_tracked += 1
        out = rf.functional.batch_norm_act(
            z, bn.weight, bn.bias, bn.running_mean, bn.running_var, training=self.training
        )
        y: Tensor = self.fc(self.join(x, self.conv2(out)).mean((2, 3)))
        return y


def test_our_parts_against_plain_pytorch() -> None:
    torch.manual_seed(0)
    plain, fused = randomise(Plain()), Fused().double()
    names = {"stem.0.": "stem.conv.", "stem.1.": "stem.bn."}

    def renamed(name: str) -> str:
        return next((name.replace(a, b) for a, b in names.items() if a in name), name)

    fused.load_state_dict({renamed(k): t for k, t in plain.state_dict().items()})
    want = {renamed(k): t for k, t in train(plain, 3, 0.05).items()}
    with dispatch.recording() as events:
        got = train(fused, 3, 0.05)
    assert_same(got, want)
    assert_path(events)


def vgg() -> nn.Sequential:
    """A plain CNN: conv, norm, ReLU and pooling in a row."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def test_a_plain_network_is_accelerated_by_the_rule_for_sequences() -> None:
    torch.manual_seed(0)
    plain = randomise(vgg())
    fast = rf.accelerate(copy.deepcopy(plain))
    assert repr(fast) == repr(plain)
    with dispatch.recording() as events:
        got = train(fast, 3, 0.05)
    assert_same(got, train(plain, 3, 0.05))
    assert_path(events)
    assert rf.explain(fast, digits()[0]).fast_share == (1.0 if rf.is_available() else 0.0)
    head = fast[:3](digits()[0])
    torch.testing.assert_close(head, fast[2](fast[1](fast[0](digits()[0]))))
    assert type(rf.restore(fast)) is nn.Sequential
