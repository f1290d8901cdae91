# SPDX-License-Identifier: BSD-3-Clause
"""One way of use through the untouched model, the accelerated one and ours, and all compared.

Each test_uNN_*.py states its row as ``WAY``; docs/uses.md is made from them (table.py), and the
statement is what ``Way.check`` asserts: which reasons, and no others, keep a block off the fast
path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import with_torchvision  # noqa: F401
from torch import Tensor, nn
from torchvision.models import resnet as tv
from twins import Results, assert_same, randomise

import resnet_fast as rf
from resnet_fast import dispatch
from resnet_fast.models import resnet as ours_module

Build = Callable[[Any], nn.Module]
Use = Callable[[Any], Results]

FAST = "fast"
EXCEPT = "fast, except"  # the method of the row is, and `why` says what around it is not
FALLS_BACK = "falls back"


@dataclass(frozen=True)
class Way:
    """A row of docs/uses.md: what of it runs on the fast path, and if not all, why."""

    number: str
    name: str
    status: str = FAST
    why: str = ""

    def check(
        self,
        build: Build,
        use: Use,
        *,
        falls_back: tuple[str, ...] = (),
        libraries: tuple[str, ...] = ("torchvision", "ours"),
        rtol: float = 1e-7,
    ) -> None:
        """Run use(model) on the untouched model and the fast ones; everything must be equal.

        build: makes the model from a module of torchvision's names (ResNet, BasicBlock, ...).
        falls_back: a part of every reason for which something ran the reference; () for none. Each
        must have occurred, and the fast path must have run as well unless all did.
        """
        if falls_back:
            assert self.status != FAST, f"{self.number} says {self.status}"
        untouched = make(build, tv)
        want = use(copy.deepcopy(untouched))
        for library in libraries:
            model = fast_twin(library, build, untouched)
            with dispatch.recording() as events:
                got = use(model)
            assert_same(got, want, rtol)
            assert_path(events, falls_back)


def make(build: Build, library: ModuleType) -> Any:
    """The model in float64, the same for the same build, no parameter at its initial 0 or 1."""
    torch.manual_seed(3)
    return randomise(build(library))


def fast_twin(library: str, build: Build, untouched: nn.Module) -> Any:
    """The accelerated torchvision model, or ours with the same weights."""
    if library == "torchvision":
        return rf.accelerate(copy.deepcopy(untouched))
    ours = build(ours_module).double()
    ours.load_state_dict(untouched.state_dict())
    return ours.train(untouched.training)


def assert_path(events: list[dispatch.Event], falls_back: tuple[str, ...] = ()) -> None:
    """Every fallback for one of these reasons, each reason met, and the kernels run otherwise."""
    if not rf.is_available():
        return  # test_dispatch.py makes that visible
    slow = {(event.op, event.reason) for event in events if event.impl == "reference"}
    for op, reason in slow:
        assert any(part in reason for part in falls_back), f"{op} fell back: {reason}"
    for part in falls_back:
        assert any(part in reason for _, reason in slow), f"nothing fell back for: {part}"
    if not falls_back:
        assert any(event.impl != "reference" for event in events), "nothing ran on the fast path"


def small_basic(lib: Any, **kwargs: Any) -> nn.Module:
    """A ResNet of four basic blocks, ten classes."""
    net: nn.Module = lib.ResNet(lib.BasicBlock, [1, 1, 1, 1], num_classes=10, **kwargs)
    return net


def small_bottleneck(lib: Any, **kwargs: Any) -> nn.Module:
    """A ResNet of four bottlenecks, ten classes."""
    net: nn.Module = lib.ResNet(lib.Bottleneck, [1, 1, 1, 1], num_classes=10, **kwargs)
    return net


# ---- data ----------------------------------------------------------------------------------------
@lru_cache
def photos(size: int = 48, count: int = 3) -> Tensor:
    """The photographs of the demo, (count, 3, size, size) float64, standardised."""
    from resnet_fast.demo.images import preprocess, shipped_photos

    return torch.stack([preprocess(photo, size) for _, photo in shipped_photos()[:count]]).double()


@lru_cache
def digits(count: int = 16, size: int = 32) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: (count, 3, size, size) float64, and labels (count,)."""
    from resnet_fast.demo.digits import load_digits

    data = load_digits(size, seed=0)
    return data.train_images[:count].double().contiguous(), data.train_labels[:count]


def batches(count: int, batch: int = 8, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of digits."""
    images, labels = digits(count * batch, size)
    return zip(images.split(batch), labels.split(batch), strict=True)


# ---- what is compared ----------------------------------------------------------------------------
def state(model: nn.Module) -> Results:
    """Parameters and buffers, as copies."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def gradients(model: nn.Module) -> Results:
    """The gradients there are; a parameter without one is not in it."""
    return {
        f"{name}.grad": p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def train(model: nn.Module, steps: int = 3, lr: float = 0.01) -> Results:
    """Steps of SGD with momentum on digits: losses, the state after them, eval-mode answers."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr, momentum=0.9)
    losses = []
    for images, labels in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    results = {"losses": torch.stack(losses)} | gradients(model) | state(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        results["answers"] = model(digits()[0])
    model.train(was_training)
    return results
