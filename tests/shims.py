# SPDX-License-Identifier: BSD-3-Clause
"""Importing torchvision and timm beside a PyTorch they were not built for.

torchvision's wheel for CUDA does not load its operators on a CPU-only PyTorch, and its import then
stops at ``torchvision::nms`` not being defined. Its models need none of these operators: defining
the two schemas is enough. Where torchvision imports as it is, nothing is defined.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library undoes its definitions when it is freed


def import_torchvision() -> ModuleType:
    """torchvision, whole. Raises ImportError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision. Raises ImportError where either is not installed."""
    import_torchvision()
    return importlib.import_module("timm")


def torchvision_or_skip() -> ModuleType:
    """torchvision; where it is not installed the calling test, or module of tests, is skipped."""
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(f"torchvision is not installed: {error}", allow_module_level=True)


def timm_or_skip() -> ModuleType:
    """timm; where it is not installed the calling test, or module of tests, is skipped."""
    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}", allow_module_level=True)
