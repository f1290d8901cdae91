# SPDX-License-Identifier: BSD-3-Clause
"""The GPU benchmark's arithmetic and rows, on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_inference, gpu_profile, gpu_timing

ROOT = Path(__file__).parent.parent


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


KERNEL = '"void resnet_fast::bn_apply_kernel<T1, (int)8, (bool)1>(T1)","(256, 1, 1)","(264, 1, 1)"'
NCU = f"""==PROF== Connected to process 7
==PROF== Disconnected from process 7
"ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"
"0",{KERNEL},"{gpu_profile.DRAM}","%","86.5"
"0",{KERNEL},"{gpu_profile.DURATION}","ns","1,250"
"1","other(int)","(256, 1, 1)","(8, 2, 1)","{gpu_profile.DURATION}","us","3.5"
"""


def test_rows_of_a_profile() -> None:
    (row,) = gpu_profile.rows_of(NCU)  # the second launch lacks a metric
    assert (row["kind"], row["name"], row["shape"]) == ("profile", "bn_apply_kernel", [264, 1, 1])
    assert row["seconds"] == pytest.approx(1.25e-6)
    assert row["dram"] == pytest.approx(0.865)
    assert "bn_apply_kernel 264x1x1" in gpu.table([row])[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [("==ERROR== ERR_NVGPUCTRPERM", "no table: ==ERROR=="), (NCU.replace('"us"', '"h"'), "'h'")],
)
def test_what_is_no_profile_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gpu_profile.rows_of(text)


@pytest.mark.parametrize("what", ["table", "plot"])
def test_no_rows_is_said(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([what, "--rows", str(tmp_path / "none.jsonl")]) == 1
    assert "no rows in" in capsys.readouterr().out


def test_the_commit_can_be_given() -> None:
    assert gpu.gpu_context("cpu", True, "abc")["commit"] == "abc"


INFERENCE = {
    "device": "cpu",
    "model": "resnet18",
    "size": 32,
    "cells": [(1, "bfloat16")],
    "compile": False,
    "seconds": 100.0,
    "seconds_each": 0.01,
}


def test_inference_rows() -> None:
    """As on a GPU but for the graphs, which the CPU has not: rows that say so."""
    rows: list[dict[str, Any]] = []
    assert gpu_inference.run(INFERENCE, rows.append, lambda text: None) == 0
    failed = [row for row in rows if row["kind"] == "failed"]
    assert {(row["provider"], row["mode"]) for row in failed} == {
        ("eager", gpu_inference.GRAPH),
        ("ours", gpu_inference.GRAPH),
    }
    assert all("CUDA graphs" in row["error"] for row in failed)
    done = {row["provider"]: row for row in rows if row["kind"] == "inference"}
    assert set(done) == {"eager", "ours"}
    assert done["ours"]["best_rival"] == "eager, eval"
    assert all(row["latency"] and row["images_s"] == 1 / row["p50"] for row in done.values())
    assert all(row["difference"] < 0.1 for row in done.values())
    shared = {"time": "", "card": "", "cpu": "", "threads": 1, "allocator": ""}
    assert len(gpu.table([{**shared, **row} for row in rows])) == 5


def test_inference_without_time_leaves_its_cells_out() -> None:
    rows: list[dict[str, Any]] = []
    options = {**INFERENCE, "cells": [(1, "bfloat16"), (2, "float16")], "seconds": 0.0}
    assert gpu_inference.run(options, rows.append, lambda text: None) == 2
    assert rows == []


def test_inference_batches_and_dtypes() -> None:
    options = gpu.parse(["inference", "--device", "cpu"])
    assert gpu.inference_options(options)["cells"] == [
        (1, "bfloat16"),
        (256, "bfloat16"),
        (1, "float16"),
        (256, "float16"),
    ]


AT_MOST = """
import time
from bench.gpu_inference import at_most
try:
    with at_most(0.02):
        time.sleep(10)
except TimeoutError as error:
    print(error)
with at_most(0.05):
    pass
time.sleep(0.1)
print("no alarm is left behind")
"""


def test_at_most_stops_what_asks_for_no_time() -> None:
    """In a process of its own: an alarm that nobody takes ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", AT_MOST], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["not done after 0 s", "no alarm is left behind"]
    assert done.returncode == 0, done.stderr
