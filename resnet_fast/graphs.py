# SPDX-License-Identifier: BSD-3-Clause
"""Traced by torch.fx: standard nodes in the graph, fused ops in the code made from it.

A tracer (torchvision's and timm's create_feature_extractor, symbolic_trace) is shown the plain
modules, so every node has the name and the value it has without us, and passes over the graph find
what they look for. Which of them are read by nobody but the next is known only once the graph is
done: a node that is asked for has a second user. So it is the code generator of the graph that
fuses, each time PyTorch compiles the graph, and the functions here ask again at each call. A graph
that was traced from a plain model gets the same code generator when it is accelerated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from resnet_fast import blocks, functional
from resnet_fast._ready import (
    fell_back,
    plain_context,
    plain_module,
    plain_norm,
    plain_tensor,
    why_not_context,
)

_SUMS = (operator.add, operator.iadd, torch.add)


# ---- what the code calls -------------------------------------------------------------------------
def norm(bn: nn.Module, x: Tensor) -> Tensor:
    """bn(x) of a traced model."""
    if isinstance(x, fx.Proxy):  # a pickled graph is traced from its code again
        traced(x)
        return cast(Tensor, bn(x))
    return blocks.bn_act(bn, x, activation=None)


def norm_relu(bn: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """relu(bn(x)) of a traced model."""
    if _plain_context(x):
        return blocks.norm_relu(bn, relu, x)
    return cast(Tensor, relu(bn(x)))


def norm_add_relu(bn: nn.Module, relu: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """relu(bn(x) + shortcut) of a traced model."""
    y = blocks.fused_join(bn, relu, x, shortcut) if _plain_context(x) else None
    return cast(Tensor, relu(bn(x) + shortcut)) if y is None else y


def add_relu(relu: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """relu(x + shortcut) of a traced model."""
    if (
        plain_tensor(x)
        and _plain_context(x)
        and plain_module(relu, nn.ReLU)
        and not blocks.why_not_add(x, shortcut)
    ):
        return functional.add_relu(x, shortcut)
    return cast(Tensor, relu(x + shortcut))


def _plain_context(x: object) -> bool:
    if plain_context(x):
        return True
    if isinstance(x, fx.Proxy):
        traced(x)
    else:
        fell_back("batch_norm_act", x, why_not_context(x))
    return False


# ---- from trace to code --------------------------------------------------------------------------
def traced(x: fx.Proxy) -> None:
    """Have the graph that x is being traced into compiled with fused ops, if nobody else minds.

    Asked for by the blocks that a tracer comes to. A graph with a code generator of its own, or
    one that is not traced from a module, stays as it is.
    """
    graph, root = getattr(x.tracer, "graph", None), getattr(x.tracer, "root", None)
    if type(getattr(graph, "_codegen", None)) is CodeGen and isinstance(root, nn.Module):
        cast(fx.Graph, graph).set_codegen(FusedCode(root))


def fuse_code(module: nn.Module) -> None:
    """Have the graphs of a GraphModule compiled with fused ops, if there is anything to fuse.

    Other modules stay, and so do graphs with a code generator of their own.
    """
    graphs = [g for g in _graphs(module) if type(g._codegen) is CodeGen]
    changed = [g for g in graphs if FusedCode(module).finds_work(g)]
    for graph in changed:
        graph.set_codegen(FusedCode(module))
    if changed:
        cast(fx.GraphModule, module).recompile()


def restore_code(module: nn.Module) -> None:
    """Have the graphs of a GraphModule compiled as PyTorch does it; other modules stay."""
    changed = [g for g in _graphs(module) if isinstance(g._codegen, FusedCode)]
    for graph in changed:
        graph.set_codegen(CodeGen())
    if changed:
        cast(fx.GraphModule, module).recompile()


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """The graphs of a GraphModule; none of other modules."""
    if not isinstance(module, fx.GraphModule):
        return []
    # torchvision's has two besides the one in use: for training and for evaluation.
    return list({id(g): g for g in vars(module).values() if isinstance(g, fx.Graph)}.values())


def is_fused(module: nn.Module) -> bool:
    """True for a GraphModule whose code calls the functions above."""
    return isinstance(module, fx.GraphModule) and isinstance(module.graph._codegen, FusedCode)


class FusedCode(CodeGen):
    """The code of a graph with norms, sums and ReLUs that nobody else reads as one call.

    root: the module that was traced. Its norms and ReLUs are known by name: a hint alone, for what
    stands under the name is looked at in every call.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        named = dict(root.named_modules())
        means = [id(mean) for m in named.values() if (mean := _mean(m)) is not None]
        # NOTE: norms that share running statistics must move them in the order of the graph.
        self.norms = frozenset(
            name
            for name, m in named.items()
            if (type(m) is nn.BatchNorm2d or plain_norm(m)) and means.count(id(_mean(m))) < 2
        )
        self.relus = frozenset(name for name, m in named.items() if isinstance(m, nn.ReLU))

    def finds_work(self, graph: fx.Graph) -> bool:
        """True if the code of a graph would differ from PyTorch's."""
        norms = any(_calls_one_of(node, self.norms) for node in graph.nodes)
        return norms or bool(_Fusion(self.norms, self.relus, graph.nodes).calls)

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("record_func"):  # the profiler counts the lines of the graph
            return super()._gen_python_code(nodes, *args, **kwargs)
        fusion = _Fusion(self.norms, self.relus, nodes)
        code = super()._gen_python_code(fusion.graph.nodes, *args, **kwargs)
        # Compilers go from a line to the node of the graph, by its index.
        lines = code._lineno_map or {}
        code._lineno_map = {k: None if i is None else fusion.origin[i] for k, i in lines.items()}
        return code


def _mean(m: nn.Module) -> Tensor | None:
    return m._buffers.get("running_mean")


class _Fusion:
    """A copy of a graph, to be printed, in which runs of nodes are one call."""

    def __init__(
        self, norms: frozenset[str], relus: frozenset[str], nodes: Iterable[fx.Node]
    ) -> None:
        self.norms, self.relus = norms, relus
        self.graph = fx.Graph()
        self.order = list(nodes)
        self.place = {node: i for i, node in enumerate(self.order)}
        self.calls: dict[fx.Node, tuple[Any, ...]] = {}  # the last node of a run -> what to call
        self.inside: set[fx.Node] = set()  # the others of a run
        for node in self.order:
            if _calls_one_of(node, self.relus):
                self._end_at(node)
        self._copy()

    def _end_at(self, relu: fx.Node) -> None:
        """Find the run that ends at a ReLU."""
        (before,) = relu.args
        assert isinstance(before, fx.Node)
        if len(before.users) != 1 or self.place[before] + 1 != self.place[relu]:
            return
        if _calls_one_of(before, self.norms):
            self.calls[relu] = (norm_relu, before.target, relu.target, before.args[0])
            self.inside.add(before)
        elif _is_sum(before):
            a, b = cast("tuple[fx.Node, fx.Node]", before.args)
            self.inside.add(before)
            for branch, shortcut in ((a, b), (b, a)):
                if self._may_wait(branch, before):
                    x = branch.args[0]
                    self.calls[relu] = (norm_add_relu, branch.target, relu.target, x, shortcut)
                    self.inside.add(branch)
                    return
            self.calls[relu] = (add_relu, relu.target, a, b)

    def _may_wait(self, bn: fx.Node, until: fx.Node) -> bool:
        """True if nobody can tell whether a norm runs at its place or at a later node's."""
        between = self.order[self.place[bn] + 1 : self.place[until]]
        return (
            _calls_one_of(bn, self.norms)
            and len(bn.users) == 1
            and all(node.target != bn.target for node in between)
        )

    def _copy(self) -> None:
        copies: dict[fx.Node, fx.Node] = {}
        self.origin: list[int] = []  # for each node of the copy the index of the one it is for
        for place, node in enumerate(self.order):
            if node in self.inside:
                continue
            if node in self.calls:
                copies[node] = self._call(node, self.calls[node], copies)
            elif _calls_one_of(node, self.norms):
                copies[node] = self._call(node, (norm, node.target, node.args[0]), copies)
            else:
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
            self.origin += [place] * (len(self.graph.nodes) - len(self.origin))
        for node in self.graph.nodes:
            node._repr_fn = self.order[0]._repr_fn  # the names of the code that is being written

    def _call(
        self, node: fx.Node, call: tuple[Any, ...], copies: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        function, *given = call
        args = [
            copies[a] if isinstance(a, fx.Node) else self.graph.create_node("get_attr", a)
            for a in given
        ]
        return self.graph.create_node("call_function", function, tuple(args), name=node.name)


def _calls_one_of(node: fx.Node, names: frozenset[str]) -> bool:
    """True if a node calls a module of these names with one node."""
    return (
        node.op == "call_module"
        and node.target in names
        and len(node.args) == 1
        and isinstance(node.args[0], fx.Node)
        and not node.kwargs
    )


def _is_sum(node: fx.Node) -> bool:
    """True if a node is the plain sum of two others, not of one with itself."""
    return (
        node.op == "call_function"
        and node.target in _SUMS
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) for a in node.args)
        and node.args[0] is not node.args[1]
        and not node.kwargs
    )
