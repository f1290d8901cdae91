# SPDX-License-Identifier: BSD-3-Clause
"""Result rows: JSON objects, one a line, appended and never rewritten.

Fields of every row: ``time`` (UTC, ISO), ``commit`` ("+dirty" where the tree differs), ``cpu``,
``threads``, ``torch``, ``version``, ``quick``, ``kind``, ``name`` (op or model), ``shape``,
``dtype``, ``layout``, ``allocator`` ("default" or "tuned"), ``provider`` ("eager", "compile" or
"ours"), ``mode``.

Kinds and what they add:

- ``op``      p20 p50 p80 (s), rounds, count, bytes, share_of_copy, ratio_vs_eager, ratio_vs_compile
- ``total``   the op rows summed over a network's layers, each times its count: p20 p50 p80, ratios
- ``copy``    p20 p50 p80 of one copy, bytes, bytes_per_second, over the whole process; an op's
              share_of_copy refers to the copies right before and after it
- ``model``   one training step: p20 p50 p80, rounds, ratios (eager is of the same layout)
- ``apart``   one training step, each rival in a process of its own with that allocator: as model
- ``memory``  memory_bytes: activations saved for backward, by unique storage
- ``inference``  one call in eval mode: p50 p95 (s), images_s, rounds, memory_bytes (how far
              resident memory rises), difference (from float32 eager, relative, in norm), note
              where a rival is not quite what its dtype says; ours also ratio_vs_best, best_rival,
              ratio_vs_eager. dtype "int8" has eager in float32 beside it
- ``profile``  one kernel launch under ncu: seconds, dram (share of its peak); shape is the grid
- ``overhead``  a network on 32 px, accelerate(), or loading for inference ("load", of which
              torch.export takes "trace"): p20 p50 p80, rounds, ratio_vs_eager
- ``use``     one step of a way of use, ``row`` of docs/uses.md: p20 p50 p80, rounds, ratio_vs_eager
- ``failed``  a rival that could not run, with its ``error``

Rows of a GPU have ``card``, ``driver`` and ``cuda`` as well, ``graph`` (whether a CUDA graph was
replayed).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import resnet_fast as rf

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "cpu.jsonl"
KEY = (
    "card",
    "cpu",
    "threads",
    "kind",
    "name",
    "shape",
    "dtype",
    "layout",
    "allocator",
    "provider",
    "mode",
)


def _git(*args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def commit() -> str:
    """Short commit of the checkout, "+dirty" where tracked files differ; "unknown" without git."""
    try:
        short = _git("rev-parse", "--short=10", "HEAD")
        # The result files change with every run and say nothing about the code measured.
        changed = _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return short + ("+dirty" if changed else "")


def context(allocator: str, quick: bool) -> Row:
    """The fields that every row of one process shares."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": rf.env.report()["processor"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": rf.__version__,
        "allocator": allocator,
        "quick": quick,
    }


def append(path: Path, row: Row) -> None:
    """Add one row; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def load(path: Path) -> list[Row]:
    """All rows in file order. ValueError names the line that is not a JSON object."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a JSON row: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row per key, the last one written, in order of the keys' first appearance."""
    latest: dict[str, Row] = {}
    for row in rows:
        latest[json.dumps([row.get(field) for field in KEY])] = row
    return list(latest.values())
