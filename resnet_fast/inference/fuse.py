# SPDX-License-Identifier: BSD-3-Clause
"""Passes over a traced graph: identities out, conv + batch norm + add + ReLU into one node."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from resnet_fast.inference.fold import ConvSpec, Norm
from resnet_fast.inference.trace import Trace, fresh, symbolic_shape

aten = torch.ops.aten


def fused_conv(x: Tensor, residual: Tensor | None, spec: ConvSpec, parts: list[Tensor]) -> Tensor:
    """The graph's name for a conv with what is fused to it; a device's code takes its place.

    parts: the constants that the spec names, so that the graph knows of their use.
    """
    raise NotImplementedError("fused_conv only stands in a graph")


fused_conv.fresh = True  # type: ignore[attr-defined]


def constant_nodes(trace: Trace) -> set[fx.Node]:
    """Nodes whose value depends on no input of the call."""
    known: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            constant = node.name not in trace.inputs
        else:
            constant = node.op == "call_function" and all(n in known for n in node.all_input_nodes)
            constant = constant and torch.Tag.nondeterministic_seeded not in _tags(node)
        if constant:
            known.add(node)
    return known


def _tags(node: fx.Node) -> Any:
    return getattr(node.target, "tags", ())


def fuse(trace: Trace) -> None:
    """All passes, in place."""
    _drop_identities(trace.graph)
    constants = constant_nodes(trace)
    for node in list(trace.graph.nodes):
        if node.target in (aten.conv2d.default, aten.conv2d.padding):
            _mark_conv(node, constants)
        elif node.target in (aten.batch_norm.default, _NO_TRAINING):
            _fold_norm(node, constants)
        elif node.target is aten.add.Tensor:
            _fuse_add(node)
        elif node.target is aten.relu.default:
            _fuse_relu(node)
        elif node.target is aten.max_pool2d.default:
            _fuse_max_pool(node)
    trace.graph.eliminate_dead_code()
    _mark_inplace(trace.graph)
    trace.known = constant_nodes(trace)
    trace.graph.lint()


_NO_TRAINING = aten._native_batch_norm_legit_no_training.default


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        dropped = node.target in (aten.dropout.default, aten.feature_dropout.default)
        if (dropped and node.args[2] is False) or node.target in (
            aten.alias.default,
            aten.detach.default,
            aten.contiguous.default,  # of a layout only; every reader takes any layout
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # the values here are channels_last


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by their schema's names, defaults filled in."""
    given = dict(node.kwargs)
    for argument, value in zip(node.target._schema.arguments, node.args):  # type: ignore[union-attr]  # noqa: B905
        given[argument.name] = value
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        given.setdefault(argument.name, argument.default_value)
    return given


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _mark_conv(node: fx.Node, constants: set[fx.Node]) -> None:
    a = _arguments(node)
    weight, bias = a["weight"], a["bias"]
    parts = [weight] if bias is None else [weight, bias]
    if any(part not in constants for part in parts) or a["input"] in constants:
        return
    dilation, padding = _pair(a["dilation"]), a["padding"]
    if isinstance(padding, str):
        kernel = symbolic_shape(weight)
        assert kernel is not None
        total = [d * (k - 1) for d, k in zip(dilation, kernel[2:], strict=True)]
        if padding == "same" and any(t % 2 for t in total):
            return
        padding = [t // 2 for t in total] if padding == "same" else [0, 0]
    spec = ConvSpec(
        name=module_name(node),
        weight=weight,
        bias=bias,
        stride=_pair(a["stride"]),
        padding=_pair(padding),
        dilation=dilation,
        groups=a["groups"],
    )
    shape = symbolic_shape(node)
    if shape is None or len(shape) != 4:
        return
    node.target, node.kwargs = fused_conv, {}
    node.args = (a["input"], None, cast(Any, spec), parts)


def module_name(node: fx.Node) -> str:
    """The module a node was traced in, by its qualified name; else the node's own name."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return path or node.name


def open_conv(node: Any) -> ConvSpec | None:
    """The spec of a fused_conv that only one node reads, to which more may be fused."""
    if not isinstance(node, fx.Node) or node.target is not fused_conv or len(node.users) != 1:
        return None
    spec = node.args[2]
    assert isinstance(spec, ConvSpec)
    return None if spec.relu or spec.max_pool else spec


def _fold_norm(node: fx.Node, constants: set[fx.Node]) -> None:
    a = _arguments(node)
    spec = open_conv(a["input"])
    if spec is None or spec.residual or a.get("training", False):
        return
    affine = [a[name] for name in ("weight", "bias") if a[name] is not None]
    if any(n not in constants for n in [a["running_mean"], a["running_var"], *affine]):
        return
    taken = node
    if node.target is _NO_TRAINING:  # (output, mean, rstd) in the decomposed graph
        if len(node.users) != 1 or next(iter(node.users)).args[1] != 0:
            return
        taken = next(iter(node.users))
    mean, var = a["running_mean"], a["running_var"]
    spec.norms.append(Norm(a["weight"], a["bias"], mean, var, float(a["eps"])))
    conv = a["input"]
    _absorb(taken, conv, conv.args[1], [mean, var, *affine])
    if taken is not node:
        node.graph.erase_node(node)
    node.graph.erase_node(conv)


def _absorb(node: fx.Node, conv: fx.Node, residual: Any, parts: list[fx.Node]) -> None:
    """The node becomes the conv, at its own place: what it reads may be computed after the conv."""
    x, _, spec, before = conv.args
    assert isinstance(before, list | tuple)
    node.target, node.kwargs = fused_conv, {}
    node.args = (x, residual, spec, [*before, *parts])


def _fuse_add(node: fx.Node) -> None:
    a = _arguments(node)
    if a["alpha"] != 1 or not isinstance(a["other"], fx.Node) or a["self"] is a["other"]:
        return
    shapes = [symbolic_shape(n) for n in (a["self"], a["other"], node)]
    if shapes[0] is None or any(s != shapes[0] for s in shapes):
        return
    dtypes = {n.meta["val"].dtype for n in (a["self"], a["other"], node)}
    for conv, residual in ((a["self"], a["other"]), (a["other"], a["self"])):
        spec = open_conv(conv)
        if spec is not None and not spec.residual and len(dtypes) == 1:
            spec.residual = True
            _absorb(node, conv, residual, [])
            conv.graph.erase_node(conv)
            return


def _fuse_relu(node: fx.Node) -> None:
    conv = node.args[0]
    spec = open_conv(conv)
    if spec is not None:
        assert isinstance(conv, fx.Node)
        spec.relu = True
        _absorb(node, conv, conv.args[1], [])
        node.graph.erase_node(conv)


def _fuse_max_pool(node: fx.Node) -> None:
    """A stem's pooling, whose input then need not be written."""
    a, conv = _arguments(node), node.args[0]
    settings = [_pair(a[name] or 0) for name in ("kernel_size", "stride", "padding", "dilation")]
    if settings != [[3, 3], [2, 2], [1, 1], [1, 1]] or a["ceil_mode"]:
        return
    if not isinstance(conv, fx.Node) or conv.target is not fused_conv or len(conv.users) != 1:
        return
    spec = conv.args[2]
    assert isinstance(spec, ConvSpec)
    if not spec.residual and not spec.max_pool:
        spec.max_pool = True
        _absorb(node, conv, None, [])
        node.graph.erase_node(conv)


def _mark_inplace(graph: fx.Graph) -> None:
    """A residual may be overwritten if it is memory of its own that nobody reads afterwards."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is not fused_conv or node.args[1] is None:
            continue
        residual, spec = node.args[1], node.args[2]
        spec.inplace = (
            residual.op == "call_function"
            and fresh(residual)
            and residual is not node.args[0]
            and all(fresh(user) and order[user] <= order[node] for user in residual.users)
        )
