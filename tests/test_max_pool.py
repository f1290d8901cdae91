# SPDX-License-Identifier: BSD-3-Clause
"""The stem's max-pooling: PyTorch's numbers, and less kept for the backward."""

import pytest
import torch
from torch import nn

from resnet_fast import _max_pool, dispatch
from resnet_fast._max_pool import max_pool

SETTINGS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (1, 2), "ceil_mode": True},
]
ORDERS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr(_max_pool, "_SMALL", 0)


def test_small_inputs_are_pytorchs_own(monkeypatch):
    monkeypatch.undo()
    pool = nn.MaxPool2d(2)
    for width, own in ((2, True), (_max_pool._SMALL // 32, False)):
        x = torch.randn(1, 4, 8, width).requires_grad_()
        assert ("MaxPool2D" in type(max_pool(pool, x).grad_fn).__name__) == own


def _input(order: torch.memory_format, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(2, 5, 13, 11, dtype=dtype).contiguous(memory_format=order)
    return x.requires_grad_()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_module_bit_for_bit(settings, order, dtype):
    pool, x = nn.MaxPool2d(**settings), _input(order, dtype)
    ours, theirs = max_pool(pool, x), pool(x)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
    for grad in (torch.randn_like(ours), torch.ones((), dtype=dtype).expand_as(ours)):
        (got,) = torch.autograd.grad(ours, x, grad, retain_graph=True)
        (want,) = torch.autograd.grad(theirs, x, grad, retain_graph=True)
        assert torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_first_and_second_order(order):
    pool, x = nn.MaxPool2d(3, 2, 1), _input(order)
    assert torch.autograd.gradcheck(lambda t: max_pool(pool, t), (x,))
    assert torch.autograd.gradgradcheck(lambda t: max_pool(pool, t), (x,))


def test_keeps_indices_alone():
    if not dispatch.env.is_available():
        pytest.skip("the extension is not built: the module itself runs")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = max_pool(nn.MaxPool2d(3, 2, 1), _input(torch.channels_last))
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int32, y.shape)]
