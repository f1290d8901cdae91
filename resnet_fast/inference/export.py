# SPDX-License-Identifier: BSD-3-Clause
"""Deployment of a folded model: standard operators only, as ONNX or as an AOTInductor package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast.inference.fold import ConvSpec, folded
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.module import OptimizedModule, state_of
from resnet_fast.inference.program import evaluate_constants
from resnet_fast.inference.trace import Trace

aten = torch.ops.aten


class Folded(nn.Module):
    """A model in eval mode with every batch norm folded, of PyTorch's operators alone."""

    def __init__(self, graph: fx.GraphModule, out_spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.network = graph
        self._out_spec = out_spec

    def forward(self, x: Tensor) -> Any:
        outputs = self.network(x)
        return pytree.tree_unflatten(outputs, self._out_spec)


def fold(model: nn.Module, example_input: Tensor) -> Folded:
    """``model`` in eval mode, folded: a module that every exporter of PyTorch takes.

    Its parameters are private copies in the model's dtype. Raises ValueError where the model is no
    plain graph, with the reason.
    """
    optimized = OptimizedModule(model, example_input, _dtype(model, example_input))
    trace = optimized.trace
    if trace is None:
        raise ValueError(f"the model cannot be exported: {optimized.explain().rows[0].reason}")
    if trace.points:
        names = dict.fromkeys(point.name or "(model)" for point in trace.points)
        raise ValueError(f"the model cannot be exported: forward hooks on {', '.join(names)}")
    if len(trace.inputs) != 1:
        raise ValueError(f"the model must have one input to be exported; it has {trace.inputs}")
    return Folded(_Copier(trace, model, optimized.dtype).module(), trace.out_spec).eval()


def _dtype(model: nn.Module, example: Tensor) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)


class _Copier:
    """The fused graph as a graph of plain operators, its constants as buffers."""

    def __init__(self, trace: Trace, model: nn.Module, dtype: torch.dtype) -> None:
        self._trace, self._dtype = trace, dtype
        self._values = evaluate_constants(trace.graph, trace.known, state_of(trace, model))
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._nodes: dict[fx.Node, fx.Node] = {}

    def module(self) -> fx.GraphModule:
        for node in self._trace.graph.nodes:
            if node.op == "placeholder" and node.name in self._trace.inputs:
                self._nodes[node] = self._graph.placeholder("x")
            elif node.op == "output":
                self._graph.output([self._copied(n) for n in node.args[0]])
            elif node.target is fused_conv:
                self._nodes[node] = self._conv(*node.args[:3])
            elif node.op == "call_function" and node not in self._trace.known:
                self._nodes[node] = self._graph.node_copy(node, self._copied)
        return fx.GraphModule(self._root, self._graph)

    def _copied(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in self._nodes:
            value = self._values[node]
            self._nodes[node] = self._constant(value) if isinstance(value, Tensor) else value
        return self._nodes[node]

    def _constant(self, value: Tensor) -> fx.Node:
        name = f"c{len(dict(self._root.named_buffers()))}"
        dtype = self._dtype if value.is_floating_point() else value.dtype
        self._root.register_buffer(name, value.detach().to(dtype, copy=True))
        return self._graph.get_attr(name)

    def _conv(self, x: Any, residual: Any, spec: ConvSpec) -> fx.Node:
        weight, bias = (
            None if t is None else self._constant(t) for t in folded(spec, self._values)
        )
        rest = (spec.stride, spec.padding, spec.dilation, spec.groups)
        args = (self._copied(x), weight, bias, *rest)
        y = self._graph.call_function(aten.conv2d.default, args)
        if residual is not None:
            y = self._graph.call_function(aten.add.Tensor, (y, self._copied(residual)))
        if spec.relu:
            y = self._graph.call_function(aten.relu.default, (y,))
        if spec.max_pool:
            y = self._graph.call_function(aten.max_pool2d.default, (y, [3, 3], [2, 2], [1, 1]))
        return y


def program(model: nn.Module, example_input: Tensor) -> torch.export.ExportedProgram:
    """The folded model through torch.export, with any batch size."""
    sizes = {0: torch.export.Dim("batch", min=1, max=65536)}
    # A batch of one would be taken as a constant.
    shape, device = (2, *example_input.shape[1:]), example_input.device
    sample = torch.zeros(shape, dtype=_dtype(model, example_input), device=device)
    with torch.no_grad():
        return torch.export.export(
            fold(model, example_input), (sample,), dynamic_shapes=(sizes,), strict=False
        )


def to_onnx(model: nn.Module, example_input: Tensor, path: Path | str) -> Path:
    """Write the folded model as one ONNX file (input "images", output "logits", any batch).

    Needs onnx and onnxscript: ImportError where they are missing.
    """
    for package in ("onnx", "onnxscript"):
        importlib.import_module(package)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        program(model, example_input),
        f=target,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    return target


def to_package(model: nn.Module, example_input: Tensor, path: Path | str) -> Path:
    """Write the folded model as an AOTInductor package (.pt2), which C++ loads without Python.

    Needs a C++ compiler, as torch.compile does. ValueError for another suffix than .pt2.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2; got {path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    exported = program(model, example_input)
    torch._inductor.aoti_compile_and_package(exported, package_path=str(target))
    return target
