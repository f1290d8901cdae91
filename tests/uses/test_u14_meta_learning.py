# SPDX-License-Identifier: BSD-3-Clause
"""U14: meta-learning: gradients through the statistics of a context batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from twins import Results
from ways import Way, digits, gradients, small_basic, state

WAY = Way("U14", "gradients through the statistics")


def context_and_query(model: Any) -> Results:
    """CS-ARM-BN: the context sets the batch statistics that the query shares, two forwards."""
    images, labels = digits(16)
    context = model(images[:8])
    query = model(torch.cat((images[:8], images[8:])))[8:]
    loss = F.cross_entropy(query, labels[8:]) + context.square().mean() / 10
    loss.backward()
    return {"loss": loss.detach()} | gradients(model) | state(model)


def maml(model: Any) -> Results:
    """Finn et al. 2017: the outer gradient flows through an inner step in training mode."""
    images, labels = digits(16)
    names = [name for name, _ in model.named_parameters()]
    fast = dict(model.named_parameters())
    inner = F.cross_entropy(functional_call(model, fast, (images[:8],)), labels[:8])
    grads = torch.autograd.grad(inner, [fast[name] for name in names], create_graph=True)
    fast = {n: fast[n] - 0.01 * g for n, g in zip(names, grads, strict=True)}
    outer = F.cross_entropy(functional_call(model, fast, (images[8:],)), labels[8:])
    outer.backward()
    return {"outer": outer.detach()} | gradients(model) | state(model)


def test_context_and_query() -> None:
    WAY.check(small_basic, context_and_query)


def test_maml() -> None:
    WAY.check(small_basic, maml)
