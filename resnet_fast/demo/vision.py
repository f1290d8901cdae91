# SPDX-License-Identifier: BSD-3-Clause
"""torchvision, where it is installed: it is an optional rival, never a dependency."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# Held for the life of the process: the definitions go when the object goes.
_definitions: list[torch.library.Library] = []


def import_torchvision() -> ModuleType | None:
    """torchvision, or None where it is not installed or does not import.

    A torchvision built for another torch (CUDA wheel on CPU-only torch) cannot load its compiled
    operators, and then stops at the first that it describes to torch. Its models need none of them,
    so the two schemas it asks for are defined here and the import is tried once more.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return None
    except ImportError:
        return None
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _definitions.append(library)
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return None
