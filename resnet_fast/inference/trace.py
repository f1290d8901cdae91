# SPDX-License-Identifier: BSD-3-Clause
"""A model as a functional ATen graph: torch.export of a private copy in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast.inference.hooks import (
    NotFoldable,
    Point,
    Tracer,
    place_calls,
    refuse_shared_writes,
)

aten = torch.ops.aten


class NotTraceable(Exception):
    """Why a model cannot be a graph: it then runs as a module, and explain says so."""


@dataclass
class Trace:
    """A functional graph and where its constants come from.

    graph: no node writes to a tensor. state: placeholder -> qualified name in the model.
    constants: placeholder -> tensor that is no parameter or buffer. inputs: placeholders of the
    call, in order of the flattened arguments. shapes: of the inputs, with sympy symbols. points:
    what the graph's hook_call nodes stand for.
    """

    graph: fx.Graph
    state: dict[str, str]
    constants: dict[str, Tensor]
    inputs: list[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    ranges: dict[Any, Any]
    known: set[fx.Node] = field(default_factory=set)  # nodes that depend on no input; by fuse()
    shapes: list[tuple[Any, ...] | None] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)


def private_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares no tensor with the model; hooks are the same objects."""
    # Tensors that were calculated (a pruned weight, say) are no leaves, which deepcopy refuses.
    made = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        twin = copy.deepcopy(model, made)
    except Exception as error:
        raise TypeError(f"model must be copyable (copy.deepcopy): {error}") from error
    for module, original in zip(twin.modules(), model.modules(), strict=True):
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(module, name).update(getattr(original, name))
    return twin.eval().requires_grad_(False)


def capture(model: nn.Module, example: Tensor) -> Trace:
    """Trace ``model`` (in eval mode, private) with every size of ``example`` free where it can be.

    Takes the hooks off ``model``. Raises NotTraceable with the reason.
    """
    # A size of 1 would be taken as a constant.
    shape = [max(size, 2) if dim == 0 else size for dim, size in enumerate(example.shape)]
    sample = torch.zeros(shape, dtype=example.dtype, device=example.device)
    sizes = {dim: torch.export.Dim.AUTO for dim in range(example.dim()) if dim != 1}
    tracer = Tracer(model)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (sample,), dynamic_shapes=(sizes,), strict=False)
            refuse_shared_writes(program.graph_module.graph, tracer.points, fresh)
            if not _make_functional(program.graph_module.graph):
                program = program.run_decompositions({})
    except NotFoldable as error:
        raise NotTraceable(str(error)) from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise NotTraceable(f"torch.export: {type(error).__name__}: {reason[0][:200]}") from error
    trace = _trace_of(program)
    trace.points = tracer.points
    place_calls(trace.graph, trace.points, trace.inputs)
    return trace


def _trace_of(program: Any) -> Trace:
    signature = program.graph_signature
    if signature.buffers_to_mutate or getattr(signature, "parameters_to_mutate", None):
        raise NotTraceable("the model changes its own buffers in eval mode")
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    trace = Trace(
        graph=program.graph_module.graph,
        state=names,
        constants={name: program.constants[key] for name, key in lifted.items()},
        inputs=list(signature.user_inputs),
        in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec,
        ranges=dict(program.range_constraints),
    )
    for node in trace.graph.nodes:
        if node.op == "placeholder" and node.name in trace.inputs:
            trace.shapes.append(symbolic_shape(node))
        elif node.op not in ("placeholder", "call_function", "output"):
            raise NotTraceable(f"the graph has a {node.op} node ({node.target})")
        elif node.target is aten.as_strided.default:
            raise NotTraceable("the model looks at strides (as_strided)")
    return trace


def symbolic_shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes of a node's value, integers or sympy expressions; None where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)


def _make_functional(graph: fx.Graph) -> bool:
    """Replace in-place operators whose input nobody else sees; False if one is left."""
    plain = {
        aten.relu_.default: aten.relu.default,
        aten.add_.Tensor: aten.add.Tensor,
        aten.mul_.Tensor: aten.mul.Tensor,
        aten.hardtanh_.default: aten.hardtanh.default,
        aten.silu_.default: aten.silu.default,
        aten.hardswish_.default: aten.hardswish.default,
        aten.dropout_.default: aten.dropout.default,
    }
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        base = node.args[0]
        private = base.op == "call_function" and len(base.users) == 1 and fresh(base)
        if node.target not in plain or not private:
            return False
        node.target = plain[node.target]
    return True


# Operators whose result never shares memory with an input.
_FRESH = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.convolution.default,
    aten.conv_transpose2d.input,
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.relu.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.cat.default,
    aten.linear.default,
    aten.silu.default,
    aten.hardtanh.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.vec,
    aten.sigmoid.default,
    # in place, their result is that of an operator above
    aten.relu_.default,
    aten.add_.Tensor,
    aten.mul_.Tensor,
    aten.hardtanh_.default,
    aten.silu_.default,
}


def fresh(node: fx.Node) -> bool:
    """Whether the node's value is memory of its own (or that of a private value in place)."""
    return node.target in _FRESH or getattr(node.target, "fresh", False)


def check_shape(trace: Trace, inputs: Sequence[Any]) -> dict[Any, int]:
    """The sizes of the trace's symbols; ValueError unless it holds for inputs of these shapes."""
    bound: dict[Any, int] = {}
    for number, (value, shape) in enumerate(zip(inputs, trace.shapes, strict=True)):
        if shape is None:
            continue
        got = tuple(value.shape)
        if len(got) != len(shape):
            raise ValueError(f"input {number} must have {len(shape)} dimensions; got shape {got}")
        for dim, (size, expected) in enumerate(zip(got, shape, strict=True)):
            what = f"input {number}, shape {got}: dimension {dim}"
            if isinstance(expected, int):
                if size != expected:
                    raise ValueError(
                        f"{what} must be {expected}, as in example_input (the model's graph "
                        "depends on it)"
                    )
                continue
            (symbol,) = expected.free_symbols
            solved = sympy.solve(expected - size, symbol)
            if not solved or not solved[0].is_integer or solved[0] < 1:
                raise ValueError(f"{what} must have the form {expected}")
            if bound.setdefault(symbol, int(solved[0])) != int(solved[0]):
                raise ValueError(f"{what} must equal the size it equals in example_input")
    for symbol, size in bound.items():
        allowed = trace.ranges.get(symbol)
        # torch.export leaves 0 and 1 out of every range; the operators themselves take 1.
        if allowed is not None and not ((size == 1 and allowed.lower <= 2) or size in allowed):
            raise ValueError(
                f"a size of {size} is outside what the model's graph holds for, "
                f"{allowed.lower} to {allowed.upper}: give an example_input of that size"
            )
    return bound
