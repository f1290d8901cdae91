# SPDX-License-Identifier: BSD-3-Clause
"""AddReLU and ConvBNAct2d against the PyTorch modules they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import assert_same, image, randomise, reasons, step

import resnet_fast.nn as rfnn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_add_relu_is_bitwise_pytorchs(dtype: torch.dtype) -> None:
    leaves = [image(2, 5, 4, 3, seed=s, dtype=dtype).requires_grad_() for s in (1, 2)]
    grads = []
    for function in (rfnn.AddReLU(), lambda x, r: F.relu(x + r)):
        y = function(*leaves)
        grads.append((y, *torch.autograd.grad(y, leaves, image(2, 5, 4, 3, seed=3, dtype=dtype))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_add_relu_broadcasts_and_refuses_as_the_function() -> None:
    x = torch.randn(2, 3, 4, 4)
    y = rfnn.AddReLU()(x, x[:, :, :1, :1])
    assert torch.equal(y, F.relu(x + x[:, :, :1, :1]))
    with pytest.raises(ValueError, match="residual must"):
        rfnn.AddReLU()(x, torch.randn(5))
    with pytest.raises(TypeError, match="residual must be a tensor; got int"):
        rfnn.AddReLU()(x, 3)
    assert not list(rfnn.AddReLU().parameters())


class Plain(nn.Module):
    """What ConvBNAct2d is, with its parameters, in plain modules."""

    def __init__(self, m: rfnn.ConvBNAct2d) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(m.conv), copy.deepcopy(m.bn)
        self.relu = m.activation == "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out = out if residual is None else out + residual
        return F.relu(out) if self.relu else out


SETTINGS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 1, "stride": 2, "activation": None},
    {"kernel_size": 5, "dilation": 2, "groups": 2},
    {"kernel_size": (3, 1), "stride": (1, 2), "eps": 0.1, "momentum": None},
    {"padding": 0, "momentum": 0.5},
    {"padding": "same", "dilation": (1, 2)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_act_is_the_plain_modules(settings: dict[str, Any], training: bool) -> None:
    ours = randomise(rfnn.ConvBNAct2d(4, 6, **{"kernel_size": 3, **settings})).train(training)
    plain = Plain(ours)
    x = image(2, 4, 7, 6)
    assert not reasons(lambda: assert_same(step(ours, x, 2), step(plain, x, 2)))
    residual = torch.randn_like(ours(x))
    torch.testing.assert_close(ours(x, residual), plain(x, residual))


def test_default_padding_keeps_the_size() -> None:
    for kernel, dilation in ((1, 1), (3, 1), (5, 1), (3, 3), ((3, 5), (2, 1))):
        m = rfnn.ConvBNAct2d(2, 2, kernel, dilation=dilation)
        assert m(torch.randn(2, 2, 9, 11)).shape == (2, 2, 9, 11)


def test_hooks_and_other_modules_inside() -> None:
    m = randomise(rfnn.ConvBNAct2d(3, 4, 3))
    x, seen = image(2, 3, 5, 5), []
    want = Plain(m)(x)
    m.conv.register_forward_hook(lambda *_: seen.append("conv"))
    assert not reasons(lambda: m(x))
    m.bn.register_forward_hook(lambda *_: seen.append("bn"))
    assert reasons(lambda: m(x)) == [("batch_norm_act", "the norm has a forward hook")]
    assert seen == ["conv", "conv", "bn"]
    torch.testing.assert_close(m(x), want)
    m.bn = nn.GroupNorm(2, 4).double()
    torch.testing.assert_close(m(x), F.relu(m.bn(m.conv(x))))


def test_tree_keys_copies_and_text() -> None:
    m = rfnn.ConvBNAct2d(3, 4, 3, dtype=torch.float64)
    assert list(m.state_dict())[:3] == ["conv.weight", "bn.weight", "bn.bias"]
    assert type(m.conv) is nn.Conv2d
    assert type(m.bn) is nn.BatchNorm2d
    assert {p.dtype for p in m.parameters()} == {torch.float64}
    assert rfnn.ConvBNAct2d(3, 4, 3, device="meta").bn.weight.is_meta
    assert "activation='relu'" in repr(m)
    x = image(2, 3, 5, 5)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.eval()(x), m.eval()(x))


def test_bad_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be \"relu\" or None; got 'silu'"):
        rfnn.ConvBNAct2d(3, 4, 3, activation="silu")


def test_symbolic_tracing_sees_the_plain_graph() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.join = rfnn.ConvBNAct2d(3, 3, 3), rfnn.AddReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.block(x, x), x)

    net = Net().double()
    graph = torch.fx.symbolic_trace(net)
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert targets == ["block.conv", "block.bn"]
    x = image(2, 3, 5, 5)
    torch.testing.assert_close(graph.eval()(x), net.eval()(x))
