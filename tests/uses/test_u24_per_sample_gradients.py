# SPDX-License-Identifier: BSD-3-Clause
"""U24: torch.func: per-sample gradients, functional_call, forward-mode derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from twins import Results, image
from ways import FALLS_BACK, Way, digits, gradients, small_basic

WAY = Way(
    "U24",
    "per-sample gradients",
    FALLS_BACK,
    "functional_call: fast; inside vmap, grad or jvp every op is plain PyTorch, which these need",
)


def per_sample(model: Any) -> Results:
    """Client-level DP-SGD: each sample's gradient clipped, then averaged; norms in eval mode."""
    model.eval()
    images, labels = digits(4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        y = functional_call(model, (parameters, buffers), (x[None],))
        return F.cross_entropy(y, label[None])

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    clip = (1 / norms).clamp(max=1)
    return {"norms": norms} | {
        name: (g * clip.view(-1, *(1,) * (g.dim() - 1))).mean(0) for name, g in grads.items()
    }


def tangents(model: Any) -> Results:
    """A derivative along one direction of the input, forward mode."""
    images, _ = digits(4)
    y, tangent = jvp(model.eval(), (images,), (image(*images.shape, seed=12),))
    return {"y": y.detach(), "tangent": tangent.detach()}


def called_with_other_weights(model: Any) -> Results:
    """functional_call alone: weights of another set, gradients with respect to them."""
    images, labels = digits(8)
    other = {name: (p.detach() * 0.9).requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(functional_call(model, other, (images,)), labels)
    grads = torch.autograd.grad(loss, list(other.values()))
    assert not gradients(model)
    return {"loss": loss.detach()} | dict(zip(other, grads, strict=True))


def test_per_sample_gradients() -> None:
    WAY.check(small_basic, per_sample, falls_back=("torch.func transform",))


def test_forward_mode() -> None:
    WAY.check(small_basic, tangents, falls_back=("torch.func transform",))


def test_functional_call() -> None:
    WAY.check(small_basic, called_with_other_weights)
