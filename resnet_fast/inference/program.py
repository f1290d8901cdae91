# SPDX-License-Identifier: BSD-3-Clause
"""A fused graph as straight-line Python functions, every value released after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from resnet_fast.inference.batches import Level, Segment, levels, split
from resnet_fast.inference.fold import Conv, ConvSpec, Writes
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.hooks import Caller, hook_call
from resnet_fast.inference.schedule import Block, Rooms, Schedule
from resnet_fast.inference.sequence import Function

# From (spec, its folded weight and bias in float64) to what computes the conv.
ConvMaker = Callable[[ConvSpec, Mapping[fx.Node, Any]], Conv]
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

    def call(
        self, node: fx.Node, function: Any, args: Any, kwargs: Mapping[str, Any], *more: str
    ) -> None:
        """more: arguments as source text."""
        texts = [*map(self.argument, args), *more]
        texts += [f"{key}={self.argument(value)}" for key, value in kwargs.items()]
        self.names[node] = f"v{len(self.lines)}"
        self.lines.append(f"{self.names[node]} = {self.bind(function)}({', '.join(texts)})")


def compile_segment(
    segment: Segment,
    constants: Mapping[fx.Node, Any],
    make_conv: ConvMaker,
    convs: dict[fx.Node, Writes],
    hook_calls: Sequence[Caller] = (),
) -> Function:
    """A segment as a function; what the last one gives are the graph's outputs.

    convs: is given those that write where they are told; their order numbers them. hook_calls: what
    each hook_call calls, by its number.
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
            _write_conv(writer, node, make_conv(cast(Any, node.args[2]), constants), convs)
        elif node.target is hook_call:
            tensors, results, point, sources = cast(Any, node.args)
            args = [tensors, results, *sources]
            writer.call(node, hook_calls[point], args, {})
        else:
            writer.call(node, node.target, node.args, node.kwargs)
        _release(writer, node)
    else:
        writer.lines.append(f"return [{writer.names[segment.nodes[-1]]}]")
    source = "def run(values, room):\n    " + "\n    ".join(writer.lines)
    exec(compile(source, "<resnet_fast.inference>", "exec"), writer.scope)
    run: Function = writer.scope["run"]
    return run


def _write_conv(writer: Writer, node: fx.Node, conv: Conv, convs: dict[fx.Node, Writes]) -> None:
    x, residual, spec = cast(Any, node.args[:3])
    if not isinstance(conv, Writes):
        writer.call(node, conv, [x] if residual is None else [x, residual], {})
        return
    into = writer.argument(residual) if spec.inplace else f"room[{len(convs)}]"
    convs[node] = conv
    writer.call(node, conv.function, [x, residual], {}, into)


class Program:
    """The functions of all segments, one after the other.

    segments: what the functions were made of. convs: those that write where they are told. batch:
    the trace's symbol for the batch; None where no batch may run in pieces.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        segments: Sequence[Segment],
        convs: Mapping[fx.Node, Writes],
        batch: Any = None,
    ) -> None:
        self._functions, self._segments, self._convs = functions, segments, convs
        self._batch = batch
        self._blocks: list[Block] = []  # those that no call is using

    def __call__(self, *inputs: Tensor) -> list[Any]:
        """All at once, in memory of its own."""
        values: list[Any] = list(inputs)
        for function in self._functions:
            values = function(values, [None] * len(self._convs))
        return values

    @property
    def kept_bytes(self) -> int:
        """Of the blocks that no call is using now."""
        return sum(block.bytes for block in [*self._blocks])

    def schedule(self, sizes: Mapping[Any, int], batch: int) -> Schedule:
        """How a batch runs. sizes: of the trace's symbols."""
        if self._batch is None:
            found = [Level(batch, 0, len(self._functions))]
        else:
            found = levels(self._segments, sizes, batch)
        return Schedule(found, self._segments, self._convs, sizes, self._batch, batch)

    def run(self, inputs: Sequence[Tensor], schedule: Schedule, ready: Ready) -> list[Any]:
        """What the program gives for a batch.

        inputs: each with the samples in front where there is more than one piece. ready: brings a
        piece of an input to the dtype and layout that the graph takes.
        """
        try:
            block = self._blocks.pop()
        except IndexError:
            block = Block()
        try:
            rooms = block.rooms(schedule, self._functions)
            return _level(inputs, schedule.levels, rooms, ready, None)
        finally:
            self._blocks.append(block)


def _level(
    inputs: Sequence[Tensor],
    levels: Sequence[Level],
    rooms: Rooms,
    ready: Ready,
    target: Tensor | None,
) -> list[Any]:
    """What the last of the levels gives; those before it run on each of its pieces.

    target: memory for the one value that it gives, if that is not the program's result.
    """
    at = len(levels) - 1
    batch = len(inputs[0]) if inputs and inputs[0].dim() else 1
    start, gathered = 0, list[Any]()
    for size in split(batch, levels[at].piece):
        part = inputs if size == batch else [x.narrow(0, start, size) for x in inputs]
        if at:
            values = _level(part, levels[:at], rooms, ready, rooms.boundary(at - 1, size))
        else:
            values = list(map(ready, part))
        slot = None if target is None else target.narrow(0, start, size)
        values = rooms.through(at, size, values, slot)
        if size == batch:
            return values
        if slot is None:
            gathered = gathered or [_room(value, batch) for value in values]
            for whole, value in zip(gathered, values, strict=True):
                if isinstance(value, Tensor):
                    whole.narrow(0, start, size).copy_(value)
        elif values[0].data_ptr() != slot.data_ptr():
            slot.copy_(values[0])
        start += size
    return gathered if target is None else [target]


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
