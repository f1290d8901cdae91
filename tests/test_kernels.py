# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under the emulator: the C++ program of tests/kernels, with sanitizers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "kernels"
# Two processes of about equal length.
SUITES = (("emulator", "add_relu", "batch_norm"), ("phases", "traffic"))


def build_program() -> Path:
    spec = importlib.util.spec_from_file_location("kernel_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.build()
    return path


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with libasan and libubsan")
def test_kernels_under_the_emulator() -> None:
    """Numerics, masks, determinism, bounds, bytes moved: one line per failed case."""
    program = build_program()

    def run(suites: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        command = [str(program), *suites]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    with ThreadPoolExecutor(len(SUITES)) as pool:
        results = list(pool.map(run, SUITES))
    for result in results:
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        assert result.stdout.rstrip().endswith(", 0 failed")
