# SPDX-License-Identifier: BSD-3-Clause
"""The CPU's convolutions stay inside their buffers, in every instruction set this machine runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import extension_build  # noqa: E402

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

KERNELS = (
    "conv_winograd",
    "conv_winograd_pack",
    "conv_winograd_weight",
    "conv_direct",
    "conv_stem",
)


@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with libasan and libubsan")
def test_exact_buffers(instruction_set: str, tmp_path: Path) -> None:
    flags = extension_build.INSTRUCTION_SETS[instruction_set].split()
    sources = [ROOT / "tests" / "kernels_cpu" / "conv.cpp"]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in KERNELS]
    program = tmp_path / "conv"
    build = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", *SANITIZERS]
    build += [f"-I{ROOT / 'csrc'}", f"-DRF_ISA={instruction_set}", *flags]
    subprocess.run([*build, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.stdout == "clean\n", result.stderr[-4000:]
