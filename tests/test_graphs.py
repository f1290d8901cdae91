# SPDX-License-Identifier: BSD-3-Clause
"""Graphs that torch.fx traces from accelerated models: standard nodes, fused code (graphs.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision_blocks import tv
from twins import assert_same, image, randomise, step

import resnet_fast as rf
from resnet_fast import dispatch, graphs


def pair(**kwargs: Any) -> tuple[Any, Any]:
    """A torchvision ResNet of basic blocks traced plain, and traced accelerated."""
    torch.manual_seed(0)
    plain = randomise(tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=10, **kwargs))
    fast = rf.accelerate(copy.deepcopy(plain))
    return fx.symbolic_trace(plain), fx.symbolic_trace(fast)


def reasons(call: Any, *args: Any) -> set[str]:
    with dispatch.recording() as events:
        call(*args)
    return {event.reason for event in events}


X = image(2, 3, 32, 32)


def test_the_nodes_are_those_of_plain_tracing() -> None:
    plain, fast = pair()
    assert str(fast.graph) == str(plain.graph)
    assert graphs.is_fused(fast)
    assert not graphs.is_fused(plain)
    assert fast.code.count("norm_add_relu(") == 4
    assert_same(step(fast, X, 2), step(plain, X, 2))


HOOKED = [
    *((name, kind) for name in ("bn1", "relu", "bn2") for kind in ("forward", "forward_pre")),
    # PyTorch refuses a full backward hook before a ReLU that works in place.
    *(("bn2", "full_backward"), ("downsample.1", "full_backward")),
]


@pytest.mark.parametrize(("name", "kind"), HOOKED)
def test_hooks_are_called(name: str, kind: str) -> None:
    seen: list[list[Tensor]] = [[], []]
    models = pair()
    for model, log in zip(models, seen, strict=True):

        def keep(_: Any, x: Any, y: Any = None, *, log: list[Tensor] = log) -> None:
            log.append((x[0] if y is None or isinstance(y, tuple) else y).detach().clone())

        getattr(model.get_submodule(f"layer2.0.{name}"), f"register_{kind}_hook")(keep)
    want, got = (step(model, X) for model in models)
    assert_same(got, want)
    assert len(seen[0]) == len(seen[1]) == (2 if name == "relu" else 1)
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(name[:2] in reason or "the norm" in reason for reason in reasons(models[1], X))


def test_a_replaced_module_is_called() -> None:
    for model in (models := pair()):
        model.get_submodule("layer1.0").bn1 = nn.GroupNorm(4, 64).double()
        model.get_submodule("layer3.0").relu = nn.SiLU()
    assert_same(step(models[1], X), step(models[0], X))


def test_a_graph_edited_after_tracing() -> None:
    """Passes over the graph find standard nodes; what they put in is in the code."""
    for model in (models := pair()):
        for node in list(model.graph.nodes):
            if node.name == "layer1_0_bn1":
                with model.graph.inserting_after(node):
                    new = model.graph.call_function(torch.neg, (node,))
                node.replace_all_uses_with(new, lambda user, new=new: user is not new)
        model.graph.lint()
        model.recompile()
    assert_same(step(models[1], X), step(models[0], X))
    assert reasons(models[1], X) == {""}


class Twice(nn.Module):
    """What two modules in one place, a scalar, a sum of one value and another order give."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.seq(x)
        a = self.bn(x)
        b = self.bn(2 * x)
        x = self.relu(a + b)
        x = self.relu(self.bn(x) + 1)
        x = self.relu(x + self.bn(x))
        a = self.bn(x)
        x = self.relu(a + a)
        x = self.relu(self.bn(x) + 2 * x + self.bn(x))
        return self.relu(torch.add(self.bn(x), x[:, :1]))


def test_sums_of_every_kind() -> None:
    plain = randomise(Twice())
    fast = fx.symbolic_trace(rf.accelerate(copy.deepcopy(plain)))
    assert graphs.is_fused(fast)
    x = image(2, 4, 3, 3)
    assert_same(step(fast, x, 2), step(fx.symbolic_trace(plain), x, 2))


def test_tracers_and_compilers_over_the_code() -> None:
    plain, fast = (model.eval() for model in pair())
    want = plain(X)
    again = fx.symbolic_trace(fast)
    nodes = [sorted(str(node.target) for node in m.graph.nodes) for m in (plain, again)]
    assert nodes[0] == nodes[1]
    assert graphs.is_fused(again)
    traced = torch.jit.trace(fast, (X,))
    exported = torch.export.export(fast, (X,))
    assert not any("resnet_fast" in str(node.target) for node in exported.graph.nodes)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for model in (again, traced, exported.module(), compiled, fx.Interpreter(fast).run):
        torch.testing.assert_close(model(X), want)


def test_restore_gives_the_plain_code_back() -> None:
    plain, fast = (model.eval() for model in pair())
    assert rf.restore(fast) is fast
    assert fast.code == plain.code
    assert not reasons(fast, X)
    torch.testing.assert_close(torch.jit.script(fast)(X), plain(X))


# ---- traced from a plain model, accelerated afterwards -------------------------------------------
def test_a_plain_graph_is_accelerated() -> None:
    plain, _ = pair()
    fast = copy.deepcopy(plain)
    graph, code = fast.graph, fast.code
    assert rf.accelerate(fast) is fast
    assert fast.graph is graph
    assert str(graph) == str(plain.graph)
    assert fast.code.count("norm_add_relu(") == 4
    assert_same(step(fast, X, 2), step(plain, X, 2))
    assert reasons(fast, X) == {""}
    again = fast.code
    assert rf.accelerate(fast).code == again
    assert rf.restore(fast).code == code
    assert not reasons(fast, X)
    assert [n.name for n in fast.graph.nodes] == [n.name for n in plain.graph.nodes]


def test_a_plain_graph_inside_another_module() -> None:
    plain, _ = pair()
    outer = nn.Sequential(plain, nn.Linear(10, 4).double())
    want = outer(X)
    rf.accelerate(outer)
    assert graphs.is_fused(outer[0])
    torch.testing.assert_close(outer(X), want)
    assert rf.explain(outer, X).rows[0].reason == ""


def test_graphs_with_nothing_to_fuse_stay() -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert not graphs.is_fused(rf.accelerate(net))
    exported = torch.export.export(tv.resnet18().eval(), (torch.randn(2, 3, 32, 32),)).module()
    before = exported.code
    assert rf.accelerate(exported).code == before


def test_a_plain_graph_with_hooks_and_replaced_modules() -> None:
    """What is asked at each call of a graph traced from an accelerated model is asked here, too."""
    plain, _ = pair()
    models = plain, rf.accelerate(copy.deepcopy(plain))
    seen: list[list[Tensor]] = [[], []]
    for model, log in zip(models, seen, strict=True):
        model.get_submodule("layer1.0").bn1 = nn.GroupNorm(4, 64).double()
        model.get_submodule("layer2.0.bn2").register_forward_hook(
            lambda _, __, y, log=log: log.append(y.detach().clone())
        )
    assert_same(step(models[1], X), step(models[0], X))
    torch.testing.assert_close(seen[1], seen[0])


def test_a_code_generator_of_its_own_is_left_alone() -> None:
    class Own(fx.graph.CodeGen):
        pass

    class Tracer(fx.Tracer):
        def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
            if type(self.graph._codegen) is fx.graph.CodeGen:
                self.graph.set_codegen(Own())
            return super().create_proxy(*args, **kwargs)

    model = rf.accelerate(tv.ResNet(tv.BasicBlock, [1, 1, 1, 1]))
    assert type(Tracer().trace(model)._codegen) is Own
    net = rf.accelerate(fx.GraphModule(model, Tracer().trace(rf.restore(model))))
    assert type(rf.restore(net).graph._codegen) is Own
