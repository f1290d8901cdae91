# SPDX-License-Identifier: BSD-3-Clause
"""U28: torch.compile in one graph, static and dynamic, torch.export, jit.trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from twins import Results, assert_same
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

WAY = Way(
    "U28",
    "compilers and export",
    EXCEPT,
    "exported and traced graphs: they hold standard operators, so that they run anywhere",
)


def step(model: Any, x: torch.Tensor) -> Results:
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    results = {"y": y.detach()} | gradients(model) | state(model)
    return {name.replace("_orig_mod.", ""): t for name, t in results.items()}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("library", ["torchvision", pytest.param("ours", marks=pytest.mark.slow)])
def test_one_graph_and_no_recompilation(library: str) -> None:
    """fullgraph, forward and backward through aot_autograd, a second batch size."""
    untouched = make(small_basic, tv)
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(
        fast_twin(library, small_basic, untouched), backend=counter, fullgraph=True, dynamic=True
    )
    graphs = []
    for count in (4, 5):  # not 3, which is also the number of channels
        x = photos(48, 7)[:count]
        assert_same(step(model, x), step(untouched, x), rtol=1e-6)
        graphs.append(counter.frame_count)
    assert graphs == [2, 2]  # a forward and a backward


def test_our_operators_are_in_the_graph() -> None:
    """What Inductor is given holds our raw operators, no batch norm of PyTorch's."""
    seen: list[str] = []

    def compiler(graph: Any, _: Any) -> Any:
        # An operator that changes a buffer is the first argument of auto_functionalized.
        seen.extend(f"{node.target} {node.args[:1]}" for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        fast_twin("torchvision", small_bottleneck, make(small_bottleneck, tv)),
        backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler),
        fullgraph=True,
    )
    step(compiled, photos())
    names = [name for name in seen if "resnet_fast" in name]
    for direction in ("forward", "backward"):
        assert sum(f"batch_norm_act_{direction}" in name for name in names) == 17
    assert not any("native_batch_norm" in name for name in seen)


@pytest.mark.slow
def test_inductor() -> None:
    untouched = make(small_basic, tv)
    model = torch.compile(fast_twin("torchvision", small_basic, untouched), fullgraph=True)
    assert_same(step(model, photos()), step(copy.deepcopy(untouched), photos()), rtol=1e-6)


def test_export() -> None:
    """torch.export of the accelerated model: the same graph of standard operators."""
    untouched = make(small_basic, tv).eval()
    fast = fast_twin("torchvision", small_basic, untouched)
    shapes = ({0: torch.export.Dim("batch", min=2, max=16)},)
    programs = [
        torch.export.export(model, (photos(),), dynamic_shapes=shapes)
        for model in (untouched, fast)
    ]
    targets = [
        [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for program in programs
    ]
    assert not any("resnet_fast" in name for name in targets[1])
    assert len(targets[0]) == len(targets[1])
    x = photos()[:2]
    torch.testing.assert_close(programs[1].module()(x), untouched(x))


def test_trace() -> None:
    def use(model: Any) -> Results:
        traced = torch.jit.trace(model.eval(), (photos(),))
        return {"y": traced(photos()[:2]).detach()}

    WAY.check(small_basic, use, falls_back=("torch.jit.trace is active",))
