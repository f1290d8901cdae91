# SPDX-License-Identifier: BSD-3-Clause
"""Convs that run what was measured to be the fastest, shape by shape.

What depends on the device is a Platform: CUDA's is cuda.py; the tests have one for the CPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from resnet_fast.dispatch import logger
from resnet_fast.inference import candidates
from resnet_fast.inference.agree import Trial
from resnet_fast.inference.candidates import Conv
from resnet_fast.inference.fold import MAX_SIZES, ConvSpec, folded
from resnet_fast.inference.plan import PLAIN, ConvKey, Entry, Plan
from resnet_fast.layout import accumulate_dtype

NOT_YET = "measured at the first call of a shape"


class Platform(Protocol):
    """What is asked of a device."""

    def name(self) -> str:
        """The card's, for the plan."""

    def versions(self) -> str:
        """Of the libraries on which speed and results depend."""

    def settings(self, dtype: torch.dtype) -> str:
        """PyTorch's switches, as they are now, by which the same call runs other code."""

    def graph_settings(self, dtype: torch.dtype) -> str:
        """The same of all that a recorded graph holds fixed."""

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        """The dtype to calculate in, and why it is another one ("" if not)."""

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        """The layout to calculate in."""

    def recording(self) -> bool:
        """Whether work is only being recorded, so that nothing can be measured."""

    def seconds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The median time of each call, taken in turn."""


# Two measurements at a time would each time the other, too.
_measuring = threading.Lock()


class MeasuredKernels:
    """Convs for a device on which the fastest candidate is found by measuring."""

    in_pieces = False

    def __init__(self, device: torch.device, platform: Platform, plan: Plan) -> None:
        self.device, self.platform, self.plan = device, platform, plan
        self._convs: weakref.WeakSet[MeasuredConv] = weakref.WeakSet()
        self._settings: str | None = None

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        return self.platform.compute_dtype(dtype)

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        return self.platform.memory_format(dtype)

    def begin(self, dtype: torch.dtype) -> str:
        """What graphs depend on, before a call; choices made under other settings are forgotten."""
        settings = self.platform.settings(dtype)
        if settings != self._settings:
            self._settings = settings
            for conv in list(self._convs):
                conv.forget()
        return self.platform.graph_settings(dtype)

    def make_conv(
        self, spec: ConvSpec, values: Mapping[fx.Node, Any], dtype: torch.dtype
    ) -> tuple[Conv, Callable[[], tuple[str, str]]]:
        weight, bias = folded(spec, values)
        weight = weight.to(dtype).contiguous(memory_format=self.memory_format(dtype))
        bias = None if bias is None else bias.to(accumulate_dtype(dtype))
        conv = MeasuredConv(spec, weight, bias, self)
        self._convs.add(conv)
        return conv, conv.describe


class MeasuredConv:
    """The function of (x) or (x, residual); for each shape of x it runs what was chosen."""

    def __init__(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None, kernels: MeasuredKernels
    ) -> None:
        self.known: dict[torch.Size, Conv] = {}
        # Functions that were chosen, each once under each settings. None is ever let go: recorded
        # graphs read the weights that they hold.
        self._kept: dict[tuple[str, candidates.Candidate], Conv] = {}
        self._spec, self._weight, self._bias = spec, weight, bias
        self._platform, self._plan = kernels.platform, kernels.plan
        self._type = kernels.device.type
        self._layout = kernels.memory_format(weight.dtype)
        self._plain = candidates.plain(spec, weight, bias)
        self._chosen: dict[tuple[int, ...], tuple[str, str]] = {}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.known.get(x.shape) or self._choose(x, residual)
        return conv(x) if residual is None else conv(x, residual)

    def describe(self) -> tuple[str, str]:
        """(the candidate chosen, of several shapes each; why others are left out) for explain."""
        chosen = dict(self._chosen)
        if not chosen:
            return PLAIN, NOT_YET
        names = {name for name, _ in chosen.values()}
        reasons = dict.fromkeys(why for _, why in chosen.values() if why)
        if len(names) == 1:
            return names.pop(), "; ".join(reasons)
        by_shape = (f"{'x'.join(map(str, shape))}: {name}" for shape, (name, _) in chosen.items())
        return " | ".join(by_shape), "; ".join(reasons)

    def forget(self) -> None:
        """Choose anew at the next call of each shape."""
        self.known.clear()
        self._chosen.clear()

    # ---- choosing --------------------------------------------------------------------------------
    def _choose(self, x: Tensor, residual: Tensor | None) -> Conv:
        if x.numel() == 0 or self._platform.recording():
            return self._plain  # and ask again at the next call
        with _measuring:
            shape = x.shape
            if shape not in self.known:
                name, conv, why = self._found(x, residual)
                for kept in (self.known, self._chosen):
                    if len(kept) >= MAX_SIZES:
                        kept.clear()
                self._chosen[tuple(shape)] = name, why
                self.known[shape] = conv
            return self.known.get(shape, self._plain)

    def _found(self, x: Tensor, residual: Tensor | None) -> tuple[str, Conv, str]:
        """(name, conv, why others are left out) from the plan, else by measuring."""
        key = self._key(x)
        others = {c.name: c for c in candidates.registered(self._type, self._spec)}
        entry = self._plan.get(key)
        if entry is not None and entry.covers({PLAIN, *others}):
            try:
                return self._planned(entry, key, others, x, residual)
            except Exception as error:
                logger.warning("the plan's %s failed, measured anew: %s", entry.chosen, error)
        if not self._plan.measure:
            return PLAIN, self._plain, "not in the plan, which does not measure"
        try:
            entry, conv = self._measured(key, others)
        except Exception as error:  # out of memory, say: nothing that holds for the next process
            why = f"nothing was measured: {_reason(error)}"
            logger.warning("%s: %s", self._spec.name, why)
            return PLAIN, self._plain, why
        self._plan.put(key, entry)
        if entry.chosen != PLAIN:
            self._kept[key.settings, others[entry.chosen]] = conv
        return entry.chosen, conv, _reasons(entry.refused)

    def _planned(
        self,
        entry: Entry,
        key: ConvKey,
        others: Mapping[str, candidates.Candidate],
        x: Tensor,
        residual: Tensor | None,
    ) -> tuple[str, Conv, str]:
        """What the plan says, tried once: on this machine it may be refused after all."""
        if entry.chosen == PLAIN:
            return PLAIN, self._plain, _reasons(entry.refused)
        conv = self._make(others[entry.chosen], key.settings)
        conv(x) if residual is None else conv(x, residual.clone())
        self._kept[key.settings, others[entry.chosen]] = conv
        return entry.chosen, conv, _reasons(entry.refused)

    def _measured(
        self, key: ConvKey, others: Mapping[str, candidates.Candidate]
    ) -> tuple[Entry, Conv]:
        refused: dict[str, str] = {}
        made: dict[str, Conv] = {}
        for name, candidate in others.items():
            try:
                made[name] = self._make(candidate, key.settings)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                refused[name] = _reason(error)
        if not made:
            return Entry(PLAIN, {}, refused), self._plain
        trial = Trial(self._spec, self._weight, self._bias, key.input, self._layout, self._plain)
        admitted = {PLAIN: self._plain}
        for name, conv in made.items():
            try:
                why = trial.disagrees(conv)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                why = _reason(error)
            if why:
                refused[name] = why
            else:
                admitted[name] = conv
        if len(admitted) == 1:
            return Entry(PLAIN, {}, refused), self._plain
        seconds = self._platform.seconds({n: trial.call(conv) for n, conv in admitted.items()})
        chosen = min(seconds, key=seconds.__getitem__)
        return Entry(chosen, seconds, refused), admitted[chosen]

    def _make(self, candidate: candidates.Candidate, settings: str) -> Conv:
        """The candidate's function; one for all shapes that chose it, as it may hold weights."""
        kept = self._kept.get((settings, candidate))
        return kept or candidate.make(self._spec, self._weight, self._bias)

    def _key(self, x: Tensor) -> ConvKey:
        spec, dtype = self._spec, self._weight.dtype
        parts = ["conv", *["bias"] * (self._bias is not None), *["add"] * spec.residual]
        parts += [*["relu"] * spec.relu, *["max-pool"] * spec.max_pool]
        return ConvKey(
            device=self._platform.name(),
            versions=self._platform.versions(),
            settings=self._platform.settings(dtype),
            dtype=str(dtype).removeprefix("torch."),
            layout="channels_last" if self._layout is torch.channels_last else "contiguous",
            input=tuple(x.shape),
            weight=tuple(self._weight.shape),
            stride=tuple(spec.stride),
            padding=tuple(spec.padding),
            dilation=tuple(spec.dilation),
            groups=spec.groups,
            step=" + ".join(parts),
        )


def _reason(error: Exception) -> str:
    """An exception as a short sentence."""
    lines = str(error).strip().splitlines() or [""]
    told = lines[0][:200]
    if isinstance(error, candidates.Unsuitable):
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refused.items())
