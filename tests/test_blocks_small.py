# SPDX-License-Identifier: BSD-3-Clause
"""Blocks on small tensors: in training PyTorch's own operators, called without their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BLOCKS_FUSE_FROM
from test_blocks_at_once import KINDS, X, make
from torch import Tensor, nn
from twins import assert_same, step

import resnet_fast as rf
from resnet_fast import _at_once, dispatch

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))
SMALL = X.float()
TORCH = ("batch_norm_act", "torch", _at_once._SMALL)
FUSED = ("batch_norm_act", "cpu", "")


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_at_once, "SMALL", BLOCKS_FUSE_FROM)


def plain(block: Any) -> Any:
    """The block, run by PyTorch's modules."""

    def forward(x: Tensor) -> Tensor:
        names = _at_once.BOTTLENECK if hasattr(block, "conv3") else _at_once.BASIC
        out = x
        for conv, norm in names:
            out = getattr(block, norm)(getattr(block, conv)(out))
            out = out.relu() if (conv, norm) != names[-1] else out
        shortcut = x if block.downsample is None else block.downsample(x)
        return (out + shortcut).relu()

    block.forward = forward
    return block


def events(block: nn.Module, x: Tensor) -> list[Any]:
    with dispatch.recording() as seen:
        block(x)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_bits_of_the_modules(kind: str, training: bool) -> None:
    """Output, gradients, statistics and counters, with gradients: in eval mode, too."""
    block = make(kind).float().train(training)
    norms = 3 if kind in ("basic_down", "bottleneck") else 4 if "down" in kind else 2
    assert events(copy.deepcopy(block), SMALL) == [TORCH] * norms
    ours, theirs = copy.deepcopy(block), plain(copy.deepcopy(block))
    assert_same(step(ours, SMALL, 2), step(theirs, SMALL, 2), rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda block, x: (block, x.expand(3, 8, 6, 5).repeat(1, 1, 30, 31)),
        lambda block, x: (block.double(), x.double()),
        lambda block, x: (block.bfloat16(), x.bfloat16()),
        lambda block, x: (block.requires_grad_(False), x),
    ],
    ids=["large", "float64", "bfloat16", "no gradient"],
)
def test_fused_all_the_same(change: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> None:
    block, x = change(make("basic").float(), SMALL)
    assert events(block, x) == [FUSED] * 2


def test_fused_without_gradients() -> None:
    with torch.no_grad():
        assert events(make("basic").float(), SMALL) == [FUSED] * 2
    block = make("basic").float()
    with torch.no_grad():
        want = block(SMALL)
    torch.testing.assert_close(block(SMALL), want)


def test_a_single_picture() -> None:
    block = make("basic").float()
    assert events(block, SMALL[:1]) == [TORCH] * 2
    counter, mean = block.bn1.num_batches_tracked.clone(), block.bn1.running_mean.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(SMALL[:1, :, :1, :1])
    assert block.bn1.num_batches_tracked == counter
    assert torch.equal(block.bn1.running_mean, mean)


def test_counted() -> None:
    block = make("basic").float()
    block(SMALL)
    dispatch.reset_counters()
    for _ in range(3):
        block(SMALL)
    assert dispatch.counters() == {TORCH: 6}


def test_second_order() -> None:
    block, twin = make("basic").float(), plain(make("basic").float())
    results = []
    for b in (block, twin):
        x = SMALL.clone().requires_grad_()
        (first,) = torch.autograd.grad(b(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*results)
