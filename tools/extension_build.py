# SPDX-License-Identifier: BSD-3-Clause
"""The build of the extension: what was found on this machine, and the ninja file made of it.

Two modules: ``_kernels`` (operators; the stable ABI of torch 2.11, so that one binary serves all
later ones) and ``_build_info`` (pybind11). The CPU kernels are compiled once per instruction set
and chosen at run time.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

TARGET_TORCH = "0x020b000000000000"  # 2.11
INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
CPU_KERNELS = ("add_relu", "bn_apply", "bn_backward", "bn_stats", "table")
TORCH_SOURCES = ("tensors", "add_relu", "batch_norm_act", "batch_norm_phases", "register")


class CannotBuild(Exception):
    """Why the extension cannot be built here."""


@dataclass
class Plan:
    """What the build resolved."""

    compiler: str
    compiler_version: str
    torch_version: str
    torch_root: Path
    pybind_include: str
    instruction_sets: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        lines = {
            "compiler": f"{self.compiler} ({self.compiler_version})",
            "torch": f"{self.torch_version} (binary runs with 2.11 and newer)",
            "instruction sets": ", ".join(self.instruction_sets),
            "jobs": str(jobs()),
        }
        return "\n".join(f"resnet_fast build: {name}: {value}" for name, value in lines.items())

    def one_line(self) -> str:
        return f"{self.compiler_version}; torch {self.torch_version}"


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or one a core."""
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdigit() and int(text) > 0 else os.cpu_count() or 1


def resolve(root: Path) -> Plan:
    """Find compiler, torch and pybind11; raises CannotBuild with a sentence."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise CannotBuild("no C++ compiler found (g++, clang++ or $CXX)")
    try:
        import ninja  # noqa: F401
        import pybind11
        import torch
    except ImportError as error:
        raise CannotBuild(
            f"{error.name} is not importable here; install torch first and use"
            " `pip install --no-build-isolation`"
        ) from error
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not version:
        raise CannotBuild(f"{compiler} does not run")
    if not (root / "csrc").is_dir():
        raise CannotBuild("the sources under csrc/ are missing")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = INSTRUCTION_SETS if x86 else {"baseline": ""}
    return Plan(
        compiler=compiler,
        compiler_version=version[0],
        torch_version=torch.__version__,
        torch_root=Path(torch.__file__).parent,
        pybind_include=pybind11.get_include(),
        instruction_sets=sets,
    )


def build(plan: Plan, root: Path, work: Path, target: Path) -> None:
    """Write the ninja file under work, run it, and copy the two modules to target."""
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(plan, root))
    command = [sys.executable, "-m", "ninja", "-C", str(work), "-j", str(jobs())]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("resnet_fast: the extension failed to compile (see above)")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    # _kernels is no Python module: it is loaded by torch.ops.load_library.
    for name, file in (("_kernels.so", "_kernels.so"), (f"_build_info{suffix}", "_build_info.so")):
        # Replaced, not overwritten: a running process may have the old file mapped.
        fresh = target / f".{name}.new"
        shutil.copy2(work / file, fresh)
        fresh.replace(target / name)


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(plan: Plan, root: Path) -> str:
    """The whole build as ninja text."""
    csrc = root.absolute() / "csrc"
    common = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter"
    # Contraction off: a ReLU mask recomputed in the backward must round as the forward did.
    cpu = f"{common} -ffp-contract=off -Wno-psabi -Wno-maybe-uninitialized"
    include = plan.torch_root / "include"
    torch_flags = f"{common} -DTORCH_TARGET_VERSION={TARGET_TORCH} -isystem {include}"
    info = f"{common} -isystem {plan.pybind_include} -isystem {sysconfig.get_path('include')}"
    description = f"-DRF_BUILD_DESCRIPTION='\"{plan.one_line()}\"'"
    lines = [
        f"cxx = {plan.compiler}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "  description = link $out",
    ]

    def compile_one(source: Path, name: str, flags: str) -> str:
        lines.append(f"build {name}.o: compile {_escape(source)}")
        lines.append(f"  flags = {flags}")
        return f"{name}.o"

    isa = compile_one(csrc / "cpu" / "isa.cpp", "isa", cpu)
    objects = [isa, compile_one(csrc / "cpu" / "kernels.cpp", "kernels", cpu)]
    for instruction_set, flags in plan.instruction_sets.items():
        for kernel in CPU_KERNELS:
            own = f"{cpu} {flags} -DRF_ISA={instruction_set}"
            name = f"{kernel}.{instruction_set}"
            objects.append(compile_one(csrc / "cpu" / f"{kernel}.cpp", name, own))
    for source in TORCH_SOURCES:
        objects.append(
            compile_one(csrc / "torch" / f"{source}.cpp", f"torch_{source}", torch_flags)
        )
    info_object = compile_one(csrc / "torch" / "build_info.cpp", "info", f"{info} {description}")
    libraries = f"-L{plan.torch_root / 'lib'} -ltorch_cpu -ltorch -lc10"
    lines += [
        f"build _kernels.so: link {' '.join(objects)}",
        f"  flags = {libraries}",
        f"build _build_info.so: link {info_object} {isa}",
        "  flags =",
        "default _kernels.so _build_info.so",
    ]
    return "\n".join(lines) + "\n"
