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
from resnet_fast.inference.memory import Block, Plan, Rooms



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


# From the values that a segment takes, in a list that it empties (so that each is released after
# its last use), and the memory that its convs are to write to, by their numbers, to what it gives.
Function = Callable[[list[Any], Sequence[Tensor | None]], list[Any]]


def compile_segment(
    segment: Segment,
    constants: Mapping[fx.Node, Any],
    make_conv: ConvMaker,
    numbers: dict[fx.Node, int],
    hook_calls: Sequence[Caller] = (),
) -> Function:
    """A segment as a function; what the last one gives are the graph's outputs.

    numbers: is given one for each conv that writes where it is told. hook_calls: what each
    hook_call calls, by its number.
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
            _write_conv(writer, node, make_conv(cast(Any, node.args[2]), constants), numbers)
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


def _write_conv(
    writer: Writer, node: fx.Node, conv: Conv, numbers: dict[fx.Node, int]
) -> None:
    x, residual, spec = cast(Any, node.args[:3])
    if not isinstance(conv, Writes):
        writer.call(node, conv, [x] if residual is None else [x, residual], {})
        return
    numbers[node] = len(numbers)
    into = writer.argument(residual) if spec.inplace else f"room[{numbers[node]}]"
    writer.call(node, conv.function, [x, residual], {}, into)


class Program:
    """The functions of all segments, one after the other.

    segments: what the functions were made of. numbers: of the convs that write where they are told.
    batch: the trace's symbol for the batch; None where no batch may run in pieces.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        segments: Sequence[Segment],
        numbers: Mapping[fx.Node, int],
        batch: Any = None,
    ) -> None:
        self._functions, self._segments, self._numbers = functions, segments, numbers
        self._batch = batch
        self._blocks: list[Block] = []  # those that no call is using

    def __call__(self, *inputs: Tensor) -> list[Any]:
        """All at once, in memory of its own."""
        rooms = [None] * len(self._numbers)
        return self._through(list(inputs), 0, len(self._functions), rooms)

    def plan(self, sizes: Mapping[Any, int], batch: int) -> Plan:
        """In which pieces a batch runs, and where its values lie. sizes: of the trace's symbols."""
        if self._batch is None:
            found = [Level(batch, 0, len(self._functions))]
        else:
            found = levels(self._segments, sizes, batch)
        return Plan(found, self._segments, self._numbers, sizes, self._batch)

    def run(self, inputs: Sequence[Tensor], plan: Plan, ready: Ready) -> list[Any]:
        """What the program gives for a batch.

        inputs: each with the samples in front where there is more than one piece. ready: brings a
        piece of an input to the dtype and layout that the graph takes.
        """
        try:
            block = self._blocks.pop()
        except IndexError:
            block = Block()
        try:
            rooms = block.rooms(plan, len(self._numbers))
            return self._level(inputs, plan, len(plan.levels) - 1, rooms, ready, None)
        finally:
            self._blocks.append(block)

    def _level(
        self,
        inputs: Sequence[Tensor],
        plan: Plan,
        at: int,
        rooms: Rooms,
        ready: Ready,
        target: Tensor | None,
    ) -> list[Any]:
        """What a level gives; the levels before it run on each of its pieces.

        target: memory for the one value that it gives, if that is not the program's result.
        """
        level = plan.levels[at]
        batch = len(inputs[0]) if inputs and inputs[0].dim() else 1
        start, gathered = 0, list[Any]()
        for size in split(batch, level.piece):
            part = inputs if size == batch else [x.narrow(0, start, size) for x in inputs]
            if at:
                below = rooms.boundary(at - 1, size)
                values = self._level(part, plan, at - 1, rooms, ready, below)
            else:
                values = list(map(ready, part))
            room, last = rooms.of(at, size)
            slot = None if target is None else target.narrow(0, start, size)
            if last is not None:
                room[last] = slot
            values = self._through(values, level.first, level.last, room)
            if size == batch:
                return values
            if slot is not None:
                if values[0].data_ptr() != slot.data_ptr():
                    slot.copy_(values[0])
            else:
                gathered = gathered or [_room(value, batch) for value in values]
                for whole, value in zip(gathered, values, strict=True):
                    if isinstance(value, Tensor):
                        whole.narrow(0, start, size).copy_(value)
            start += size
        return gathered if target is None else [target]

    def _through(
        self, values: list[Any], first: int, last: int, room: Sequence[Tensor | None]
    ) -> list[Any]:
        for function in self._functions[first:last]:
            values = function(values, room)
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
