# SPDX-License-Identifier: BSD-3-Clause
"""Faster ResNets for PyTorch: fused residual-add-ReLU and batch-norm kernels, drop-in modules.

import resnet_fast as rf
model = rf.accelerate(torchvision.models.resnet50())  # same parameters, same numbers
print(rf.explain(model, images))  # which block runs what, and why
"""

from resnet_fast import blocks, functional, models, nn
from resnet_fast._version import __version__
from resnet_fast.adapters import register_adapter
from resnet_fast.config import use_backend
from resnet_fast.convert import accelerate, restore
from resnet_fast.env import is_available, load_extension, tune_cpu_memory, why_unavailable
from resnet_fast.explain import explain
from resnet_fast.inference import optimize_for_inference

load_extension()

__all__ = [
    "__version__",
    "accelerate",
    "blocks",
    "explain",
    "functional",
    "is_available",
    "models",
    "nn",
    "optimize_for_inference",
    "register_adapter",
    "restore",
    "tune_cpu_memory",
    "use_backend",
    "why_unavailable",
]
