# SPDX-License-Identifier: BSD-3-Clause
"""docs/uses.md is what the rows say, and there is one file for every row."""

from __future__ import annotations

import json
from pathlib import Path

import table
from ways import EXCEPT, FALLS_BACK, FAST


def test_every_row_is_there_once() -> None:
    assert [way.number for way in table.ways()] == [f"U{i:02d}" for i in range(1, 33)]
    for way in table.ways():
        assert way.status in (FAST, EXCEPT, FALLS_BACK)
        assert bool(way.why) == (way.status != FAST)


def test_speeds_are_the_newest_full_rows(tmp_path: Path) -> None:
    row = {
        "kind": "use",
        "row": "U02",
        "mode": "a step",
        "name": "net",
        "shape": [2, 3],
        "threads": 2,
    }
    rows = [
        row | {"provider": "ours", "quick": False, "ratio_vs_eager": 1.0},
        row | {"provider": "ours", "quick": False, "ratio_vs_eager": 1.234},
        row | {"provider": "ours", "quick": True, "ratio_vs_eager": 9.0},
        row | {"provider": "eager", "quick": False},
        {"kind": "op", "provider": "ours", "quick": False},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert table.speeds(path) == {"U02": "1.23x (a step: net, 2x3, 2 threads)"}


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text() == table.page(), "run python tests/uses/table.py"
