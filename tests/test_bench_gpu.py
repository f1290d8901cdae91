# SPDX-License-Identifier: BSD-3-Clause
"""The GPU benchmark's arithmetic and rows, on the CPU."""

from __future__ import annotations

import pytest

from bench import gpu, gpu_timing


@pytest.mark.parametrize(("size", "sets"), [(1 << 30, 2), (10 << 20, 15), (1, 32)])
def test_sets_together_are_three_times_l2(size: int, sets: int) -> None:
    assert gpu_timing.sets_needed(size, 50 << 20) == sets


def test_every_call_takes_the_next_set() -> None:
    seen: list[tuple[str, int]] = []
    rivals = {n: [lambda n=n, i=i: seen.append((n, i)) for i in range(3)] for n in "ab"}
    timings = gpu_timing.measure(rivals, device="cpu", budget=0, min_rounds=3, max_rounds=3)
    assert [i for _, i in seen] == [k % 3 for k in range(len(seen))]
    assert {len(times) for times in timings.seconds.values()} == {3}


def test_rivals_with_unequal_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of calls"):
        gpu_timing.measure({"a": [int], "b": []}, device="cpu", budget=0)


def test_file_name_of_a_card() -> None:
    assert gpu.file_stem("NVIDIA H200") == "nvidia-h200"
