# SPDX-License-Identifier: BSD-3-Clause
"""Write docs/uses.md from the rows that tests/uses/ asserts: `python tests/uses/table.py`."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "uses.md"
RESULTS = ROOT / "bench" / "results" / "cpu.jsonl"
UNKNOWN = "not yet measured"

HEAD = """\
# Ways of use

Written by `python tests/uses/table.py` from the rows that `tests/uses/` asserts: each is run on the
untouched model and on the fast ones, with outputs, gradients, statistics and end results equal, and
with the reasons of every fallback checked. Speed is eager's time over ours, the median of rounds in
turn, from the newest rows `use` of `bench/results/cpu.jsonl`, which
`python -m resnet_fast bench --uses` writes. The tests fuse tensors of any size; as users have it,
plain residual blocks on fewer than 131,072 float32 values train by PyTorch's operators.

| row | way of use | path | speed against eager | why |
|---|---|---|---|---|
"""


def ways() -> list[Any]:
    """Every test file's WAY, by number."""
    modules = (importlib.import_module(p.stem) for p in sorted(HERE.glob("test_u*.py")))
    return [module.WAY for module in modules]


def speeds(results: Path = RESULTS) -> dict[str, str]:
    """For each number with a row of kind "use", what its newest one says."""
    found: dict[str, str] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "use" and row["provider"] == "ours" and not row["quick"]:
            shape = "x".join(map(str, row["shape"]))
            found[row["row"]] = (
                f"{row['ratio_vs_eager']:.2f}x ({row['mode']}: {row['name']}, {shape}, "
                f"{row['threads']} threads)"
            )
    return found


def page() -> str:
    """docs/uses.md as it should be."""
    from ways import EXCEPT, FALLS_BACK, FAST

    rows, speed = ways(), speeds()
    lines = [
        f"| {w.number} | {w.name} | {w.status} | {speed.get(w.number, UNKNOWN)} | {w.why} |"
        for w in rows
    ]
    counts = Counter(way.status for way in rows)
    tail = (
        f"\nOf {len(rows)} rows {counts[FAST]} run every block on the fast path, {counts[EXCEPT]} "
        f"do but for the exception named, and {counts[FALLS_BACK]} fall back.\n"
    )
    return HEAD + "\n".join(lines) + "\n" + tail


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    import shims

    shims.import_torchvision()
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}: {len(ways())} rows")
