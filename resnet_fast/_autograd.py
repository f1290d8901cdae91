# SPDX-License-Identifier: BSD-3-Clause
"""What the autograd Functions of this package share."""

from __future__ import annotations

from typing import Any

import torch


def straight(function: Any) -> Any:
    """function.apply without the Python in front of it, which looks for tensors left over from
    torch.func's transforms: for calls that dispatch.at_once() has let through.

    And the Python in front of function.backward goes, too, which asks at every call how the class
    is written.
    """
    node: Any = getattr(function, "_backward_cls", None)
    if node is not None:
        node.apply = function.backward
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def differentiable_backward() -> bool:
    """True inside backward(create_graph=True); a compiler traces the raw operator instead."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
