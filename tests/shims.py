# SPDX-License-Identifier: BSD-3-Clause
"""Importing torchvision and timm beside a PyTorch they were not built for.

torchvision's wheel for CUDA does not load its operators on a CPU-only PyTorch, and its import then
stops at ``torchvision::nms`` not being defined. Its models need none of these operators: defining
the two schemas is enough. Where torchvision imports as it is, nothing is defined.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# What segmentation_models_pytorch imports for its downloads.
_DOWNLOADS = {
    "tqdm": ("tqdm",),
    "safetensors": (),
    "safetensors.torch": ("load_file",),
    "huggingface_hub": ("PyTorchModelHubMixin", "ModelCard", "ModelCardData", "hf_hub_download"),
}
_libraries: list[torch.library.Library] = []  # a Library undoes its definitions when it is freed


class _Absent:
    """A class of a package that is not installed, to be derived from and not used."""

    def __new__(cls, *args: object, **kwargs: object) -> _Absent:
        return super().__new__(cls)

    def _absent(self) -> None:
        raise NotImplementedError

    save_pretrained = from_pretrained = push_to_hub = _absent


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


def import_segmentation_models() -> ModuleType:
    """segmentation_models_pytorch. Raises ImportError where it, timm or torchvision is missing.

    What it asks of other packages at its import is needed for downloads alone: where one of them
    is not installed, names without a content stand in for it.
    """
    import_timm()
    made = [name for name in _DOWNLOADS if importlib.util.find_spec(name.split(".")[0]) is None]
    for name in made:
        sys.modules[name] = module = ModuleType(name)
        vars(module).update({a: type(a, (_Absent,), {}) for a in _DOWNLOADS[name]})
    try:
        return importlib.import_module("segmentation_models_pytorch")
    finally:
        for name in made:  # nobody else shall take them for the packages
            del sys.modules[name]


def segmentation_models_or_skip() -> ModuleType:
    """segmentation_models_pytorch; where it is not installed the calling module is skipped."""
    try:
        return import_segmentation_models()
    except ImportError as error:
        why = f"segmentation_models_pytorch is not installed: {error}"
        pytest.skip(why, allow_module_level=True)


def timm_or_skip() -> ModuleType:
    """timm; where it is not installed the calling test, or module of tests, is skipped."""
    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}", allow_module_level=True)
