# SPDX-License-Identifier: BSD-3-Clause
"""Calls on another device with tensors of the CPU, so that one test serves every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Copy(torch.autograd.Function):
    """A copy on another device with the same strides and the same offset in its storage."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: str) -> Tensor:
        span = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1
        end = t.storage_offset() + (span if t.numel() else 0)
        storage = t.detach().as_strided((end,), (1,), 0).to(device, copy=True)
        return storage.as_strided(t.shape, t.stride(), t.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to("cpu"), None


def on_device(device: str, function: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    """function(*args, **kwargs) with every CPU tensor copied to device, its result copied back.

    Gradients flow through the copies. What function wrote into a tensor is written into the one it
    was copied from. A tensor given twice is one tensor there, too. Tensors that are elsewhere than
    on the CPU are left alone; with none on the CPU the result stays where it is.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        if id(value) not in copies:
            copies[id(value)] = value, _Copy.apply(value, device)
        return copies[id(value)][1]

    y = function(*map(move, args), **{name: move(value) for name, value in kwargs.items()})
    with torch.no_grad():
        for original, copy in copies.values():
            back = copy.to("cpu")
            same = torch.allclose(original, back, rtol=0, atol=0, equal_nan=True)
            if not original.requires_grad and not same:
                original.copy_(back)
    return y.to("cpu", copy=True) if copies else y
