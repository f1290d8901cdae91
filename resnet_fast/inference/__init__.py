# SPDX-License-Identifier: BSD-3-Clause
"""Inference: a model folded, fused and pre-packed.

fast = resnet_fast.optimize_for_inference(model, images)
logits = fast(images)          # what model.eval() gives, without gradients
fast.refresh(model)            # after the model's weights changed
print(fast.explain())
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fast.inference.module import OptimizedModule

__all__ = ["OptimizedModule", "optimize_for_inference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize_for_inference(
    model: nn.Module, example_input: Tensor, *, dtype: torch.dtype | None = None
) -> OptimizedModule:
    """A module that computes what ``model.eval()`` does, as fast as it can be here.

    model: is not changed, and may be in training mode; what counts is its eval mode.
    example_input: one input, (N, C, H, W); N, H and W may differ in later calls where the model
        takes other sizes. Its values are not looked at.
    dtype: of the results, default the model's; inputs of any floating dtype are converted.

    Parameters of the result are private copies. A later change of the model's weights makes its
    calls raise RuntimeError until ``refresh(model)``. What cannot be folded or traced runs as it
    is, and ``explain()`` says why. Raises TypeError or ValueError for bad arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise TypeError("model is optimized already; give the model it was made of")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input must be a Tensor; got {type(example_input).__name__}")
    if not example_input.is_floating_point():
        raise TypeError(f"example_input must be floating point; got {example_input.dtype}")
    if dtype is None:
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        dtype = floats[0] if floats else example_input.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {dtype}")
    return OptimizedModule(model, example_input, dtype)
