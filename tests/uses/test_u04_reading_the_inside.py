# SPDX-License-Identifier: BSD-3-Clause
"""U04: forward hooks that read: covariances of conv inputs, statistics of BatchNorm outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from twins import Results
from ways import FALLS_BACK, Way, photos, small_basic, small_bottleneck

WAY = Way(
    "U04",
    "reading the inside",
    FALLS_BACK,
    "hooks on convolutions, blocks and layers: fast; a block with a hook on a norm or ReLU runs "
    "its plain forward while the hook is there",
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


def test_fast_again_when_the_hooks_are_gone() -> None:
    def use(model: Any) -> Results:
        handle = model.layer2[0].bn1.register_forward_hook(lambda *_: None)
        handle.remove()
        return {"y": model(photos())}

    WAY.check(small_basic, use)
