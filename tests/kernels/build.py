# SPDX-License-Identifier: BSD-3-Clause
"""Build the kernel test program: ``python tests/kernels/build.py`` prints its path.

The kernels and launchers are compiled for the emulator with AddressSanitizer and UBSan, by make's
rules in miniature: a source is compiled again when it or a header is newer than its object.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "test_kernels"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
FLAGS = (
    "-std=c++17", "-DRF_EMULATE", "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-strict-aliasing",
    "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}",
)  # fmt: skip
# The emulator's own bookkeeping is not what is under test, and its speed is the tests' speed.
UNCHECKED = {"emulator.cpp", "access_log.cpp"}


def sources() -> list[Path]:
    """The emulator, every launcher, every test."""
    folders = (CSRC / "emulator", CSRC / "launch", Path(__file__).parent)
    return [p for d in folders for p in sorted(d.iterdir()) if p.suffix in {".cpp", ".cu"}]


def compile_one(source: Path, headers_time: float, compiler: str) -> Path:
    """Compile one source if its object is out of date; return the object."""
    target = BUILD / f"{source.parent.name}_{source.stem}.o"
    newest = max(headers_time, source.stat().st_mtime)
    if not target.exists() or target.stat().st_mtime < newest:
        flags = FLAGS if source.name in UNCHECKED else (*FLAGS, *SANITIZERS)
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
    return target


def build(jobs: int = 2) -> Path:
    """Compile and link what is out of date; return the program's path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    headers = [p for d in (CSRC, Path(__file__).parent) for p in d.rglob("*.*h")]
    headers_time = max(p.stat().st_mtime for p in [*headers, Path(__file__)])
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda s: compile_one(s, headers_time, compiler), sources()))
    program = BUILD / "test_kernels"
    if not program.exists() or program.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        subprocess.run([compiler, *SANITIZERS, *map(str, objects), "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
