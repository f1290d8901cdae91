# SPDX-License-Identifier: BSD-3-Clause
"""docs/uses.md is what the rows say, and there is one file for every row."""

from __future__ import annotations

import table
from ways import EXCEPT, FALLS_BACK, FAST


def test_every_row_is_there_once() -> None:
    assert [way.number for way in table.ways()] == [f"U{i:02d}" for i in range(1, 33)]
    for way in table.ways():
        assert way.status in (FAST, EXCEPT, FALLS_BACK)
        assert bool(way.why) == (way.status != FAST)


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text() == table.page(), "run python tests/uses/table.py"
