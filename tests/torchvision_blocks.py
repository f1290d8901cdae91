# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's blocks with accelerated twins, and people's own subclasses of its classes.

Importing this file skips the calling module of tests where torchvision is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import shims
import torch
from torch import Tensor, nn
from twins import Log, assert_same, image, randomise, reasons, step, twin

from resnet_fast.convert import accelerate

shims.torchvision_or_skip()

from torchvision.models import resnet as tv  # noqa: E402

KINDS = ("basic", "bottleneck", "basic_down", "bottleneck_down")
Change = Callable[[Any, Log], Any]
X = image(3, 8, 6, 5)


def make(kind: str) -> Any:
    """A torchvision block for X, float64; "_down" has a shortcut of stride 2 with a norm."""
    torch.manual_seed(5)
    block = tv.BasicBlock if "basic" in kind else tv.Bottleneck
    planes = 8 if "basic" in kind else 2
    if "down" not in kind:
        return randomise(block(8, planes))
    outplanes = planes * block.expansion
    down = nn.Sequential(nn.Conv2d(8, outplanes, 1, 2, bias=False), nn.BatchNorm2d(outplanes))
    return randomise(block(8, planes, 2, down))


def run_twins(kind: str, change: Change, steps: int = 1) -> list[tuple[str, str]]:
    """Change a block and its accelerated twin, run both, and compare everything.

    change(block, log) may return a context to run in. Returns (op, reason) of the fallbacks.
    """
    theirs = make(kind)
    logs, results = (Log(), Log()), []
    fell_back: list[tuple[str, str]] = []
    for model, log in zip((theirs, accelerate(twin(theirs))), logs, strict=True):
        context = change(model, log)
        with context if hasattr(context, "__enter__") else nullcontext():
            fell_back = reasons(lambda model=model: results.append(step(model, X, steps)))
    assert_same(results[1], results[0])
    logs[1].same_as(logs[0])
    return fell_back


def check(kind: str, change: Change, why: str | None, steps: int = 1) -> None:
    """run_twins, and the fallback must say `why`; None: there must be none."""
    fell_back = run_twins(kind, change, steps)
    if why is None:
        assert not fell_back
    else:
        assert any(why in reason for _, reason in fell_back), f"{why!r} not in {fell_back}"


# ---- subclasses, here so that they pickle --------------------------------------------------------
class OwnBlock(tv.Bottleneck):
    """Another constructor and a method, the same forward."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.conv2.padding_mode = "circular"

    def width(self) -> int:
        return self.conv2.out_channels


class OwnNet(tv.ResNet):
    """A smaller stem, torchvision's forward."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()


class AttentionBlock(tv.BasicBlock):
    """A forward of its own, through torchvision's."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * out.mean((2, 3), keepdim=True).sigmoid()


class OwnForward(tv.ResNet):
    """A forward that ends in torchvision's _forward_impl."""

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(2 * x - 1).softmax(1)


class OwnImpl(tv.ResNet):
    """Without the stem's ReLU."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.layer1(self.maxpool(self.bn1(self.conv1(x))))
