# SPDX-License-Identifier: BSD-3-Clause
"""Modules that multiply a branch by one value for each image and channel, before the sum.

Channel attention and stochastic depth do nothing else with the branch itself. Of one that is known
here and plain the values are asked, and the product, the sum and the ReLU are one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from resnet_fast._ready import plain_module, plain_tensor

Scale = Callable[[Any, Tensor], Tensor]

_GATES: dict[type[nn.Module], tuple[Callable[..., Any], Scale]] = {}


def register_gate(kind: type[nn.Module], scale: Scale) -> None:
    """Make a class known whose forward is x * scale(module, x).

    scale: calls the submodules as the forward does, and returns a tensor that broadcasts to x.
    """
    if kind.forward.__module__ == kind.__module__:  # else somebody has put his own in its place
        _GATES[kind] = kind.forward, scale


def scale_of(gate: nn.Module, x: Tensor) -> Tensor | None:
    """What gate multiplies x with; None, and nothing was run, if that is not all that it does."""
    kind = type(gate)
    known = _GATES.get(kind)
    if known is None or kind.forward is not known[0] or not plain_module(gate, kind):
        return None
    return known[1](gate, x)


def fits(scale: Tensor, x: Tensor) -> bool:
    """True for a scale that functional.add_relu takes for x (N, C, H, W)."""
    return plain_tensor(scale) and scale.shape == (*x.shape[:2], 1, 1) and scale.dtype == x.dtype
