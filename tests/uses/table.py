# SPDX-License-Identifier: BSD-3-Clause
"""Write docs/uses.md from the rows that tests/uses/ asserts: `python tests/uses/table.py`."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "uses.md"

HEAD = """\
# Ways of use

Written by `python tests/uses/table.py` from the rows that `tests/uses/` asserts: each is run on the
untouched model and on the fast ones, with outputs, gradients, statistics and end results equal, and
with the reasons of every fallback checked. Speed ratios belong here once rows under `bench/results`
measure them; none does yet.

| row | way of use | path | why |
|---|---|---|---|
"""


def ways() -> list[Any]:
    """Every test file's WAY, by number."""
    modules = (importlib.import_module(p.stem) for p in sorted(HERE.glob("test_u*.py")))
    return [module.WAY for module in modules]


def page() -> str:
    """docs/uses.md as it should be."""
    from ways import EXCEPT, FALLS_BACK, FAST

    rows = ways()
    lines = [f"| {w.number} | {w.name} | {w.status} | {w.why} |" for w in rows]
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
