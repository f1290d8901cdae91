# SPDX-License-Identifier: BSD-3-Clause
"""What was built, what was loaded, and the allocator: facts about this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import platform
import sys
from pathlib import Path
from types import ModuleType

import torch

from resnet_fast import _library, config

_HERE = Path(__file__).parent
_CPU_FILE, _CUDA_FILE = _HERE / "_kernels.so", _HERE / "_kernels_cuda.so"
_why_unavailable: str | None = "the extension has not been loaded yet"
_why_no_cuda: str | None = _why_unavailable
_build_info: ModuleType | None = None

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_INT_MAX = 2**31 - 1


def load_extension() -> None:
    """Load the compiled kernels beside this file, if there are any; never raises."""
    global _why_unavailable, _why_no_cuda, _build_info
    _why_unavailable = _try_load(
        _CPU_FILE, "the extension was not built (no compiler at installation?): the reference runs"
    )
    _why_no_cuda = _try_load(
        _CUDA_FILE, "the CUDA kernels were not built (no nvcc at installation?)"
    )
    if _why_unavailable is None:
        # The kernels serve every Python, this module only the one it was built for.
        with contextlib.suppress(ImportError):
            _build_info = importlib.import_module("resnet_fast._build_info")


def _try_load(file: Path, missing: str) -> str | None:
    if config.disabled:
        return "RESNET_FAST_DISABLE=1 is set"
    if not file.exists():
        return missing
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} did not load with torch {torch.__version__}: {error}"
    return None


def is_available(device: str = "cpu") -> bool:
    """True if the compiled kernels of a device type, "cpu" or "cuda", are loaded.

    Whether a given GPU can run them is a question of its own: see why_not_card.
    """
    return why_unavailable(device) is None


def why_unavailable(device: str = "cpu") -> str | None:
    """Why the compiled kernels of a device type are not loaded, in a sentence; None if they are.

    device: "cpu" or "cuda"; ValueError for any other.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda"; got {device!r}')
    return _why_unavailable if device == "cpu" else _why_no_cuda


# A compiler takes the answer as a constant: it does not change while the process lives.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_card(index: int) -> str:
    """Why the CUDA device of this index cannot run the loaded kernels; "" if it can."""
    return _ask_card(index)


@functools.cache
def _ask_card(index: int) -> str:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    probe = ctypes.CDLL(str(_CUDA_FILE)).resnet_fast_cuda_problem
    probe.restype = ctypes.c_char_p
    with torch.cuda.device(index):
        problem: bytes = probe()
        name = torch.cuda.get_device_name()
    return f"the CUDA kernels do not run on {name}: {problem.decode()}" if problem else ""


def instruction_set() -> str | None:
    """What the CPU kernels run in: "avx512", "avx2" or "baseline"; None where there are none."""
    return None if _build_info is None else str(_build_info.instruction_set())


def tune_cpu_memory() -> bool:
    """Keep freed memory for re-use, in this process, from here on (glibc only).

    By default glibc returns every large tensor to the system when it is freed, and the next one
    costs a page fault for each 4 KiB: for large operations that is most of the time. This asks
    ``mallopt`` to keep the memory (no mmap per tensor, no trimming). The process then holds its
    peak memory until it ends. Returns True if the settings were taken; elsewhere than on glibc it
    does nothing, says so in the log ("resnet_fast") and returns False.
    """
    from resnet_fast.dispatch import logger

    if platform.libc_ver()[0] != "glibc":
        logger.warning("tune_cpu_memory: only glibc is supported; nothing was changed")
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _INT_MAX), (_M_TOP_PAD, 64 << 20))
    taken = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings]
    return all(taken)


def report() -> dict[str, str]:
    """Versions, build and hardware as text, for bug reports; every probe is guarded."""

    def guarded(probe: object) -> str:
        try:
            return str(probe() if callable(probe) else probe)
        except Exception as error:  # the report must always print
            return f"unknown ({type(error).__name__}: {error})"

    from resnet_fast._version import __version__

    probes: dict[str, object] = {
        "resnet_fast": __version__,
        "extension": lambda: why_unavailable() or "loaded",
        "CUDA kernels": lambda: why_unavailable("cuda") or "loaded",
        "instruction set": lambda: instruction_set() or "-",
        "build": lambda: "-" if _build_info is None else _build_info.description(),
        "operators": lambda: ", ".join(s.split("(")[0] for s in _library.SCHEMAS),
        "backend": config.backend,
        "switches": lambda: (
            f"DISABLE={int(config.disabled)} REQUIRE={int(config.required)} LOG={config.log_level}"
        ),
        "torch": lambda: torch.__version__,
        "torch threads": torch.get_num_threads,
        "CUDA": _card,
        "processor": _processor,
        "system": platform.platform,
        "Python": lambda: sys.version.split()[0],
    }
    return {name: guarded(probe) for name, probe in probes.items()}


def _card() -> str:
    if not torch.cuda.is_available():
        return "not available"
    problem = why_unavailable("cuda") or why_not_card(torch.cuda.current_device())
    return f"{torch.cuda.get_device_name()} ({problem or 'kernels run'})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
