# SPDX-License-Identifier: BSD-3-Clause
"""A fused graph as one straight-line Python function, every value released after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.hooks import Caller, hook_call

# From (spec, its folded weight and bias in float64) to the function of (x) or (x, residual).
ConvMaker = Callable[[ConvSpec, Mapping[fx.Node, Any]], Callable[..., Tensor]]


class Writer:
    """Collects the lines of the function and the objects they refer to."""

    def __init__(self, constants: Mapping[fx.Node, Any]) -> None:
        self.scope: dict[str, Any] = {}
        self.lines: list[str] = []
        self.constants = constants
        self.names: dict[fx.Node, str] = {}

    def bind(self, value: Any) -> str:
        """A name for an object."""
        name = f"k{len(self.scope)}"
        self.scope[name] = value
        return name

    def argument(self, value: Any) -> str:
        """The source text of an argument."""
        if isinstance(value, fx.Node):
            if value not in self.names and value in self.constants:
                self.names[value] = self.bind(self.constants[value])
            return self.names[value]
        if isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            return "[" + ", ".join(map(self.argument, value)) + "]"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        return self.bind(value)

    def call(self, node: fx.Node, function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        texts = [*map(self.argument, args)]
        texts += [f"{key}={self.argument(value)}" for key, value in kwargs.items()]
        self.names[node] = f"v{len(self.lines)}"
        self.lines.append(f"{self.names[node]} = {self.bind(function)}({', '.join(texts)})")


def compile_graph(
    graph: fx.Graph,
    inputs: list[str],
    constants: Mapping[fx.Node, Any],
    make_conv: ConvMaker,
    hook_calls: Sequence[Caller] = (),
) -> Callable[..., Any]:
    """The graph as a function of its inputs, returning the list of its outputs.

    hook_calls: what each hook_call calls, by its number.
    """
    writer = Writer(constants)
    places = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for number, name in enumerate(inputs):
        writer.names[places[name]] = f"x{number}"
    for node in graph.nodes:
        if node.op == "output":
            writer.lines.append(f"return {_outputs(writer, node)}")
        elif node.op == "call_function" and node not in constants:
            if node.target is fused_conv:
                x, residual, spec = node.args[:3]
                args = [x] if residual is None else [x, residual]
                writer.call(node, make_conv(spec, constants), args, {})
            elif node.target is hook_call:
                tensors, results, point, sources = node.args
                args = [tensors, results, *sources]
                writer.call(node, hook_calls[point], args, {})
            else:
                writer.call(node, node.target, node.args, node.kwargs)
            _release(writer, node)
    source = f"def run({', '.join(f'x{n}' for n in range(len(inputs)))}):\n    "
    source += "\n    ".join(writer.lines)
    exec(compile(source, "<resnet_fast.inference>", "exec"), writer.scope)
    run: Callable[..., Any] = writer.scope["run"]
    return run


def _outputs(writer: Writer, node: fx.Node) -> str:
    (values,) = node.args
    assert isinstance(values, list | tuple)
    return "[" + ", ".join(map(writer.argument, values)) + "]"


def _release(writer: Writer, node: fx.Node) -> None:
    """Drop what is read here for the last time."""
    later = set()
    following = node.next
    while following.op != "root":
        later.update(following.all_input_nodes)
        following = following.next
    dead = [n for n in node.all_input_nodes if n not in later and n not in writer.constants]
    for name in dict.fromkeys(writer.names[n] for n in dead):
        writer.lines.append(f"{name} = None")


def evaluate_constants(
    graph: fx.Graph, known: set[fx.Node], given: Mapping[str, Tensor]
) -> dict[fx.Node, Any]:
    """Values of the constant nodes from those of the placeholders among them."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in known:
                continue
            if node.op == "placeholder":
                values[node] = given[node.name]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[misc]
                values[node] = node.target(*args, **kwargs)
    return values
