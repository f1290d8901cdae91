# SPDX-License-Identifier: BSD-3-Clause
"""U05: keys added to and multiplied into activations by hooks and inserted modules (SpanKey)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from twins import Results, image
from ways import EXCEPT, Way, photos, small_basic, train

WAY = Way(
    "U05",
    "changing the inside",
    EXCEPT,
    "a norm that has the hook itself, that norm alone",
)


def keyed(model: Any) -> Results:
    """A multiplied key behind layer2, an added one behind a conv; trained, then a wrong key."""
    key = 1 + image(1, 128, 1, 1, seed=7) / 4
    added = image(1, 256, 1, 1, seed=8)
    handle = model.layer2.register_forward_hook(lambda _, __, out: out * key)
    model.layer3[0].conv1.register_forward_hook(lambda _, __, out: out + added)
    results = train(model)
    handle.remove()
    results["without the key"] = model.eval()(photos()).detach()
    return results


class Key(nn.Module):
    """A module in the middle of a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key = nn.Parameter(image(1, channels, 1, 1, seed=9) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.key)


def inserted(model: Any) -> Results:
    model.layer1.append(Key(64))
    model.layer3.insert(0, Key(128))
    return train(model)


def norm_keyed(model: Any) -> Results:
    """A hook that changes what one norm gives."""
    shift = image(1, 64, 1, 1, seed=6)
    model.layer1[0].bn1.register_forward_hook(lambda _, __, out: out + shift)
    return train(model)


def test_keys_by_hooks() -> None:
    WAY.check(small_basic, keyed)


def test_inserted_modules() -> None:
    WAY.check(small_basic, inserted)


def test_only_the_block_with_a_keyed_norm_falls_back() -> None:
    WAY.check(small_basic, norm_keyed, falls_back=("bn1 has a forward hook",))


def test_the_key_matters() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    assert not torch.equal(Key(4)(x), x)
