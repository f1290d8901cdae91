# SPDX-License-Identifier: BSD-3-Clause
"""U08: guided backpropagation and its like hook or replace each ReLU: fusion steps aside."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Results
from ways import FALLS_BACK, Way, photos, small_basic, small_bottleneck

WAY = Way(
    "U08",
    "modified backward rules",
    FALLS_BACK,
    "every ReLU is hooked or replaced, and a fused one would never be asked",
)


def set_inplace(model: nn.Module, inplace: bool) -> None:
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = inplace


def saliency(model: Any) -> Tensor:
    x = photos().clone().requires_grad_()
    (grad,) = torch.autograd.grad(model.eval()(x)[:, 1].sum(), x)
    return grad


def guided_by_hooks(model: Any) -> Results:
    """Springenberg et al. 2015, as people write it: full backward hooks that clamp."""
    set_inplace(model, False)
    plain = saliency(model)
    handles = [
        m.register_full_backward_hook(lambda _, grads, __: (F.relu(grads[0]),))
        for m in model.modules()
        if isinstance(m, nn.ReLU)
    ]
    guided = saliency(model)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(plain, guided)
    return {"plain": plain, "guided": guided, "plain again": saliency(model)}


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad.clamp(min=0) * (y > 0)


class GuidedReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Guided.apply(x)
        return out


def guided_by_replacing(model: Any) -> Results:
    """The same by another module in the place of each ReLU."""
    for m in list(model.modules()):
        if isinstance(getattr(m, "relu", None), nn.ReLU):
            m.relu = GuidedReLU()
    return {"guided": saliency(model)}


def test_guided_by_hooks() -> None:
    WAY.check(small_basic, guided_by_hooks, falls_back=("relu has a backward hook",))


def test_guided_by_replacing() -> None:
    WAY.check(
        small_bottleneck, guided_by_replacing, falls_back=("relu is a GuidedReLU, not exactly",)
    )
