# SPDX-License-Identifier: BSD-3-Clause
"""Part one of the demo: a ResNet-20 on real handwritten digits, plain and accelerated in turn.

Data: the 1,797 scanned digits that scikit-learn ships (8x8, 16 grey levels; the test part of UCI's
"Optical Recognition of Handwritten Digits"), enlarged to the network's 32x32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.cli import need
from resnet_fast.demo.plain import plain_resnet20
from resnet_fast.demo.turns import FAST, PLAIN, Turns

CLASSES = 10
BATCH = 64
LEARNING_RATE = 0.1


@dataclass
class Digits:
    """Images (N, 3, S, S) float32 channels_last, standardised; labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(size: int, seed: int) -> Digits:
    """Split 80 : 20 by class, standardise by the training part, enlarge to ``size`` pixels."""
    purpose = "the demo's digits"
    datasets = need("sklearn.datasets", "scikit-learn", purpose)
    selection = need("sklearn.model_selection", "scikit-learn", purpose)
    raw: Any = datasets.load_digits()
    train, test = selection.train_test_split(
        range(len(raw.target)), test_size=0.2, stratify=raw.target, random_state=seed
    )
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(raw.target)
    images = (images - images[train].mean()) / images[train].std()
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    # Grey as three equal channels: the network keeps the published CIFAR stem.
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return Digits(images[train], labels[train], images[test], labels[test])


@dataclass
class Side:
    """One of the two trainings."""

    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def __post_init__(self) -> None:
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=LEARNING_RATE,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=self.steps, pct_start=0.2
        )

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One training step; returns its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - start
        self.schedule.step()
        self.losses.append(loss.item())
        return seconds

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> float:
        """Share of right answers, in eval mode."""
        self.model.eval()
        right = 0
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            right += int((self.model(x).argmax(1) == y).sum())
        self.model.train()
        self.accuracy = right / len(labels)
        return self.accuracy


@dataclass
class Training:
    """Both sides after training, and their times."""

    sides: dict[str, Side]
    turns: Turns
    train_count: int
    test_count: int

    @property
    def early_difference(self) -> float:
        """Largest relative difference of the losses of the first two steps.

        The first shows the forward, the second the gradients. Later any two float32 runs drift
        apart, for each step amplifies rounding: plain PyTorch in NCHW and in channels_last differ
        by 1e-3 at step 5 and 1e-2 at step 10, and each of them as much from a float64 run.
        """
        both = zip(self.sides[PLAIN].losses[:2], self.sides[FAST].losses[:2], strict=True)
        return max(abs(a - b) / abs(a) for a, b in both)


def train(
    size: int, epochs: int, seed: int, limit: int | None, report: Callable[[int, int, str], None]
) -> Training:
    """Train both networks on the same batches, step by step in turn.

    Args:
        size: pixels of the enlarged digits. epochs: passes over the training part.
        limit: at most this many steps in all (None: no limit).
        report: called after each step with (done, total, text).
    """
    digits = load_digits(size, seed)
    count = len(digits.train_labels)
    per_epoch = count // BATCH
    steps = min(per_epoch * epochs, limit or per_epoch * epochs)
    torch.manual_seed(seed)
    fast = rf.models.resnet20(num_classes=CLASSES)
    plain = plain_resnet20(CLASSES)
    plain.load_state_dict(fast.state_dict())
    sides = {PLAIN: Side(plain.train(), steps), FAST: Side(fast.train(), steps)}
    turns = Turns()
    generator = torch.Generator().manual_seed(seed)
    for done in range(steps):
        if done % per_epoch == 0:
            order = torch.randperm(count, generator=generator)
        batch = order[done % per_epoch * BATCH :][:BATCH]
        images, labels = digits.train_images[batch], digits.train_labels[batch]
        for name, side in sides.items():
            turns.seconds[name].append(side.step(images, labels))
        losses = " / ".join(f"{side.losses[-1]:.4f}" for side in sides.values())
        report(done + 1, steps, f"loss {losses}")
    for side in sides.values():
        side.test(digits.test_images, digits.test_labels)
    return Training(sides, turns, count, len(digits.test_labels))
