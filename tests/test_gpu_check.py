# SPDX-License-Identifier: BSD-3-Clause
"""tools/gpu_check.sh where there is no GPU: its arguments, and a run that stands in for a card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, limit: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--nonsense", "x"), ("one", "two")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: tools/gpu_check.sh [--dry-run] OUTDIR\n"


def test_the_limits_are_ten_minutes_together() -> None:
    """Of a run on a GPU: the dry run's own stages left out."""
    script = (ROOT / "tools" / "gpu_check.sh").read_text()
    dry, _, rest = script.partition("if ((dry)); then\n  skip build")[2].partition("\nelse\n")
    assert "collect-only" in dry
    stages = re.findall(r"(?:^ *stage|^ *with \S+) (\w+) (\d+) ", rest, re.MULTILINE)
    assert {"build", "tests", "inference", "sanitizer", "plot"} <= {name for name, _ in stages}
    assert sum(int(limit) for _, limit in stages) <= 600


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("--dry-run", str(tmp_path), limit=600)
    assert done.returncode == 0, done.stdout[-2000:]
    stages = dict(
        line.split("\t")[:2] for line in (tmp_path / "stages.tsv").read_text().splitlines()
    )
    assert stages["kernels"] == "ok"
    assert stages["models"] == "ok"
    assert stages["inference"] == "ok"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} >= {"copy", "model", "inference"}
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
