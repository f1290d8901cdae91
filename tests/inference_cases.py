# SPDX-License-Identifier: BSD-3-Clause
"""Models and the agreement rule of the inference tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import resnet_fast as rf


def lively(model: Any, seed: int = 3) -> Any:
    """Statistics and affine values as after training, so that folding them wrong would show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.2, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.2, generator=generator)
                    module.bias.normal_(0, 0.1, generator=generator)
    return model


class Net(nn.Module):
    """Convs and what stands between them, for single cases of fusing."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def seeded(make: Callable[[], Any]) -> Any:
    """What make() makes, with the same weights in every run.

    With about one set in a hundred a small net's largest error comes to more than twice eager's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
    """PyTorch's own answer in a dtype, of a copy in eval mode; channels_last, as ours runs."""
    twin = copy.deepcopy(model).eval().to(dtype, memory_format=torch.channels_last)
    with torch.no_grad(), rf.use_backend("reference"):
        return twin(x.to(dtype, memory_format=torch.channels_last))


def agrees(
    fast: nn.Module, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """The issue's rule: the error against float64 at most twice eager's, plus the floor."""
    ours, exact, base = fast(x), eager(model, x, torch.float64), eager(model, x, dtype)
    flat = [pytree.tree_flatten(result) for result in (ours, base, exact)]
    assert flat[0][1] == flat[1][1], "another structure of outputs"
    for number, triple in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        mine, theirs, right = triple
        assert not mine.requires_grad
        oracle.check(f"output {number}", mine, theirs, right, context=tuple(x.shape))


def table(fast: Any) -> dict[str, tuple[str, str]]:
    """Module -> (step, implementation) of the rows of explain()."""
    return {row.module: (row.step, row.implementation) for row in rf.explain(fast).rows}
