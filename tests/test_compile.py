# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export: whole graphs, no recompiles, the same numbers and statistics.

Compiled and uncompiled runs are compared with each other, in float64 by torch.testing's default
tolerance: both run the same kernels, and only what surrounds them is fused anew. Against eager the
kernels are tested elsewhere. Inductor takes ten seconds and more a graph: most of it is `slow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from layouts import lay
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import resnet_fast as rf
from resnet_fast import functional

pytestmark = pytest.mark.implementations("reference", "cpu")


@pytest.fixture(autouse=True)
def _no_state_between_tests() -> Iterator[None]:
    torch._dynamo.reset()
    # NOTE: caches of graphs do not key on the fakes of operators; that of C++ sources may stay.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A convolution, batch norm with activation, another with the join, add_relu, a loss."""

    def __init__(self, settings: str = "defaults") -> None:
        super().__init__()
        self.explicit = settings != "defaults"
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        a = self._act(self.bn1, z, None)
        b = self._act(self.bn2, self.conv(a[:, :3]), a)
        return functional.add_relu(b, z)

    def _act(self, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor:
        more = {"momentum": bn.momentum, "eps": bn.eps} if self.explicit else {}
        return functional.batch_norm_act(
            x,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            residual=residual,
            training=self.training,
            **more,
        )


def step(net: Net, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """Forward and backward: output, gradients, statistics. The gradient of .sum() has stride 0."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    y = call(x)
    (y.sum() + (y * y).mean()).backward()
    results = {"y": y.detach(), "dx": x.grad}
    results |= {f"d {name}": p.grad.clone() for name, p in net.named_parameters()}
    return results | {name: b.clone() for name, b in net.named_buffers()}


def assert_close(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, t in ours.items():
        torch.testing.assert_close(t, other[name], msg=lambda m, name=name: f"{name}: {m}")


SLOW_INDUCTOR = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.implementations("cpu")
def test_training_steps_with_inductor(impl) -> None:
    """channels_last, behind a convolution: where a fake with wrong strides would show."""
    _training_steps("inductor", "channels_last")


@pytest.mark.implementations("cpu")
@pytest.mark.parametrize("op", ["add_relu", "batch_norm_act"])
def test_inductor_may_choose_the_layout(impl, op: str) -> None:
    """A contiguous model, whose convolution Inductor moves to channels_last: forward and backward
    must agree on the order of the mask's bits in whatever layout they are handed."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    leaves = [t.requires_grad_() for t in (torch.randn(2, 3, 9, 7), torch.randn(2, 8, 9, 7))]

    def f(x: Tensor, residual: Tensor) -> Tensor:
        if op == "add_relu":
            return functional.add_relu(conv(x), residual)
        return functional.batch_norm_act(
            conv(x),
            None,
            None,
            None,
            None,
            residual=residual,
            training=True,
            momentum=0.1,
            eps=1e-5,
        )

    grad = torch.randn(2, 8, 9, 7)
    want = torch.autograd.grad(f(*leaves), leaves, grad)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", SLOW_INDUCTOR)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_training_steps(impl, backend: str, layout: str) -> None:
    _training_steps(backend, layout)


def _training_steps(backend: str, layout: str) -> None:
    """Three steps, fullgraph: outputs, gradients and running statistics as without a compiler."""
    plain, net = Net(), Net()
    if layout == "channels_last":
        plain, net = (m.to(memory_format=torch.channels_last) for m in (plain, net))
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(3):
        x = lay(torch.randn(2, 3, 9, 7, dtype=torch.float64), layout)
        assert_close(step(net, compiled, x), step(plain, plain, x))
    assert net.bn1.running_mean.any()


@pytest.mark.parametrize("backend", SLOW_INDUCTOR)
def test_eval_without_gradients(impl, backend: str) -> None:
    net = Net().eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        want = net(x)
        got = torch.compile(net, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    assert not net.bn1.running_mean.any()


@pytest.mark.slow_for("reference")
@pytest.mark.parametrize("backend", SLOW_INDUCTOR)
@pytest.mark.parametrize("settings", ["defaults", "the module's"])
def test_dynamic_shapes_do_not_recompile(impl, backend: str, settings: str) -> None:
    """With the op's own momentum and eps, and with those of a module."""
    plain, net = Net(settings), Net(settings)
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 9, 7), (3, 3, 11, 8), (5, 3, 6, 10)):
            x = torch.randn(size, dtype=torch.float64)
            assert_close(step(net, compiled, x), step(plain, plain, x))


def test_the_same_shape_does_not_recompile(impl) -> None:
    net = Net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            step(net, compiled, torch.randn(2, 3, 9, 7, dtype=torch.float64))


@pytest.mark.implementations("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "permuted"])
def test_any_layout_of_input_and_gradient(impl, dtype: torch.dtype, layout: str) -> None:
    """One op by itself, its inputs dense or not, with every layout of the incoming gradient."""

    def f(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return functional.batch_norm_act(
            x, weight, None, None, None, residual=residual, training=True
        )

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x, residual = (lay(torch.randn(2, 5, 4, 3).to(dtype), layout) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, torch.rand(5), residual)]
    for grad_layout in ("contiguous", "channels_last", "expanded", "permuted"):
        grad = lay(torch.randn(2, 5, 4, 3).to(dtype), grad_layout)
        got = torch.autograd.grad(compiled(*leaves), leaves, grad)
        want = torch.autograd.grad(f(*leaves), leaves, grad)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_strides_of_the_output_are_the_eager_ones(impl) -> None:
    net = Net().to(memory_format=torch.channels_last)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for layout in ("contiguous", "channels_last"):
        x = lay(torch.randn(2, 3, 9, 7, dtype=torch.float64), layout)
        assert compiled(x).stride() == net(x).stride()


@pytest.mark.implementations("cpu")
def test_the_graph_holds_our_operators(impl) -> None:
    """Forward and backward operators are in the graph, opaque, one node for each call."""
    seen: dict[str, str] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen[name] = graph.code
            return graph.forward

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    net = Net()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    step(net, torch.compile(net, backend=backend, fullgraph=True), x)
    # A mutating operator stands in the graph as an argument of auto_functionalized.
    assert seen["forward"].count("resnet_fast.batch_norm_act_forward.default") == 2
    assert seen["forward"].count("resnet_fast.add_relu_forward.default") == 1
    assert seen["backward"].count("resnet_fast.batch_norm_act_backward.default") == 2
    assert seen["backward"].count("resnet_fast.add_relu_backward.default") == 1
    assert "aten._native_batch_norm" not in seen["forward"] + seen["backward"]
    assert "aten.relu" not in seen["forward"]


@pytest.mark.implementations("cpu")
def test_changing_the_backend_recompiles(impl) -> None:
    """What was compiled for one implementation is not run when another is asked for."""
    x, weight = torch.randn(2, 5, 4, 3), torch.rand(5)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def f(x: Tensor) -> Tensor:
        return functional.batch_norm_act(x, weight, None, None, None, training=True)

    first = f(x)
    with rf.use_backend("reference"):
        second = f(x)
    torch.testing.assert_close(first, second)
    assert len(graphs) == 2
    assert "resnet_fast" in graphs[0]
    assert "resnet_fast" not in graphs[1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export_gives_standard_operators(impl, training: bool) -> None:
    """An exported program runs where the package is not installed."""
    net = Net().train(training)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    want = Net().train(training)(x).detach()
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets
    assert all(t.startswith("aten.") or "operator" in t for t in targets), targets
    torch.testing.assert_close(program.module()(x).detach(), want)
    assert program.module()(torch.randn(5, 3, 9, 7, dtype=torch.float64)).shape == (5, 8, 9, 7)


def test_autocast_inside_a_compiled_region(impl) -> None:
    plain, net = Net().float(), Net().float()

    def call(m: Net) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return m(x)

        return f

    x = torch.randn(2, 3, 9, 7)
    got = step(net, torch.compile(call(net), backend="aot_eager", fullgraph=True), x)
    want = step(plain, call(plain), x)
    assert got["y"].dtype == torch.bfloat16
    for name, t in got.items():
        torch.testing.assert_close(t, want[name], rtol=2**-7, atol=2**-5)
