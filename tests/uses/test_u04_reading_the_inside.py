# SPDX-License-Identifier: BSD-3-Clause
"""U04: forward hooks that read: covariances of conv inputs, statistics of BatchNorm outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import Results
from ways import (
    EXCEPT,
    Way,
    fast_twin,
    gradients,
    make,
    photos,
    small_basic,
    small_bottleneck,
    state,
    tv,
)

import resnet_fast as rf
from resnet_fast import dispatch

WAY = Way(
    "U04",
    "reading the inside",
    EXCEPT,
    "a norm or ReLU that has the hook itself: that one is called while the hook is there, and the "
    "rest of its block stays fused",
)


def input_covariances(model: Any) -> Results:
    """What data-informed Tucker-2 decomposition collects: E[x x^T] over positions, per conv."""
    seen: Results = {}

    def collect(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1)
            seen[name] = x @ x.T / x.shape[1]

        return hook

    handles = [
        m.register_forward_pre_hook(collect(name))
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(photos())
    for handle in handles:
        handle.remove()
    return seen


def block_outputs(model: Any) -> Results:
    """Outputs of every block and layer, in the order they came, each once."""
    seen: Results = {}
    for name, m in model.named_modules():
        if name.startswith("layer") and name.count(".") < 2:
            m.register_forward_hook(
                lambda _, __, out, name=name: seen.update({f"{len(seen)} {name}": out.detach()})
            )
    model(photos())
    return seen


def norm_outputs(model: Any) -> Results:
    """The BatchNorm-representation study: moments of what each norm and ReLU gives."""
    seen: Results = {}

    def hook(m: nn.Module, _: Any, out: Tensor) -> None:
        seen[f"{len(seen)} {type(m).__name__}"] = torch.stack([out.mean(), out.std()]).detach()

    handles = [
        m.register_forward_hook(hook)
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d | nn.ReLU)
    ]
    model(photos())
    for handle in handles:
        handle.remove()
    return seen


def test_reading_convolutions_stays_fast() -> None:
    WAY.check(small_basic, input_covariances)
    WAY.check(small_bottleneck, input_covariances)


def test_reading_blocks_stays_fast() -> None:
    WAY.check(small_bottleneck, block_outputs)


def test_reading_norms_is_obeyed() -> None:
    WAY.check(small_bottleneck, norm_outputs, falls_back=("has a forward hook",))


def norm_calls(model: Any) -> tuple[int, int]:
    """How many batch norms of a forward are fused, and how many blocks say that one is not."""
    with dispatch.recording() as events:
        model(photos())
    fused = sum(e.op == "batch_norm_act" and e.impl != "reference" for e in events)
    return fused, sum(e.impl == "reference" for e in events)


@pytest.mark.parametrize(
    "build", [small_basic, pytest.param(small_bottleneck, marks=pytest.mark.slow)]
)
def test_around_a_hook_all_else_stays_fused(build: Any) -> None:
    """Every norm and ReLU of one block in turn: true tensors, in order, each once."""
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in make(build, tv).modules())
    parts = ["bn1", "bn2", "relu"] + (["bn3"] if build is small_bottleneck else [])
    for part in parts:
        order: list[list[str]] = []

        def use(model: Any, part: str = part, order: Any = order) -> Results:
            seen: Results = {}
            order.append([])

            def watch(name: str) -> Any:
                def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                    order[-1].append(name)
                    seen[f"{len(seen)} {name} in"] = args[0].detach().clone()
                    seen[f"{len(seen)} {name}"] = out.detach().clone()

                return hook

            block = model.layer2[0]
            for name in (part, "conv1", "conv2", "downsample.0"):
                block.get_submodule(name).register_forward_hook(watch(name))
            y = model(photos())
            y.square().mean().backward()
            return seen | {"y": y.detach()} | gradients(model) | state(model)

        WAY.check(build, use, falls_back=(f"{part} has a forward hook",))
        assert order[1:] == order[:1] * (len(order) - 1)
        model = fast_twin("torchvision", build, make(build, tv))
        model.layer2[0].get_submodule(part).register_forward_hook(lambda *_: None)
        if rf.is_available():
            # All but the hooked one; behind a hooked ReLU the norms alone are fused.
            assert norm_calls(model) == (norms - (part != "relu"), 1)


def test_fast_again_when_the_hooks_are_gone() -> None:
    def use(model: Any) -> Results:
        handle = model.layer2[0].bn1.register_forward_hook(lambda *_: None)
        handle.remove()
        return {"y": model(photos())}

    WAY.check(small_basic, use)
