# SPDX-License-Identifier: BSD-3-Clause
"""explain: what it says of every kind of model, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision_blocks import AttentionBlock, tv
from twins import image, randomise, step

import resnet_fast as rf
import resnet_fast.nn as rfnn
from resnet_fast import dispatch, models
from resnet_fast.config import use_backend
from resnet_fast.convert import accelerate
from resnet_fast.explain import Explanation, Row, explain

X = image(2, 3, 32, 32)


def small(block: Any = tv.BasicBlock) -> Any:
    return randomise(tv.ResNet(block, [1, 1, 1, 1], num_classes=3))


def rows(explanation: Explanation, module: str) -> list[Row]:
    return [row for row in explanation.rows if row.module == module]


# ---- what it says --------------------------------------------------------------------------------
def test_a_plain_torchvision_model_is_told_to_be_accelerated() -> None:
    model = small()
    for explanation in (explain(model, X), explain(model)):
        assert [row.module for row in explanation.rows] == [
            "",
            *(f"layer{i}.0" for i in range(1, 5)),
        ]
        assert {row.reason for row in explanation.rows} == {
            "not accelerated: call resnet_fast.accelerate(model)"
        }
        assert {row.implementation for row in explanation.rows} == {"reference"}
        assert explanation.fast_share == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_accelerated_model_names_the_implementation_of_each_block(backend: str) -> None:
    model = accelerate(small(tv.Bottleneck))
    with use_backend(backend):
        explanation = explain(model, X)
        with dispatch.recording() as events:
            model(X)
    got = [(row.module, row.block, row.op, row.calls) for row in explanation.rows]
    assert got == [("", "ResNet", "batch_norm_act", 1)] + [
        (f"layer{i}.0", "Bottleneck", "batch_norm_act", 4) for i in range(1, 5)
    ]
    assert {(r.implementation, r.reason) for r in explanation.rows} == {
        (e.impl, e.reason) for e in events
    }
    assert explanation.fast_share == (events[0].impl != "reference")


def test_blocks_that_fall_back_say_why() -> None:
    model = accelerate(small())
    model.layer1[0].bn2.register_forward_hook(lambda *_: None)
    model.layer2[0].relu = nn.SiLU()
    model.layer3[0].downsample[1] = nn.GroupNorm(2, 256).double()
    model.layer4[0].downsample[1].register_forward_hook(lambda *_: None)
    model.relu = nn.LeakyReLU()
    explanation = explain(model, X)

    def said(module: str) -> list[tuple[str, str, int]]:
        return [
            (r.op, r.reason, r.calls)
            for r in rows(explanation, module)
            if r.implementation == "reference" and r.reason != rf.why_unavailable()
        ]

    assert said("") == [("block", "relu is a LeakyReLU, not exactly nn.ReLU", 1)]
    assert said("layer1.0") == [("block", "bn2 has a forward hook", 1)]
    assert said("layer2.0") == [("block", "relu is a SiLU, not exactly nn.ReLU", 1)]
    assert said("layer4.0") == [("batch_norm_act", "the end of downsample has a forward hook", 1)]
    assert said("layer3.0") == []  # a shortcut with a norm we do not fuse costs nothing
    if rf.is_available():
        # Nine norms are fused, five of them around what is hooked or of another kind.
        assert explanation.fast_share == pytest.approx(9 / 13)


def test_without_inputs_it_says_what_could_be_fused() -> None:
    model = nn.ModuleList(
        [accelerate(small()), rfnn.ConvBNAct2d(3, 4, 3), rfnn.AddReLU(), models.resnet20()]
    )
    model[0].layer1[0].bn1.register_forward_pre_hook(lambda *_: None)
    model[1].bn = nn.InstanceNorm2d(4)
    explanation = explain(model)
    assert rows(explanation, "0.layer1.0")[0].reason == "bn1 has a forward pre-hook"
    assert rows(explanation, "1")[0].reason == "bn is a InstanceNorm2d, not exactly nn.BatchNorm2d"
    for name in ("0", "0.layer2.0", "2", "3", "3.layer1.0"):
        assert [row[2:4] for row in rows(explanation, name)] == [("block", "by input")]
    assert "by input" in str(explanation)


def test_modules_with_a_reason_of_their_own() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        AttentionBlock(64, 64),
        tv.BasicBlock(64, 64),
        nn.Sequential(nn.BatchNorm2d(64), nn.SiLU()),
    )
    model[2].forward = model[2].forward
    explanation = explain(model, X.float())
    assert [(r.module, r.block, r.reason) for r in explanation.rows] == [
        ("1", "AttentionBlock", "AttentionBlock overrides forward"),
        ("2", "BasicBlock", "its forward was replaced on the object"),
        ("3", "Sequential", "no batch norm in it comes directly before a ReLU"),
    ]


def test_one_module_called_twice_and_one_not_at_all() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other = models.BasicBlock(3, 3), models.BasicBlock(3, 3)
            self.join = rfnn.AddReLU()

        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return self.join(self.block(x), self.block(y))

    explanation = explain(Siamese(), X.float(), y=X.float())
    got = {(r.module, r.op, r.calls) for r in explanation.rows}
    assert got == {("block", "batch_norm_act", 4), ("other", "block", 0), ("join", "add_relu", 1)}
    assert rows(explanation, "other")[0].implementation == "not run"


def test_ops_called_outside_of_blocks_belong_to_the_model() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rfnn.AddReLU()(x, x)

    (row,) = explain(Net(), X).rows
    assert (row.module, row.block, row.op) == ("", "Net", "add_relu")


def test_the_table_is_aligned_and_counts() -> None:
    text = str(explain(accelerate(small()), X))
    head, rule, *lines, last = text.splitlines()
    assert head.split() == ["module", "block", "op", "calls", "implementation", "reason"]
    assert set(rule) == {"-", " "}
    assert lines[0].startswith("(model)")
    at = head.index("op ")
    assert all(line[at:].startswith("batch_norm_act") for line in lines)
    assert last.startswith("fast: ")
    assert repr(explain(nn.Linear(2, 2))).startswith("no residual block, batch norm or fused op")
    assert explain(nn.Linear(2, 2), torch.zeros(2)).fast_share == 0


@pytest.mark.parametrize("wrong", [None, tv.BasicBlock, X])
def test_what_is_not_a_module_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"model must be .*; got {type(wrong).__name__}"):
        explain(wrong)


# ---- that it leaves no trace ---------------------------------------------------------------------
class Noisy(nn.Module):
    """Draws from every source of randomness, moves and replaces buffers, and may raise."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.net = accelerate(small())
        self.fails = fails
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("nan", torch.full((2,), float("nan")))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        y = self.net(x + torch.rand_like(x)) * random.random() * np.random.rand()
        self.steps = self.steps + 1
        self.nan += 1
        if self.fails:
            raise ArithmeticError("on purpose")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_random_states_are_as_before(fails: bool) -> None:
    model = Noisy(fails)
    state = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    if fails:
        with pytest.raises(ArithmeticError, match="on purpose"):
            explain(model, X)
    else:
        explain(model, X)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, state[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convert", [accelerate, lambda model: model])
def test_a_graph_from_before_can_still_be_differentiated(convert: Any, training: bool) -> None:
    def build() -> Any:
        torch.manual_seed(1)
        model = convert(small()).train(training)
        model.register_buffer("gain", torch.ones((), dtype=torch.float64))
        model.fc.register_forward_hook(lambda _, __, out: out * model.gain.add_(1))
        return model

    want, model = step(build(), X), build()
    x = X.clone().requires_grad_()
    y = model(x)
    explain(model, X)
    y.backward(image(*y.shape, seed=2))
    torch.testing.assert_close(x.grad, want["x.grad"])
