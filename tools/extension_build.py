# SPDX-License-Identifier: BSD-3-Clause
"""The build of the extension: what was found on this machine, and the ninja file made of it.

``_kernels`` and ``_kernels_cuda``: operators, in the stable ABI of torch 2.11, so that one binary
serves all later ones. ``_build_info``: pybind11. ``_emulated``: the CUDA kernels under the
emulator, for the tests of a checkout. The CPU kernels are compiled once per instruction set and
chosen at run time.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import cuda_build

TARGET_TORCH = "0x020b000000000000"  # 2.11
INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
CPU_KERNELS = (
    "add_relu",
    "bn_apply",
    "bn_backward",
    "bn_stats",
    "conv_direct",
    "conv_stem",
    "conv_winograd",
    "conv_winograd_pack",
    "conv_winograd_weight",
    "max_pool",
    "scaled_add_relu",
    "table",
)
LAUNCHERS = ("add_relu", "bn_apply", "bn_backward", "bn_fused", "bn_stats")
EMULATOR = ("emulator", "fiber", "access_log")
TORCH_GPU_SOURCES = (
    "common",
    "gpu/tensors",
    "gpu/add_relu",
    "gpu/batch_norm_act",
    "gpu/batch_norm_phases",
    "gpu/register",
)
TORCH_SOURCES = (
    "common",
    "cpu/tensors",
    "cpu/grad_input",
    "cpu/add_relu",
    "cpu/batch_norm_act",
    "cpu/batch_norm_phases",
    "cpu/conv",
    "cpu/conv_sequence",
    "cpu/max_pool",
    "cpu/scaled_add_relu",
    "cpu/register",
)


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
    cuda: cuda_build.Cuda | None = None
    no_cuda: str = "RESNET_FAST_BUILD_CUDA=0"
    emulated: bool = False  # also the test module

    def describe(self) -> str:
        lines = {
            "compiler": f"{self.compiler} ({self.compiler_version})",
            "torch": f"{self.torch_version} (binary runs with 2.11 and newer)",
            "instruction sets": ", ".join(self.instruction_sets),
            "CUDA": self.cuda_text(),
            "jobs": str(jobs()),
        }
        return "\n".join(f"resnet_fast build: {name}: {value}" for name, value in lines.items())

    def cuda_text(self) -> str:
        if self.cuda is None:
            return f"not built: {self.no_cuda}"
        return f"{self.cuda.version}, for {' '.join(self.cuda.architectures)}"

    def one_line(self) -> str:
        return f"{self.compiler_version}; torch {self.torch_version}; CUDA {self.cuda_text()}"


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or one a core."""
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdigit() and int(text) > 0 else os.cpu_count() or 1


def resolve(root: Path, *, emulated: bool) -> Plan:
    """Find compilers, torch and pybind11; raises CannotBuild with a sentence.

    emulated: plan the test module, too.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise CannotBuild("no C++ compiler found (g++, clang++ or $CXX)")
    try:
        import torch
    except ImportError:
        raise CannotBuild(
            "torch is not importable here; install it first and use"
            " `pip install --no-build-isolation`"
        ) from None
    if ninja_command() is None:
        raise CannotBuild("ninja was not found (`pip install ninja`)")
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not version:
        raise CannotBuild(f"{compiler} does not run")
    if not (root / "csrc").is_dir():
        raise CannotBuild("the sources under csrc/ are missing")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = INSTRUCTION_SETS if x86 else {"baseline": ""}
    plan = Plan(
        compiler=compiler,
        compiler_version=version[0],
        torch_version=torch.__version__,
        torch_root=Path(torch.__file__).parent,
        pybind_include=_pybind_include(Path(torch.__file__).parent),
        instruction_sets=sets,
        emulated=emulated,
    )
    try:
        plan.cuda = cuda_build.find()
    except cuda_build.NoCuda as reason:
        if cuda_build.required():
            raise SystemExit(f"resnet_fast: RESNET_FAST_BUILD_CUDA=1: {reason}") from None
        plan.no_cuda = str(reason)
    return plan


def ninja_command() -> list[str] | None:
    """How ninja is called: Python's package, or the program; None where there is neither."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    return None if program is None else [program]


def _pybind_include(torch_root: Path) -> str:
    """pybind11's own headers, else the copy that torch ships."""
    try:
        import pybind11
    except ImportError:
        return str(torch_root / "include")
    return str(pybind11.get_include())


def build(plan: Plan, root: Path, work: Path, target: Path) -> None:
    """Write the ninja file under work, run it, and copy the modules to target.

    The test module goes to build/emulated, away from what is installed.
    """
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(NinjaFile(plan, root).text())
    command = [*(ninja_command() or ["ninja"]), "-C", str(work), "-j", str(jobs())]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("resnet_fast: the extension failed to compile (see above)")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    # _kernels* are no Python modules: they are loaded by torch.ops.load_library.
    _replace(work / "_kernels.so", target / "_kernels.so")
    _replace(work / "_build_info.so", target / f"_build_info{suffix}")
    if plan.cuda is not None:
        _replace(work / "_kernels_cuda.so", target / "_kernels_cuda.so")
    else:
        (target / "_kernels_cuda.so").unlink(missing_ok=True)  # of an earlier build
    if plan.emulated:
        _replace(work / "_emulated.so", root / "build" / "emulated" / f"_emulated{suffix}")


def _replace(source: Path, target: Path) -> None:
    """Copy to a new file and rename: a running process may have the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    shutil.copy2(source, fresh)
    fresh.replace(target)


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The whole build as ninja text."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan = plan
        self.csrc = root.absolute() / "csrc"
        self.common = (
            f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter"
            f" -I{_escape(self.csrc)}"
        )
        include = _escape(plan.torch_root / "include")
        # Nobody reads errno: without it the loops over channels that take a root become vectors.
        torch = f"{self.common} -fno-math-errno -DTORCH_TARGET_VERSION={TARGET_TORCH}"
        self.torch = f"{torch} -isystem {include}"
        python = f"-isystem {plan.pybind_include} -isystem {sysconfig.get_path('include')}"
        # What it binds is called now and then: pybind11's templates are most of the compilation.
        self.pybind = f"{self.common} -O1 {python}"
        # libtorch.so is what brings in the CUDA half of PyTorch, where there is one: kept though
        # nothing is taken from it by name.
        self.torch_libraries = (
            f"-L{_escape(plan.torch_root / 'lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
        )
        self.lines = [
            f"cxx = {plan.compiler}",
            *_rule("compile", "$cxx -MMD -MF $out.d $flags -c $in -o $out"),
            *_rule("link", "$cxx -shared -o $out $in $flags", depends=False),
        ]
        self.modules: list[str] = []

    def text(self) -> str:
        isa = self.compile("cpu/isa.cpp", "isa", self.cpu_flags())
        self.cpu_module(isa)
        description = f"-DRF_BUILD_DESCRIPTION='\"{self.plan.one_line()}\"'"
        info = self.compile("torch/build_info.cpp", "info", f"{self.pybind} {description}")
        self.link("_build_info.so", [info, isa], "")
        if self.plan.cuda is not None:
            self.cuda_module(self.plan.cuda)
        if self.plan.emulated:
            self.emulated_module()
        return "\n".join([*self.lines, f"default {' '.join(self.modules)}"]) + "\n"

    def compile(self, source: str, name: str, flags: str, rule: str = "compile") -> str:
        self.lines.append(f"build {name}.o: {rule} {_escape(self.csrc / source)}")
        self.lines.append(f"  flags = {flags}")
        return f"{name}.o"

    def link(self, module: str, objects: list[str], flags: str) -> None:
        self.lines += [f"build {module}: link {' '.join(objects)}", f"  flags = {flags}"]
        self.modules.append(module)

    def cpu_flags(self) -> str:
        # Contraction off: a ReLU mask recomputed in the backward must round as the forward did.
        return f"{self.common} -ffp-contract=off -Wno-psabi -Wno-maybe-uninitialized"

    def cpu_module(self, isa: str) -> None:
        objects = [isa, self.compile("cpu/kernels.cpp", "kernels", self.cpu_flags())]
        for instruction_set, flags in self.plan.instruction_sets.items():
            for kernel in CPU_KERNELS:
                own = f"{self.cpu_flags()} {flags} -DRF_ISA={instruction_set}"
                name = f"{kernel}.{instruction_set}"
                objects.append(self.compile(f"cpu/{kernel}.cpp", name, own))
        for source in TORCH_SOURCES:
            objects.append(self.compile(f"torch/{source}.cpp", f"torch/{source}", self.torch))
        self.link("_kernels.so", objects, self.torch_libraries)

    def cuda_module(self, cuda: cuda_build.Cuda) -> None:
        self.lines.append(f"nvcc = {_escape(cuda.nvcc)}")
        # What ptxas says of registers and spills stays beside the object: the tests read it.
        compile_one = "$nvcc -MD -MF $out.d -Xptxas -v $flags -c $in -o $out"
        self.lines += _rule("cuda", f"{compile_one} >$out.ptxas 2>&1 || (cat $out.ptxas; false)")
        flags = (
            f"-std=c++17 -O3 -I{_escape(self.csrc)} -ccbin {self.plan.compiler.split()[0]}"
            f" -Xcompiler -fPIC,-fvisibility=hidden {cuda.code_flags()}"
        )
        objects = [self.compile(f"launch/{n}.cu", f"cuda/{n}", flags, "cuda") for n in LAUNCHERS]
        for source in TORCH_GPU_SOURCES:
            objects.append(self.compile(f"torch/{source}.cpp", f"cuda/{source}", self.torch))
        # cudart is linked statically and kept private: PyTorch may bring one of its own.
        runtime = (
            f"-L{_escape(cuda.library)} -Wl,--exclude-libs,libcudart_static.a"
            " -lcudart_static -ldl -lrt -lpthread"
        )
        self.link("_kernels_cuda.so", objects, f"{self.torch_libraries} {runtime}")

    def emulated_module(self) -> None:
        device = "-DRF_EMULATE -fno-strict-aliasing -ffp-contract=off"
        kernels = f"{self.common} -x c++ -O2 {device}"
        sources = [f"launch/{name}.cu" for name in LAUNCHERS]
        sources += [f"emulator/{name}.cpp" for name in EMULATOR]
        objects = [self.compile(s, f"emulated/{s}", kernels) for s in sources]
        for name in TORCH_GPU_SOURCES:
            own = f"{self.torch} -DRF_EMULATE"
            objects.append(self.compile(f"torch/{name}.cpp", f"emulated/torch/{name}", own))
        controls = f"{self.pybind} {device}"
        objects.append(self.compile("torch/emulated.cpp", "emulated/torch/emulated", controls))
        self.link("_emulated.so", objects, self.torch_libraries)


def _rule(name: str, command: str, *, depends: bool = True) -> list[str]:
    lines = [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
    return lines + (["  depfile = $out.d", "  deps = gcc"] if depends else [])
