# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under the emulator, as `torch.ops.resnet_fast_emulated` on CPU tensors.

The module comes from an in-place build (`pip install -e .`). Its operators have the package's
schemas; launchers and binding are the CUDA module's, compiled for the emulator.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from resnet_fast import _library

FOLDER = Path(__file__).resolve().parents[1] / "build" / "emulated"
# The operators behind functional.py, and the phases behind synchronised.py.
OPS = (
    "add_relu_forward",
    "add_relu_backward",
    "batch_norm_act_forward",
    "batch_norm_act_backward",
    "batch_norm_act_backward_",
)
PHASES = (
    "batch_norm_statistics",
    "batch_norm_act_backward_reduce",
    "batch_norm_act_backward_apply",
)
NAMES = (*OPS, *PHASES)
# A small card: fewer threads to emulate, and still several blocks a kernel.
FAST = {"count": False, "multiprocessors": 4}
_library_of_tests = torch.library.Library("resnet_fast_emulated", "DEF")
operators = torch.ops.resnet_fast_emulated


@functools.cache
def load() -> ModuleType | str:
    """The module's controls (csrc/torch/emulated.cpp), or why there are none."""
    if not any(FOLDER.glob("_emulated*")):
        return "the emulated kernels were not built (`pip install -e .` builds them)"
    for schema in _library.SCHEMAS:
        if schema.split("(")[0] in NAMES:
            _library_of_tests.define(schema)
    sys.path.append(str(FOLDER))
    try:
        module = importlib.import_module("_emulated")
    except ImportError as error:
        return f"the emulated kernels did not load: {error}"
    finally:
        sys.path.remove(str(FOLDER))
    module.set_options(**FAST)
    return module


def controls() -> ModuleType:
    """As load(), where the module must be there."""
    module = load()
    assert not isinstance(module, str), module
    return module


@contextmanager
def options(**changes: Any) -> Any:
    """The emulator with other options (seed, count, multiprocessors) than FAST."""
    controls().set_options(**{**FAST, **changes})
    try:
        yield
    finally:
        controls().set_options(**FAST)
