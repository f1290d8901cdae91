# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under the emulator: the C++ program of tests/kernels, with sanitizers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ with libasan and libubsan"
)
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


def run(program: Path, *suites: str) -> None:
    """A process of the program; it prints one line per failed case."""
    command = [str(program), *suites]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.rstrip().endswith(", 0 failed")


def test_kernels_under_the_emulator() -> None:
    """Numerics, masks, determinism, bounds, bytes moved."""
    program = build_program()
    with ThreadPoolExecutor(len(SUITES)) as pool:
        list(pool.map(lambda suites: run(program, *suites), SUITES))


@pytest.mark.slow
def test_traffic_of_the_other_layers() -> None:
    run(build_program(), "more_traffic")
