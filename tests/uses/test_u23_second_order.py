# SPDX-License-Identifier: BSD-3-Clause
"""U23: gradient-norm penalties, Hessian-vector products, influence functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from twins import Results, image
from ways import Way, digits, gradients, small_basic, small_bottleneck, state

WAY = Way("U23", "second order")


def penalty(model: Any) -> Results:
    """The squared norm of the gradient of the input as part of the loss (DP-FedPGN, R1)."""
    images, labels = digits(8)
    x = images.clone().requires_grad_()
    loss = F.cross_entropy(model(x), labels)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 10 * grad.square().sum()).backward()
    return {"loss": loss.detach(), "grad": grad.detach()} | gradients(model) | state(model)


def hessian_vector(model: Any) -> Results:
    """H v by double backward, in training mode and in eval mode."""
    images, labels = digits(8)
    results: Results = {}
    for mode in (True, False):
        model.train(mode)
        parameters = [p for name, p in model.named_parameters() if "layer4" in name]
        loss = F.cross_entropy(model(images), labels)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        vectors = [image(*p.shape, seed=11) for p in parameters]
        products = torch.autograd.grad(grads, parameters, vectors)
        results |= {f"{mode} {i}": p for i, p in enumerate(products)}
    return results | state(model)


def influence(model: Any) -> Results:
    """Koh & Liang 2017: two terms of the series for (H + I)^-1 g, over the head's input weights."""
    images, labels = digits(8)
    model.eval()
    parameters = [model.layer4[0].conv2.weight, model.layer4[0].bn2.weight, model.fc.weight]

    def gradient(i: slice) -> Any:
        loss = F.cross_entropy(model(images[i]), labels[i])
        return torch.autograd.grad(loss, parameters, create_graph=True)

    target = [g.detach() for g in gradient(slice(4, 8))]
    estimate = target
    for _ in range(2):
        product = torch.autograd.grad(gradient(slice(0, 4)), parameters, estimate)
        estimate = [t - 0.01 * p for t, p in zip(target, product, strict=True)]
    return {f"{i}": t for i, t in enumerate(estimate)}


def test_gradient_penalty() -> None:
    WAY.check(small_basic, penalty)


def test_hessian_vector_products() -> None:
    WAY.check(small_bottleneck, hessian_vector)


def test_influence() -> None:
    WAY.check(small_basic, influence)
