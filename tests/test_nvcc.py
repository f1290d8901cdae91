# SPDX-License-Identifier: BSD-3-Clause
"""Every CUDA source compiles for every card, and ptxas reports what the launchers plan for.

The build of the extension keeps ptxas's reports beside its objects. Where it built for other cards,
or the sources are newer, they are compiled here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "ninja" / "cuda"
SOURCES = sorted((CSRC / "launch").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
THREADS = 256  # kThreads of csrc/kernels/platform.cuh
REGISTERS = 65536  # of a multiprocessor, on every card since sm_50
# Kernel, by a part of its mangled name: the constant that says how many blocks the launcher plans
# per multiprocessor.
PLANNED = {
    "add_relu_kernel": "kAddReluBlocksPerSm",
    "add_relu_backward_kernel": "kAddReluBlocksPerSm",
    "channel_reduce_kernelINS_7BnStats": "kBnStatsBlocksPerSm",
    "channel_reduce_kernelINS_6BnGrad": "kBnGradBlocksPerSm",
    "merge_partials_kernel": "kMergeBlocksPerSm",
    "bn_apply_kernel": "kBnApplyBlocksPerSm",
    "bn_fused_kernel": "kBnFusedBlocksPerSm",
    "bn_grad_apply_kernel": "kBnGradApplyBlocksPerSm",
}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int


Kernels = dict[str, list[Kernel]]  # by source


def newest_of(source: Path) -> float:
    """When the source or a header was last written."""
    headers = [p for d in ("kernels", "launch") for p in (CSRC / d).glob("*.*h")]
    return max(path.stat().st_mtime for path in [source, *headers])


def report_of(source: Path, folder: Path) -> str:
    """ptxas's report of one source for every architecture."""
    built = OBJECTS / f"{source.stem}.o.ptxas"
    if built.exists() and built.stat().st_mtime >= newest_of(source):
        text = built.read_text()
        if all(f"for 'sm_{architecture}'" in text for architecture in ARCHITECTURES):
            return text
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{source.name}:\n{result.stderr[-4000:]}"
    return result.stderr


def parse(report: str) -> list[Kernel]:
    """The kernels of a ``-Xptxas -v`` report."""
    kernels = []
    for block in re.split(r"Compiling entry function ", report)[1:]:
        name = re.match(r"'(\w+)' for 'sm_(\w+)'", block)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block)
        used = re.search(r"Used (\d+) registers", block)
        assert name, block
        assert stack, block
        assert used, block
        spills = int(stack[2]) + int(stack[3])
        kernels.append(Kernel(name[1], name[2], int(used[1]), int(stack[1]), spills))
    return kernels


def blocks_per_sm() -> dict[str, int]:
    """The constants of the kernels' headers."""
    text = "".join(p.read_text() for p in sorted((CSRC / "kernels").glob("*.cuh")))
    return {k: int(v) for k, v in re.findall(r"constexpr int (k\w+BlocksPerSm) = (\d+);", text)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda source: report_of(source, folder), SOURCES))
    return {source.name: text for source, text in zip(SOURCES, texts, strict=True)}


@pytest.fixture(scope="module")
def kernels(reports: dict[str, str]) -> Kernels:
    return {name: parse(text) for name, text in reports.items()}


def test_no_warnings(reports: dict[str, str]) -> None:
    """The build itself goes on after a warning of nvcc's or ptxas's."""
    assert not [
        line for text in reports.values() for line in text.splitlines() if "warning" in line
    ]


def test_every_source_has_kernels_for_every_card(kernels: Kernels) -> None:
    assert len(SOURCES) >= 5
    for place, found in kernels.items():
        assert {k.architecture for k in found} == set(ARCHITECTURES), place


def test_no_spills_and_no_stack(kernels: Kernels) -> None:
    bad = [(place, k) for place, found in kernels.items() for k in found if k.spills or k.stack]
    assert not bad


def test_registers_allow_the_planned_occupancy(kernels: Kernels) -> None:
    constants = blocks_per_sm()
    for place, found in kernels.items():
        for kernel in found:
            planned = [c for part, c in PLANNED.items() if part in kernel.name]
            assert len(planned) == 1, f"{kernel.name} of {place} is not in PLANNED"
            # Registers are given out in eights per thread.
            held = -(-kernel.registers // 8) * 8 * THREADS * constants[planned[0]]
            assert held <= REGISTERS, (place, kernel, constants[planned[0]])
