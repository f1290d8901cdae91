# SPDX-License-Identifier: BSD-3-Clause
"""Inference: a model folded, fused and pre-packed.

fast = resnet_fast.optimize_for_inference(model, images)
logits = fast(images)          # what model.eval() gives, without gradients
fast.refresh(model)            # after the model's weights changed
print(fast.explain())
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.inference.module import OptimizedModule, device_of
from resnet_fast.inference.plan import Plan, PlanError
from resnet_fast.inference.progress import Tell

__all__ = ["OptimizedModule", "Plan", "PlanError", "optimize_for_inference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize_for_inference(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | str | None = None,
    calibration: Iterable[Any] | None = None,
    cuda_graph: bool = False,
    plan: Plan | None = None,
    progress: bool | Tell | None = None,
) -> OptimizedModule:
    """A module that computes what ``model.eval()`` does, as fast as it can be here.

    model: is not changed, and may be in training mode; what counts is its eval mode.
    example_input: one input, (N, C, H, W); N, H and W may differ in later calls where the model
        takes other sizes. Its values are not looked at.
    dtype: of the results, default the model's; inputs of any floating dtype are converted. "int8"
        quantises on the CPU (needs torchao); results are float32 and ``agreement`` of the module
        returned says how near they come.
    calibration: for "int8" only: batches of images, or of (images, ...), that can be gone through
        more than once, as a list or a DataLoader can.
    cuda_graph: on CUDA, record the whole call as a CUDA graph at the first call of each input
        shape and replay it afterwards. Of many shapes the graphs used last are kept.
    plan: on CUDA, the choices of an earlier process (``Plan.load(path)``), used without measuring;
        what it lacks is measured at the first call of a shape and added. By default an empty one,
        which the result's ``plan`` gives to print and save.
    progress: what loading is at. By default it is written to stderr if that is a terminal and
        loading takes longer than two seconds; True: always, False: never. A function is called
        as progress(done, total, what) before each step and at the end. ``refresh`` does the same.
        dtype="int8" tells nothing.

    The result stays on the device of the model and example_input. Its parameters are private
    copies: a later change of the model's weights or hooks makes its calls raise RuntimeError until
    ``refresh(model)``. A module with forward hooks is called for what it is, on a private copy, and
    the rest is folded; a hook that changes weights or gives another shape makes the call raise
    RuntimeError. What cannot be folded or traced runs as it is, and ``explain()`` says why. Raises
    TypeError or ValueError for bad arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise TypeError("model is optimized already; give the model it was made of")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input must be a Tensor; got {type(example_input).__name__}")
    if not example_input.is_floating_point():
        raise TypeError(f"example_input must be floating point; got {example_input.dtype}")
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be a bool or a function; got {type(progress).__name__}")
    if (dtype == "int8") != (calibration is not None):
        raise ValueError('calibration must be given with dtype="int8", and only then')
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, as Plan.load(path) gives; got {type(plan).__name__}")
    if calibration is not None:
        if cuda_graph or plan is not None or device_of(model, example_input).type != "cpu":
            raise ValueError('dtype="int8" runs on the CPU alone, without cuda_graph and plan')
        return _quantized(model, example_input, calibration)
    if dtype is None:
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        dtype = floats[0] if floats else example_input.dtype
    if dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise ValueError(f'dtype must be one of {names}, "int8"; got {dtype!r}')
    assert isinstance(dtype, torch.dtype)
    return OptimizedModule(
        model, example_input, dtype, cuda_graph=cuda_graph, plan=plan, progress=progress
    )


def _quantized(model: nn.Module, example: Tensor, calibration: Iterable[Any]) -> OptimizedModule:
    if iter(calibration) is calibration:
        raise TypeError("calibration must be a list or a loader; an iterator serves only once")
    try:
        importlib.import_module("torchao.quantization.pt2e")
    except ImportError as error:
        raise ImportError(f'dtype="int8" needs torchao: pip install torchao ({error})') from None
    from resnet_fast.inference.int8 import QuantizedModule

    return QuantizedModule(model, example, calibration)
