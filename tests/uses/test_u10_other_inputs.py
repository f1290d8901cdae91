# SPDX-License-Identifier: BSD-3-Clause
"""U10: channels other than three, any size, batch 1, and another batch every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins import Results, step
from ways import Way, digits, photos, small_basic, state

WAY = Way("U10", "other inputs")


def channels(count: int) -> Any:
    """What people do: another first convolution, its weights the mean of the old ones."""

    def use(model: Any) -> Results:
        old = model.conv1
        model.conv1 = nn.Conv2d(count, 64, 7, 2, 3, bias=False).double()
        with torch.no_grad():
            model.conv1.weight.copy_(old.weight.mean(1, keepdim=True).expand(-1, count, -1, -1))
        x = photos(40)[:, torch.arange(count) % 3]
        return step(model, x)

    return use


@pytest.mark.parametrize("count", [1, 4, 6])
def test_channels(count: int) -> None:
    WAY.check(small_basic, channels(count))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 31)])
def test_sizes(size: tuple[int, int]) -> None:
    WAY.check(small_basic, lambda model: step(model, photos(80)[:2, :, : size[0], : size[1]]))


def test_batch_1() -> None:
    """Spectrograms one at a time (VIGILant): trained at 1 x 65 x 65, answered in eval mode."""

    def use(model: Any) -> Results:
        one = photos(65)[:1]
        return step(model, one) | {"answer": model.eval()(one).detach()}

    WAY.check(small_basic, use)


def test_batch_of_one_value_raises_the_same_error() -> None:
    """At 32 pixels a batch of 1 has one value a channel at the end: no statistics of it."""

    def use(model: Any) -> Results:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(photos(32)[:1])
        # The layers before the one that refused have moved. (That one has counted the call in
        # eager; with us a refused call leaves nothing behind.)
        return {k: t for k, t in state(model).items() if "num_batches" not in k}

    WAY.check(small_basic, use)


def test_batch_that_grows_every_step() -> None:
    """Graduated optimization: the batch doubles."""

    def use(model: Any) -> Results:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        images, labels = digits(16)
        for batch in (2, 4, 8, 16, 3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[:batch]), labels[:batch]).backward()
            optimizer.step()
        return state(model)

    WAY.check(small_basic, use)


def test_layouts_and_views() -> None:
    """channels_last, a transposed view, every second pixel of a larger picture."""

    def use(model: Any) -> Results:
        x = photos(64)
        views = (x.contiguous(memory_format=torch.channels_last), x.mT, x[:, :, ::2, ::2])
        return {f"{i}": model(view).detach() for i, view in enumerate(views)} | state(model)

    WAY.check(small_basic, use)
