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
# Values of more bytes than this, for one sample, are few; pieces are made so that none is larger.
PIECE_BYTES = 8 << 20


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
        elif not _depends(node, trace):
            continue
        elif not _leads(node, batch) or not _keeps_samples(node):
            return False
    return False


def _depends(node: fx.Node, trace: Trace) -> bool:
    """Whether a call has a part in the value (conservatively: sizes count)."""
    return any(
        n.name in trace.inputs if n.op == "placeholder" else _depends(n, trace)
        for n in node.all_input_nodes
    )


def _keeps_samples(node: fx.Node) -> bool:
    if node.target in _SAMPLEWISE:
        return True
    if node.target is aten.flatten.using_ints:
        return len(node.args) > 1 and node.args[1] == 1
    if node.target is aten.batch_norm.default:
        return node.args[5] is False
    return node.target is aten.cat.default and len(node.args) > 1 and node.args[1] == 1


def _leads(node: fx.Node, batch: Any) -> bool:
    shape = symbolic_shape(node)
    return shape is not None and len(shape) > 0 and shape[0] == batch


def piece_size(trace: Trace, shape: Sequence[int]) -> int:
    """Samples in a piece for inputs of this shape; 0 for all at once."""
    batch = shape[0]
    largest = largest_value(trace, shape)
    if batch < 2 or largest == 0:
        return 0
    fitting = max(1, int(PIECE_BYTES // largest))
    pieces = math.ceil(batch / fitting)
    return math.ceil(batch / pieces)


def largest_value(trace: Trace, shape: Sequence[int]) -> float:
    """Bytes of the largest value in the graph, for one sample."""
    known = trace.shapes[0]
    assert known is not None
    sizes = {
        symbol: size for symbol, size in zip(known, shape, strict=True) if not isinstance(symbol, int)
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
