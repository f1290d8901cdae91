# SPDX-License-Identifier: BSD-3-Clause
"""tools/gpu_check.sh where there is no GPU: its arguments, and a run that stands in for a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, limit: float = 60, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **settings},
    )


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--nonsense", "x"), ("one", "two")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: tools/gpu_check.sh [--dry-run] OUTDIR\n"


def outcomes(folder: Path) -> dict[str, str]:
    return dict(line.split("\t")[:2] for line in (folder / "stages.tsv").read_text().splitlines())


def test_when_the_time_is_up_the_stages_left_are_said(tmp_path: Path) -> None:
    done = run("--dry-run", str(tmp_path), SECONDS_IN_ALL="5")
    assert done.returncode == 0, done.stdout
    found = outcomes(tmp_path)
    assert found["kernels"] == found["models"] == found["table"] == "skipped: no time left"
    assert "no time left" in (tmp_path / "table.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert "finds no CUDA device; --dry-run" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("--dry-run", str(tmp_path), limit=600)
    assert done.returncode == 0, done.stdout[-2000:]
    stages = outcomes(tmp_path)
    done_stages = ("tests", "kernels", "models", "inference", "table")
    assert [stages[name] for name in done_stages] == ["ok"] * 5
    assert "tests collected" in (tmp_path / "log.txt").read_text()
    assert "resnet18 4x3x64x64" in (tmp_path / "table.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows}
    assert kinds >= {"copy", "op", "model", "inference"}
    # Only a GPU has CUDA graphs.
    assert all("CUDA graphs" in row["error"] for row in rows if row["kind"] == "failed")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
