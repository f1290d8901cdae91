# SPDX-License-Identifier: BSD-3-Clause
"""Plans: which candidate runs each conv of a shape on a card, what was measured, kept in a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT, VERSION = "resnet_fast inference plan", 1
# Entries to keep, the oldest given up first; a ResNet has about twenty for each input shape.
MAX_ENTRIES = 4096
PLAIN = "F.conv2d"


class PlanError(ValueError):
    """A plan file that cannot be read, and why."""


@dataclass(frozen=True)
class ConvKey:
    """A conv as far as its speed goes, and where it runs. Shapes are (N, C, H, W).

    device: the card's name. versions: of PyTorch, cuDNN and this package. settings: of PyTorch, by
    which the same call runs other code ("tf32", "benchmark"). step: what is fused to the conv.
    """

    device: str
    versions: str
    settings: str
    dtype: str
    layout: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    step: str


@dataclass(frozen=True)
class Entry:
    """chosen: the fastest candidate's name. seconds: median time of a call, of each that was
    measured (none where only one could run). refused: why the others are left out."""

    chosen: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def covers(self, names: set[str]) -> bool:
        """Whether every candidate that there is now took part, so that the choice still holds."""
        return self.chosen in names and names <= {self.chosen, *self.seconds, *self.refused}


class Plan:
    """The choices of any number of modules, shapes and cards; safe to share between threads.

    ``optimize_for_inference(..., plan=plan)`` looks here before it measures and adds what it has
    measured. Entries of another card, version or setting are kept, and not used.

    measure: False if nothing may be measured; convs that have no entry then run F.conv2d.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure
        self._entries: dict[ConvKey, Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ConvKey) -> Entry | None:
        """The entry of this very key."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: ConvKey, entry: Entry) -> None:
        """Add or replace an entry."""
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = entry
            while len(self._entries) > MAX_ENTRIES:
                del self._entries[next(iter(self._entries))]

    def entries(self) -> dict[ConvKey, Entry]:
        """A copy of all entries, the oldest first."""
        with self._lock:
            return dict(self._entries)

    # ---- files -----------------------------------------------------------------------------------
    def save(self, path: Path | str) -> Path:
        """Write all entries as JSON; the file is replaced at once or, on an error, not at all."""
        entries = [
            {"conv": dataclasses.asdict(key), **dataclasses.asdict(entry)}
            for key, entry in self.entries().items()
        ]
        text = json.dumps({"format": FORMAT, "version": VERSION, "entries": entries}, indent=1)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
        return target

    @classmethod
    def load(cls, path: Path | str, measure: bool = True) -> Plan:
        """The plan of a file that save() wrote.

        Raises PlanError, a ValueError, where the file is no plan, of another version or damaged,
        and OSError where it cannot be opened.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is no plan: not JSON ({error})") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise PlanError(f"{path} is no plan: its format must be {FORMAT!r}")
        if found.get("version") != VERSION:
            raise PlanError(
                f"{path} has version {found.get('version')!r}; this resnet_fast reads {VERSION}: "
                "let it measure anew"
            )
        if not isinstance(found.get("entries"), list):
            raise PlanError(f"{path} is damaged: it has no list of entries")
        plan = cls(measure)
        for number, row in enumerate(found["entries"]):
            try:
                plan.put(*_entry_of(row))
            except (KeyError, TypeError, ValueError) as error:
                raise PlanError(f"{path} is damaged: entry {number}: {error}") from None
        return plan

    # ---- table -----------------------------------------------------------------------------------
    def __str__(self) -> str:
        if not self._entries:
            return "no entries: a plan fills at the first call of each shape"
        head = ("device", "dtype", "input", "conv", "step", "chosen", "microseconds", "left out")
        table = [head] + [_line(key, entry) for key, entry in self.entries().items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths[:-1]))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Plan of {len(self)} entries>"


def _line(key: ConvKey, entry: Entry) -> tuple[str, ...]:
    c_out, c_in, *kernel = key.weight
    conv = f"{c_in * key.groups}->{c_out} {_sizes(kernel)}"
    conv += f" /{_sizes(key.stride)}" * (set(key.stride) != {1})
    conv += f" groups {key.groups}" * (key.groups != 1)
    times = sorted(entry.seconds.items(), key=lambda item: item[1])
    measured = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times)
    refused = "; ".join(f"{name}: {why}" for name, why in entry.refused.items())
    dtype = f"{key.dtype} ({key.settings})" if key.settings else key.dtype
    what = (key.device, dtype, _sizes(key.input), conv, key.step)
    return *what, entry.chosen, measured or "not measured", refused


def _sizes(values: Any) -> str:
    return "x".join(map(str, values))


# ---- reading -------------------------------------------------------------------------------------
_LISTS = {"input": 4, "weight": 4, "stride": 2, "padding": 2, "dilation": 2}


def _entry_of(row: Any) -> tuple[ConvKey, Entry]:
    """An entry as it was saved; KeyError, TypeError or ValueError where something is wrong."""
    _fields("entry", row, {"conv", "chosen", "seconds", "refused"})
    given = row["conv"]
    _fields("conv", given, {f.name for f in dataclasses.fields(ConvKey)})
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _LISTS:
            whole = isinstance(value, list) and len(value) == _LISTS[name]
            if not whole or not all(type(n) is int and n >= 0 for n in value):
                raise ValueError(f"{name} must be {_LISTS[name]} sizes; got {value!r}")
            values[name] = tuple(value)
        elif not isinstance(value, int if name == "groups" else str):
            raise TypeError(f"{name} must not be {value!r}")
        else:
            values[name] = value
    chosen, seconds, refused = row["chosen"], row["seconds"], row["refused"]
    _names("seconds", seconds, float)
    _names("refused", refused, str)
    if not all(math.isfinite(t) and t > 0 for t in seconds.values()):
        raise ValueError(f"seconds must be positive; got {seconds!r}")
    if not isinstance(chosen, str) or (seconds and chosen not in seconds) or chosen in refused:
        raise ValueError(f"chosen must be one that was measured; got {chosen!r}")
    return ConvKey(**values), Entry(chosen, seconds, refused)


def _fields(what: str, given: Any, expected: set[str]) -> None:
    if not isinstance(given, dict) or set(given) != expected:
        raise ValueError(f"{what} must have the fields {', '.join(sorted(expected))}")


def _names(what: str, given: Any, kind: type) -> None:
    if not isinstance(given, dict) or not all(type(v) is kind for v in given.values()):
        raise TypeError(f"{what} must give a {kind.__name__} to each name; got {given!r}")
