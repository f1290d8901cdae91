# SPDX-License-Identifier: BSD-3-Clause
"""A large batch in pieces: activations that stay in the cache, and memory that malloc re-uses.

A ResNet's first maps are large and its filters small; towards the end it is the other way round. So
the graph is cut where a single value is alive, and each segment has a piece size of its own: small
pieces for large maps, the whole batch where reading the weights again would cost most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.trace import Trace, symbolic_shape

aten = torch.ops.aten

# Operators that treat each sample by itself, if all their inputs have the batch in front.
_SAMPLEWISE = {
    fused_conv,
    aten.relu.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.sigmoid.default,
    aten.silu.default,
    aten.hardtanh.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.linear.default,
}
# What may be alive at once in a piece, if one sample does not need more. Far below the 32 MiB from
# which glibc gives freed blocks back to the system, so that each use would cost its page faults.
PIECE_BYTES = 10 << 20


@dataclass
class Segment:
    """Nodes from one cut to the next. takes: the values (or inputs) that they read from outside.

    The last node is the graph's output or the one value that is alive at the cut.
    """

    takes: list[fx.Node]
    nodes: list[fx.Node]


@dataclass
class Level:
    """Segments [first, last) that run on pieces of at most ``piece`` samples."""

    piece: int
    first: int
    last: int


def whole(trace: Trace) -> Segment:
    """The graph as one segment."""
    inputs = [n for n in trace.graph.nodes if n.op == "placeholder" and n.name in trace.inputs]
    inputs.sort(key=lambda node: trace.inputs.index(node.name))
    nodes = [n for n in trace.graph.nodes if n.op != "placeholder" and n not in trace.known]
    return Segment(inputs, nodes)


def cut(trace: Trace) -> list[Segment]:
    """The graph's segments: cut wherever only the value just computed is read later."""
    uncut = whole(trace)
    last = {value: at for at, node in enumerate(uncut.nodes) for value in node.all_input_nodes}
    segments, takes, nodes = [], uncut.takes, list[fx.Node]()
    alive = set(takes)
    for at, node in enumerate(uncut.nodes):
        nodes.append(node)
        alive = {value for value in (*alive, node) if last.get(value, -1) > at}
        if alive == {node} or node.op == "output":
            segments.append(Segment(takes, nodes))
            takes, nodes = [node], []
    return segments


def samplewise(trace: Trace) -> bool:
    """Whether the graph's outputs for a batch are those for its pieces, one after the other."""
    batch = trace.shapes[0][0] if trace.shapes and trace.shapes[0] else None
    if batch is None or isinstance(batch, int):
        return False
    for node in trace.graph.nodes:
        if node.op == "output":
            return all(_leads(n, batch) for n in node.all_input_nodes)
        if node.op == "placeholder":
            if node.name in trace.inputs and not _leads(node, batch):
                return False
        elif node not in trace.known and not (_leads(node, batch) and _keeps_samples(node)):
            return False
    return False


def _keeps_samples(node: fx.Node) -> bool:
    if node.target in _SAMPLEWISE:
        return True
    if node.target is aten.flatten.using_ints:
        return len(node.args) > 1 and bool(node.args[1] == 1)
    if node.target is aten.batch_norm.default:
        return node.args[5] is False
    return node.target is aten.cat.default and len(node.args) > 1 and bool(node.args[1] == 1)


def _leads(node: fx.Node, batch: Any) -> bool:
    shape = symbolic_shape(node)
    return shape is not None and len(shape) > 0 and bool(shape[0] == batch)


def levels(segments: Sequence[Segment], sizes: Mapping[Any, int], batch: int) -> list[Level]:
    """How a batch runs, the largest maps first; a single Level where all of it runs at once.

    sizes: of the trace's symbols. A level's pieces are whole ones of the level before. They are
    powers of two, so that few sizes occur: each new one costs a packing of the weights.
    """
    pieces: list[int] = []
    for segment in reversed(segments):
        fitting = PIECE_BYTES * batch / max(alive_bytes(segment, sizes), 1) if batch > 1 else 1
        piece = batch if fitting >= batch else 1 << max(0, int(math.log2(max(fitting, 1))))
        pieces.append(min(piece, *pieces[-1:], batch))
    found: list[Level] = []
    for number, piece in enumerate(reversed(pieces)):
        if found and found[-1].piece == piece:
            found[-1].last = number + 1
        else:
            found.append(Level(piece, number, number + 1))
    return found


def split(batch: int, piece: int) -> list[int]:
    """Sizes of the pieces of a batch: the batch itself, or powers of two."""
    if batch <= piece:
        return [batch]
    sizes = []
    while batch:
        while piece > batch:
            piece //= 2
        sizes.append(piece)
        batch -= piece
    return sizes


def alive_bytes(segment: Segment, sizes: Mapping[Any, int]) -> int:
    """Bytes of the values alive at once in a segment, at the most; sizes: of the symbols."""
    last = {value: at for at, node in enumerate(segment.nodes) for value in node.all_input_nodes}
    alive = {value: _bytes(value, sizes) for value in segment.takes}
    most = 0
    for at, node in enumerate(segment.nodes):
        if node.op == "output":
            break
        if node.target is fused_conv and node.args[2].inplace:  # type: ignore[union-attr]
            alive.pop(node.args[1], None)  # type: ignore[arg-type]
        alive[node] = _bytes(node, sizes)
        most = max(most, sum(alive.values()))
        alive = {value: size for value, size in alive.items() if last.get(value, -1) > at}
    return most


def _bytes(node: fx.Node, sizes: Mapping[Any, int]) -> int:
    shape = sizes_of(node, sizes)
    return 0 if shape is None else math.prod(shape) * int(node.meta["val"].element_size())


def sizes_of(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...] | None:
    """A node's shape for these sizes of the trace's symbols; None where it is no tensor."""
    shape = symbolic_shape(node)
    if shape is None:
        return None
    return tuple(s if isinstance(s, int) else _value(s, sizes) for s in shape)


def _value(expression: Any, sizes: Mapping[Any, int]) -> int:
    return _substituted(expression, tuple((s, sizes[s]) for s in _symbols(expression)))


@functools.lru_cache(maxsize=4096)
def _symbols(expression: Any) -> tuple[Any, ...]:
    return tuple(expression.free_symbols)


@functools.lru_cache(maxsize=65536)
def _substituted(expression: Any, sizes: tuple[tuple[Any, int], ...]) -> int:
    return int(expression.subs(sizes))
