# SPDX-License-Identifier: BSD-3-Clause
"""The table that explain() prints of an optimized module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One step: the module it comes from, what it does, what runs it, and why not a faster way."""

    module: str
    step: str
    implementation: str
    reason: str


class Table:
    """``rows`` as data, ``print(...)`` as a table."""

    def __init__(self, rows: Sequence[Row], remark: str = "") -> None:
        self.rows = list(rows)
        self.remark = remark

    def __str__(self) -> str:
        table = [("module", "step", "implementation", "reason"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths[:-1]))
        return "\n".join([*lines, *([self.remark] if self.remark else [])])

    __repr__ = __str__
