# SPDX-License-Identifier: BSD-3-Clause
"""The timing core: rivals run in turn in one process, so that noise hits all of them alike.

A round runs every rival once, in the same order (A B C, A B C, ...). A ratio is taken inside each
round and the median over rounds is reported: a machine that slows down for a second changes both
sides of a round's ratio, and a disturbed round is an outlier that the median drops.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


class Quantiles(NamedTuple):
    """Seconds: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def quantile(values: list[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1) of a non-empty list, linear between neighbours."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass
class Timings:
    """Seconds of every rival, one entry per round; entry i of all rivals is the same round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min((len(times) for times in self.seconds.values()), default=0)

    def quantiles(self, name: str) -> Quantiles:
        times = self.seconds[name]
        return Quantiles(quantile(times, 0.2), quantile(times, 0.5), quantile(times, 0.8))

    def ratio(self, base: str, name: str) -> float:
        """Median over rounds of time(base) / time(name): above 1 where ``name`` is faster."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return quantile([slow / fast for slow, fast in pairs], 0.5)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect once, then keep the cycle collector out of the timed region."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(
    rivals: Mapping[str, Callable[[], object]],
    *,
    budget: float = 1.0,
    min_rounds: int = 3,
    max_rounds: int = 50,
    warmup: int = 2,
    settle: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run ``rivals`` in turn until ``budget`` seconds are spent.

    Args:
        rivals: name -> a call that does the whole work and keeps nothing alive.
        budget: seconds for the measured rounds, warm-up not included.
        min_rounds, max_rounds: bounds on the rounds, whatever the budget says.
        warmup: unmeasured rounds first; lazy work (compilation, page faults) ends up there.
        settle: unmeasured calls of a rival at each of its turns. A training loop repeats one model;
            its first step after a rival's pays for memory that the rival left in other pieces.
        clock: returns seconds; replaced in tests.
    """
    if not rivals:
        raise ValueError("measure() needs at least one rival")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    timings = Timings({name: [] for name in rivals})
    with gc_paused():
        for _ in range(warmup):
            for call in rivals.values():
                call()
        began = clock()
        for done in range(max_rounds):
            if done >= min_rounds and clock() - began >= budget:
                break
            for name, call in rivals.items():
                for _ in range(settle):
                    call()
                start = clock()
                call()
                timings.seconds[name].append(clock() - start)
    return timings
