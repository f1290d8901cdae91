# SPDX-License-Identifier: BSD-3-Clause
"""Timing on a GPU: CUDA events, a cold L2, CUDA graphs where launches would be what is timed.

Cold: a call finds none of its inputs in L2, as in a network, where everything else ran in between.
Each rival has the same number of sets of tensors, together several times L2, and every call takes
the next set, so a set was last touched a whole L2 ago. On the CPU, for dry runs, the clock is the
wall clock and nothing is captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .timing import Timings, gc_paused

MOST_SETS = 32
L2_TIMES = 3
# Above this a call takes a quarter of a millisecond on the fastest card: its launches from Python,
# a dozen for eager, are hidden behind it.
GRAPH_BELOW = 1 << 30

Call = Callable[[], object]


def sets_needed(bytes_of_call: int, l2_bytes: int) -> int:
    """How many sets of tensors make the next call's cold: 2 to MOST_SETS.

    bytes_of_call: what one call reads and writes. Raises ValueError unless it is positive.
    """
    if bytes_of_call <= 0:
        raise ValueError(f"bytes_of_call must be positive; got {bytes_of_call}")
    return min(MOST_SETS, max(2, -(-L2_TIMES * l2_bytes // bytes_of_call)))


class Clock:
    """Marks in the stream of work, and the seconds between them, read when all is done."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def captured(call: Call) -> Call:
    """The call as a CUDA graph to replay. It must not wait for the GPU nor read a result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # lazy work: libraries' handles, the compiler, momentum buffers
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def measure(
    rivals: Mapping[str, Sequence[Call]],
    *,
    device: str,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
    warmup: int = 2,
    batch: int = 5,
) -> Timings:
    """Run the rivals in turn, one set of tensors after the other, for about ``budget`` seconds.

    rivals: name -> one call per set; as many for each. The GPU is waited for only after every
    ``batch`` rounds, so that it never runs dry.
    """
    sets = {len(calls) for calls in rivals.values()}
    if len(sets) != 1 or 0 in sets:
        raise ValueError(f"every rival needs the same number of calls, at least one; got {sets}")
    (count,) = sets
    clock, timings = Clock(device), Timings({name: [] for name in rivals})
    turn = 0
    with gc_paused():
        for _ in range(warmup):
            for calls in rivals.values():
                calls[turn % count]()
                turn += 1
        began = time.perf_counter()
        done = 0
        while done < max_rounds and (done < min_rounds or time.perf_counter() - began < budget):
            marks = []
            for _ in range(min(batch, max_rounds - done)):
                for name, calls in rivals.items():
                    start = clock.mark()
                    calls[turn % count]()
                    marks.append((name, start, clock.mark()))
                    turn += 1
                done += 1
            for name, start, end in marks:
                timings.seconds[name].append(clock.seconds(start, end))
    return timings
