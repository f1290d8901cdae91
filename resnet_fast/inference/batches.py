# SPDX-License-Identifier: BSD-3-Clause
"""A large batch in pieces: activations that stay in the cache, and memory that malloc re-uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
# No value of a piece is larger, if one sample's is not. glibc keeps freed blocks below 32 MiB for
# the next call, and gives larger ones back to the system: each use then costs its page faults.
PIECE_BYTES = 26 << 20


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


def pieces(trace: Trace, shape: Sequence[int]) -> list[int]:
    """Sizes of the pieces of a batch of inputs of this shape; [] for all at once.

    All are powers of two, so that few sizes occur: each new one costs a packing of the weights.
    """
    left, largest = shape[0], largest_value(trace, shape)
    if left < 2 or largest * left <= PIECE_BYTES:
        return []
    piece = 1 << max(0, int(math.log2(max(PIECE_BYTES / largest, 1))))
    sizes = []
    while left:
        while piece > left:
            piece //= 2
        sizes.append(piece)
        left -= piece
    return sizes if len(sizes) > 1 else []


def largest_value(trace: Trace, shape: Sequence[int]) -> int:
    """Bytes of the largest value in the graph, for one sample."""
    known = trace.shapes[0]
    assert known is not None
    sizes = {
        symbol: size
        for symbol, size in zip(known, shape, strict=True)
        if not isinstance(symbol, int)
    }
    sizes[known[0]] = 1
    largest = 0
    for node in trace.graph.nodes:
        value = symbolic_shape(node)
        if node.op != "call_function" or not value or value[0] != known[0]:
            continue
        numbers = [int(s.subs(sizes)) if hasattr(s, "subs") else s for s in value]
        largest = max(largest, math.prod(numbers) * 4)
    return largest
