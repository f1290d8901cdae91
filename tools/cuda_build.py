# SPDX-License-Identifier: BSD-3-Clause
"""What of the CUDA part can be built on this machine: nvcc, the cards to build for, the flags."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

OLDEST = 80  # sm_80: the kernels use nothing older cards lack, but nobody tests on them
# Ampere's code also runs on Ada; PTX of the last serves what comes after it.
DEFAULT = ("8.0", "9.0a", "10.0+PTX")


class NoCuda(Exception):
    """Why the CUDA part is not built here."""


@dataclass
class Cuda:
    """A CUDA compiler and what it compiles for."""

    nvcc: Path
    version: str
    architectures: tuple[str, ...]  # "9.0", "9.0a", "10.0+PTX"

    @property
    def library(self) -> Path:
        """The folder of libcudart_static.a."""
        root = self.nvcc.resolve().parent.parent
        folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
        for folder in folders:
            if (folder / "libcudart_static.a").exists():
                return folder
        raise NoCuda(f"libcudart_static.a is not beside {self.nvcc.name}")

    def code_flags(self) -> str:
        """nvcc's -gencode options."""
        flags = []
        for architecture in self.architectures:
            number, _, ptx = architecture.partition("+")
            number = number.replace(".", "")
            flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
        return " ".join(flags)


def find() -> Cuda | None:
    """What to build for CUDA, by RESNET_FAST_BUILD_CUDA; raises NoCuda with a sentence.

    "auto" (the default): CUDA where nvcc is; "0": never, None is returned; "1": as auto, and the
    caller makes NoCuda an error.
    """
    setting = os.environ.get("RESNET_FAST_BUILD_CUDA", "auto").strip().lower()
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"RESNET_FAST_BUILD_CUDA must be auto, 0 or 1; got {setting!r}")
    if setting == "0":
        return None
    nvcc = _find_nvcc()
    if nvcc is None:
        raise NoCuda("no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or int(release[1]) < 12:
        raise NoCuda(f"CUDA 12 or newer is needed; nvcc is {release[0] if release else 'unknown'}")
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
    ).stdout.split()
    found = Cuda(nvcc, f"{release[1]}.{release[2]}", architectures(known))
    _ = found.library  # raises here, and not in the middle of the build
    return found


def required() -> bool:
    """Whether the build must fail where CUDA cannot be built."""
    return os.environ.get("RESNET_FAST_BUILD_CUDA", "auto").strip() == "1"


def architectures(known: list[str]) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST without what is too old for the kernels, or all that nvcc knows of ours.

    known: what nvcc can compile for ("sm_80", ...). Raises NoCuda where nothing is left, and
    SystemExit for a text that is no architecture.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not asked.strip():
        newest = [a for a in DEFAULT if _code(a) in known]
        if not newest:
            raise NoCuda("nvcc knows none of the cards that the kernels are written for")
        return tuple(newest)
    wanted = []
    for text in re.split(r"[;,\s]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if match is None:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST: "{text}" is not like 8.0, 9.0a or 10.0+PTX')
        if int(match[1] + match[2]) >= OLDEST:
            wanted.append(text)
    if not wanted:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST={asked} names no card of 8.0 or newer")
    return tuple(wanted)


def _code(architecture: str) -> str:
    """As nvcc lists it, which leaves out the letter of a family's own instructions."""
    return "sm_" + architecture.partition("+")[0].replace(".", "").rstrip("af")


def _find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    return None if found is None else Path(found)
