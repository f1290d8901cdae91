# SPDX-License-Identifier: BSD-3-Clause
"""When a backward may write its result over the incoming gradient.

A fresh tensor is the dear part of a backward on a CPU (its pages are faulted in one by one), and
the incoming gradient is most often used for the last time. PyTorch's own engine asks the same of a
gradient before it accumulates in place or steals it: does anybody else hold it? Here that is three
counts: of the Python object, of the tensor behind it, and of its storage. Each must be what it is
for a gradient that the engine alone holds, which is measured once rather than assumed.

On the CPU only. On a GPU the counts say nothing of the streams: a node on another stream that took
the same gradient may have let go of it, guarded by record_stream, while its kernel still reads it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from resnet_fast._autograd import straight
from resnet_fast.layout import is_channels_last

Counts = tuple[int, int, int]
# Elements below which nothing is gained: so small a tensor is not of fresh pages, and asking for
# the counts costs more than malloc.
SMALL = 1 << 14


def _counts(grad: Tensor) -> Counts:
    uses: int = grad._use_count()  # type: ignore[attr-defined]
    of_storage = torch._C._storage_Use_Count  # type: ignore[attr-defined]
    return sys.getrefcount(grad), uses, of_storage(grad.untyped_storage()._cdata)


class _Probe(torch.autograd.Function):
    """Looks at a gradient from where the backwards of functional.py look at theirs."""

    seen: Counts | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _Probe.seen = _held(grad)
        return grad * 2


def _held(grad: Tensor) -> Counts:
    return _counts(grad)


_probe = straight(_Probe)  # as functional.py calls its own


def _measure() -> Counts | None:
    """The counts of a gradient that only the engine holds; None where this PyTorch has none."""
    try:
        with torch.enable_grad():
            x = torch.ones(2, requires_grad=True)
            (_probe(x) * 3).sum().backward()
    except (AttributeError, TypeError, RuntimeError):
        return None
    return _Probe.seen


_alone: list[Counts | None] = []


def may_overwrite(grad: Tensor, like: Tensor) -> bool:
    """True if nobody but the engine holds grad, a dense CPU tensor laid out as `like`.

    To be called from the ``backward`` of an autograd Function, on its very argument, where that has
    SMALL elements or more and no compiler traces it.
    """
    if (
        type(grad) is not Tensor
        or not grad.is_cpu
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or grad.dtype != like.dtype
        or grad.shape != like.shape
        or grad.stride() != like.stride()
        or not (like.is_contiguous() or is_channels_last(like))
        or not torch._C._has_storage(grad)  # as under vmap
        or grad.is_conj()
        or grad.is_neg()
    ):
        return False
    if not _alone:
        _alone.append(_measure())
    if _alone[0] is None:  # these names are private: a PyTorch without them counts nothing
        return False
    # A storage that cannot be resized lies in memory of somebody else's, an array's say.
    return _counts(grad) == _alone[0] and grad.untyped_storage().resizable()
