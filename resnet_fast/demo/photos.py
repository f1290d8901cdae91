# SPDX-License-Identifier: BSD-3-Clause
"""Part two of the demo: a ResNet over photographs, plain and accelerated, compared and timed."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.cli import UserError, torchvision_model
from resnet_fast.demo.images import Named, preprocess
from resnet_fast.demo.turns import FAST, PLAIN, Turns
from resnet_fast.demo.vision import import_torchvision

BATCH = 8


@dataclass
class Prepared:
    """A plain model with its weights, and the photographs as its input."""

    model: nn.Module
    source: str  # "torchvision" or "resnet_fast"
    weights: str
    trained: bool  # the user gave weights
    names: list[str]
    images: Tensor  # (N, 3, S, S) float32, channels_last
    categories: list[str] | None


@dataclass
class Comparison:
    """What the photographs gave."""

    prepared: Prepared
    logits: dict[str, Tensor]  # side -> (N, classes) float32
    turns: Turns  # seconds of one batch
    batch: int
    model: nn.Module  # the accelerated one

    @property
    def largest_difference(self) -> float:
        return float((self.logits[PLAIN] - self.logits[FAST]).abs().max())

    @property
    def relative_difference(self) -> float:
        """Largest difference over the largest logit of the plain model."""
        return self.largest_difference / float(self.logits[PLAIN].abs().max())

    @property
    def agreement(self) -> float:
        """Share of photographs with the same best class."""
        same = self.logits[PLAIN].argmax(1) == self.logits[FAST].argmax(1)
        return float(same.float().mean())

    def top1(self, side: str) -> list[str]:
        """The best class of each photograph, by name where names are known."""
        best = self.logits[side].argmax(1).tolist()
        names = self.prepared.categories
        return [names[i] if names else f"class {i}" for i in best]


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state_dict as torch.save wrote it, bare or under "state_dict" or "model".

    UserError where the file is missing or holds something else. Only tensors and plain containers
    are loaded (weights_only), never code.
    """
    if not file.is_file():
        raise UserError(f"--weights {file}: there is no such file")
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--weights {file}: cannot be read as a state_dict: {first}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"--weights {file}: holds a {type(state).__name__}, not a state_dict")
    return dict(state)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def fit(model: nn.Module, state: dict[str, Tensor], file: Path, name: str) -> None:
    """Load ``state`` into ``model``; UserError names the keys that do not fit."""
    own = model.state_dict()
    # Written by DataParallel and DistributedDataParallel.
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(tensor.shape)} and must be {tuple(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    faults = [
        f"{what} {_listed(keys)}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("shape:", shapes))
        if keys
    ]
    if faults:
        raise UserError(f"--weights {file} does not fit {name}: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False)


def _new_model(name: str, classes: int) -> tuple[nn.Module, str]:
    """A plain model: torchvision's where it imports, else ours (plain on the reference backend)."""
    if import_torchvision() is not None:
        return torchvision_model(name, num_classes=classes), "torchvision"
    try:
        return rf.models.create_model(name, num_classes=classes), "resnet_fast"
    except (ValueError, KeyError) as error:
        raise UserError(f"--model {name}: {error.args[0] if error.args else error}") from None


@torch.no_grad()
def _estimate_statistics(model: nn.Module, images: Tensor) -> None:
    """Running statistics from ``images``.

    Without, the activations of an untrained ResNet grow from block to block.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average of the batches seen
        norm.reset_running_stats()
    model.train()
    for batch in images.split(BATCH):
        # A lone last image still has many pixels; where it has not, batch norm would refuse.
        if len(batch) > 1 or len(images) == 1:
            model(batch)
    for norm in norms:
        norm.momentum = 0.1


def _sides(plain: nn.Module, source: str) -> dict[str, Callable[[Tensor], Tensor]]:
    fast = rf.accelerate(copy.deepcopy(plain))

    def run_plain(images: Tensor) -> Tensor:
        if source == "torchvision":
            return plain(images)  # type: ignore[no-any-return]
        with rf.use_backend("reference"):
            return plain(images)  # type: ignore[no-any-return]

    return {PLAIN: run_plain, FAST: fast}


def _categories(weights: Path | None, classes: int) -> list[str] | None:
    """ImageNet's class names, which torchvision knows; None for other or untrained classes."""
    if weights is None or classes != 1000 or import_torchvision() is None:
        return None
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def prepare(
    photos: list[Named], name: str, weights: Path | None, *, seed: int, size: int
) -> Prepared:
    """Build the model called ``name``, load its weights, preprocess the photographs.

    Args:
        photos: (name, PIL image). weights: a state_dict's file, or None for seeded initialisation.
        size: pixels of the network's input.
    """
    state = None if weights is None else read_weights(weights)
    head = None if state is None else state.get("fc.weight", state.get("module.fc.weight"))
    classes = 1000 if head is None else len(head)
    torch.manual_seed(seed)
    model, source = _new_model(name, classes)
    images = torch.stack([preprocess(photo, size) for _, photo in photos])
    images = images.contiguous(memory_format=torch.channels_last)
    if state is not None and weights is not None:
        fit(model, state, weights, name)
    else:
        with rf.use_backend("reference"):
            _estimate_statistics(model, images)
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    told = str(weights) if weights else "seeded initialisation, statistics of these photographs"
    names = [name for name, _ in photos]
    known = _categories(weights, classes)
    return Prepared(model, source, told, weights is not None, names, images, known)


@torch.no_grad()
def compare(prepared: Prepared, budget: float, report: Callable[[float], None]) -> Comparison:
    """Run the model over the photographs both ways, then time one batch in turn.

    budget: seconds of timing. report: called with the share of the work that is done, 0 to 1.
    """
    sides = _sides(prepared.model, prepared.source)
    batches = prepared.images.split(BATCH)
    logits: dict[str, Tensor] = {}
    for done, (side, run) in enumerate(sides.items(), 1):
        logits[side] = torch.cat([run(batch).float() for batch in batches])
        report(0.1 * done)
    turns = _time(sides, batches[0], budget, lambda share: report(0.2 + 0.8 * share))
    fast = sides[FAST]
    assert isinstance(fast, nn.Module)
    return Comparison(prepared, logits, turns, len(batches[0]), fast)


def _time(
    sides: dict[str, Callable[[Tensor], Tensor]],
    batch: Tensor,
    budget: float,
    report: Callable[[float], None],
) -> Turns:
    """Both sides on one batch in turn, until ``budget`` seconds are spent (at least 3 rounds)."""
    turns = Turns()
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < budget or len(turns.seconds[FAST]) < 3:
        for side, run in sides.items():
            start = time.perf_counter()
            run(batch)
            turns.seconds[side].append(time.perf_counter() - start)
        report(min(1.0, spent / budget))
    report(1.0)
    return turns
