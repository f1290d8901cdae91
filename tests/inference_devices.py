# SPDX-License-Identifier: BSD-3-Clause
"""A CPU that stands for a card: a timer that says what it is told, graphs that are functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.inference import candidates, module
from resnet_fast.inference.candidates import Candidate, Conv
from resnet_fast.inference.capture import Captured
from resnet_fast.inference.choose import MeasuredKernels
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.plan import PLAIN, Plan


class Card:
    """A Platform whose every answer is a field."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.card, self.libraries, self.switches = "card A", "torch 1", ""
        self.times = {PLAIN: 2.0, **(seconds or {})}
        self.timed: list[list[str]] = []
        self.is_recording = False

    def name(self) -> str:
        return self.card

    def versions(self) -> str:
        return self.libraries

    def settings(self, dtype: torch.dtype) -> str:
        return self.switches

    def graph_settings(self, dtype: torch.dtype) -> str:
        return self.switches

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        return dtype, ""

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        return torch.channels_last

    def recording(self) -> bool:
        return self.is_recording

    def seconds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        self.timed.append(list(calls))
        return {name: self.times[name] for name in calls}


class Recorder:
    """Graphs that call the function again, on their own inputs and into their own outputs."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.captures, self.replays = refuses, 0, 0
        self.order: list[str] = []
        self.is_recording = False

    def capture(self, function: Callable[..., list[Any]], inputs: Sequence[Tensor]) -> Captured:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.captures += 1
        outputs = function(*inputs)

        def replay() -> None:
            self.replays += 1
            self.order.append("replay")
            for old, new in zip(outputs, function(*inputs), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return Captured(replay, list(inputs), outputs)

    def enter(self) -> None:
        self.order.append("enter")

    def leave(self) -> None:
        self.order.append("leave")

    def finish(self) -> None:
        self.order.append("finish")

    def recording(self) -> bool:
        return self.is_recording


@contextlib.contextmanager
def registry(*given: Candidate) -> Iterator[None]:
    """These candidates, for the CPU, beside what is registered."""
    for candidate in given:
        candidates.register(candidate)
    try:
        yield
    finally:
        for candidate in given:
            candidates.unregister(candidate.name)


def candidate(name: str, change: Callable[[Tensor], Tensor] = lambda y: y) -> Candidate:
    """F.conv2d under another name, its result changed."""

    def make(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
        conv = candidates.plain(spec, weight, bias)
        return lambda *inputs: change(conv(*inputs))

    return Candidate(name, make, ("cpu",))


def failing(name: str, error: Exception) -> Candidate:
    """Serves every conv, it says, and raises when it is called."""

    def run(*inputs: Tensor) -> Tensor:
        raise error

    return Candidate(name, lambda *_: run, ("cpu",))


def on_card(monkeypatch: pytest.MonkeyPatch, card: Card, plan: Plan | None = None) -> Plan:
    """Make optimize_for_inference take the CPU for this card; the plan that it fills."""
    plan = Plan() if plan is None else plan
    monkeypatch.setattr(
        module, "kernels_for", lambda device, _: MeasuredKernels(device, card, plan)
    )
    return plan
