# SPDX-License-Identifier: BSD-3-Clause
"""A fused graph as straight-line Python functions, every value released after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from resnet_fast.inference.batches import Level, Segment, levels, split
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.hooks import Caller, hook_call

# From (spec, its folded weight and bias in float64) to the function of (x) or (x, residual).
ConvMaker = Callable[[ConvSpec, Mapping[fx.Node, Any]], Callable[..., Tensor]]
Ready = Callable[[Tensor], Tensor]


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


# From the values that a segment takes, in a list that it empties (so that each is released after
# its last use), to those that it gives.
Function = Callable[[list[Any]], list[Any]]


def compile_segment(
    segment: Segment,
    constants: Mapping[fx.Node, Any],
    make_conv: ConvMaker,
    hook_calls: Sequence[Caller] = (),
) -> Function:
    """A segment as a function; what the last one gives are the graph's outputs.

    hook_calls: what each hook_call calls, by its number.
    """
    writer = Writer(constants)
    for number, node in enumerate(segment.takes):
        writer.names[node] = f"x{number}"
    taken = "".join(f"{writer.names[node]}, " for node in segment.takes)
    writer.lines += [f"{taken}= values" if taken else "", "values.clear()"]
    for node in segment.nodes:
        if node.op == "output":
            writer.lines.append(f"return {_outputs(writer, node)}")
            break
        if node.target is fused_conv:
            x, residual, spec = cast(Any, node.args[:3])
            args = [x] if residual is None else [x, residual]
            writer.call(node, make_conv(spec, constants), args, {})
        elif node.target is hook_call:
            tensors, results, point, sources = cast(Any, node.args)
            args = [tensors, results, *sources]
            writer.call(node, hook_calls[point], args, {})
        else:
            writer.call(node, node.target, node.args, node.kwargs)
        _release(writer, node)
    else:
        writer.lines.append(f"return [{writer.names[segment.nodes[-1]]}]")
    source = "def run(values):\n    " + "\n    ".join(writer.lines)
    exec(compile(source, "<resnet_fast.inference>", "exec"), writer.scope)
    run: Function = writer.scope["run"]
    return run


class Program:
    """The functions of all segments, one after the other.

    segments: what the functions were made of; None where no batch may run in pieces.
    """

    def __init__(
        self, functions: Sequence[Function], segments: Sequence[Segment] | None = None
    ) -> None:
        self._functions, self._segments = functions, segments

    def __call__(self, *inputs: Tensor) -> list[Any]:
        """All at once."""
        return self._through(list(inputs), 0, len(self._functions))

    def plan(self, sizes: Mapping[Any, int], batch: int) -> list[Level]:
        """In which pieces a batch runs. sizes: of the trace's symbols."""
        if self._segments is None:
            return [Level(batch, 0, len(self._functions))]
        return levels(self._segments, sizes, batch)

    def run(self, inputs: Sequence[Tensor], plan: Sequence[Level], ready: Ready) -> list[Any]:
        """What the last level of a plan gives; the levels before it run on each piece.

        inputs: each with the samples in front where there is more than one piece. ready: brings a
        piece of an input to the dtype and layout that the graph takes.
        """
        level, before = plan[-1], plan[:-1]
        batch = len(inputs[0]) if inputs and inputs[0].dim() else 1
        start, gathered = 0, list[Any]()
        for size in split(batch, level.piece):
            part = inputs if size == batch else [x.narrow(0, start, size) for x in inputs]
            values = self.run(part, before, ready) if before else list(map(ready, part))
            values = self._through(values, level.first, level.last)
            if size == batch:
                return values
            gathered = gathered or [_room(value, batch) for value in values]
            for whole, value in zip(gathered, values, strict=True):
                if isinstance(value, Tensor):
                    whole.narrow(0, start, size).copy_(value)
            start += size
        return gathered

    def _through(self, values: list[Any], first: int, last: int) -> list[Any]:
        for function in self._functions[first:last]:
            values = function(values)
        return values


def _room(part: Any, batch: int) -> Any:
    """Memory for a value of the whole batch, in the layout of a part's."""
    if not isinstance(part, Tensor):
        return part
    size = (batch, *part.shape[1:])
    if part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(size, dtype=part.dtype, memory_format=torch.channels_last)
    return part.new_empty(size)


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
