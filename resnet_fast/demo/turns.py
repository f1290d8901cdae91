# SPDX-License-Identifier: BSD-3-Clause
"""Two rivals timed in turn: A B A B ..., so that noise of the machine hits both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

PLAIN, FAST = "plain", "accelerated"


@dataclass
class Turns:
    """Seconds of each turn of both sides; entry i of both is the same round."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], FAST: []})

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self) -> float:
        """Median over rounds of plain / accelerated: above 1 where the accelerated is faster."""
        pairs = zip(self.seconds[PLAIN], self.seconds[FAST], strict=True)
        return statistics.median(plain / fast for plain, fast in pairs)
