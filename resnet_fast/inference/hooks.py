# SPDX-License-Identifier: BSD-3-Clause
"""Forward hooks beside folded neighbours: what a hook sees and gives is no part of a graph.

A hooked module is traced with an operator that stands for the hooks. At run time
- a module that has parameters of its own, or no children, is called as it is, hooks and all: a hook
  of pruning or weight norm writes the module's weight just before the call;
- of another module (a block, a layer, the model) the inside is folded, and its hooks are called
  with what goes in and what comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_library = torch.library.Library("resnet_fast", "FRAGMENT")
_library.define("_hooks(Tensor[] inputs, Tensor[] results, int number) -> Tensor[]")


def _fake(inputs: list[Tensor], results: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_like(t) for t in results]


torch.library.register_fake("resnet_fast::_hooks", _fake, lib=_library)
_traced_hooks = torch.ops.resnet_fast._hooks.default


def hook_call(
    tensors: list[Tensor], results: list[Tensor], number: int, inputs: list[Any]
) -> list[Tensor]:
    """The graph's name for the call of a hooked module, or of its hooks.

    inputs: of the whole graph, whose sizes tell the sizes to expect.
    """
    raise NotImplementedError("hook_call only stands in a graph")


torch.fx.node.has_side_effect(_traced_hooks)  # a hook runs whether or not its value is read
torch.fx.node.has_side_effect(hook_call)


_TENSOR = object()  # in the place of a tensor


class NotFoldable(Exception):
    """Why a model with this hook has to run whole."""


@dataclass
class Point:
    """One call of a hooked module, or of its hooks, as traced.

    kind: "module", "before" (its pre-hooks) or "after". leaves: of (args, kwargs), with None for
    each tensor. given: the same of the result. written: the inputs that the module writes to.
    shapes and dtypes: of the tensors that the point gives.
    """

    name: str
    kind: str
    spec: pytree.TreeSpec
    leaves: list[Any]
    out_spec: pytree.TreeSpec
    given: list[Any]
    written: list[int] = field(default_factory=list)
    alias: bool = False
    shapes: list[tuple[Any, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)


def hooked_modules(model: nn.Module) -> list[tuple[str, bool, bool]]:
    """(name, has pre-hooks, has hooks after the call) of every module with forward hooks."""
    return [
        (name, bool(module._forward_pre_hooks), bool(module._forward_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


def called_whole(module: nn.Module) -> bool:
    """Whether a hooked module is called as it is."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return not module._modules or any(t is not None for t in own)


class Tracer:
    """Takes the hooks off a private copy and has it traced with points in their place."""

    def __init__(self, twin: nn.Module) -> None:
        self.points: list[Point] = []
        self._inside = False  # of a module that is called as it is
        for name, before, after in hooked_modules(twin):
            module = twin.get_submodule(name)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                hooks.clear()
            wrap = self._whole if called_whole(module) else self._around
            module.forward = functools.wraps(module.forward)(  # type: ignore[method-assign]
                functools.partial(wrap, name, module.forward, (before, after))
            )

    def _whole(
        self, name: str, forward: Any, _: tuple[bool, bool], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self._inside:
            return forward(*args, **kwargs)
        inputs = _tensors(name, (args, kwargs))
        before, copies = [x._version for x in inputs], [x.clone() for x in inputs]
        self._inside = True
        try:
            result = forward(*args, **kwargs)
        finally:
            self._inside = False
        written = [n for n, x in enumerate(inputs) if x._version != before[n]]
        # What it writes to, it writes to in memory of its own; the new value is copied back.
        passed = [copies[n] if n in written else x for n, x in enumerate(inputs)]
        results = _tensors(name, result)
        point = _point(name, "module", (args, kwargs), result, written)
        point.alias = any(_storage(x) == _storage(y) for x in inputs for y in results)
        values = self._add(point, passed, [*results, *(inputs[n] for n in written)])
        for n, value in zip(written, values[len(results) :], strict=True):
            inputs[n].copy_(value)
        return _filled(point.out_spec, point.given, values[: len(results)])

    def _around(
        self, name: str, forward: Any, has: tuple[bool, bool], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self._inside:
            return forward(*args, **kwargs)
        if has[0]:
            inputs = _tensors(name, (args, kwargs))
            point = _point(name, "before", (args, kwargs), (args, kwargs))
            values = self._add(point, inputs, inputs)
            args, kwargs = _filled(point.spec, point.leaves, values)
            versions = [x._version for x in values]
        result = forward(*args, **kwargs)
        if has[0] and versions != [x._version for x in values]:
            raise NotFoldable(f"{name} has a hook and writes to its input")
        if not has[1]:
            return result
        results = _tensors(name, result)
        point = _point(name, "after", (args, kwargs), result)
        values = self._add(point, _tensors(name, (args, kwargs)), results)
        return _filled(point.out_spec, point.given, values)

    def _add(self, point: Point, inputs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
        self.points.append(point)
        values: list[Tensor] = _traced_hooks(inputs, results, len(self.points) - 1)
        return values


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _tensors(name: str, tree: Any) -> list[Tensor]:
    """The tensors among the leaves; NotFoldable where another leaf is no plain constant."""
    leaves = pytree.tree_leaves(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor | int | float | str | type(None)):
            raise NotFoldable(f"{name} has a hook and takes or gives a {type(leaf).__name__}")
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _marked(leaves: list[Any]) -> list[Any]:
    return [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _point(name: str, kind: str, arguments: Any, result: Any, written: Sequence[int] = ()) -> Point:
    leaves, spec = pytree.tree_flatten(arguments)
    given, out_spec = pytree.tree_flatten(result)
    return Point(name, kind, spec, _marked(leaves), out_spec, _marked(given), list(written))


def _filled(spec: pytree.TreeSpec, leaves: list[Any], tensors: Sequence[Tensor]) -> Any:
    values = iter(tensors)
    return pytree.tree_unflatten([next(values) if x is _TENSOR else x for x in leaves], spec)


# ---- in the graph --------------------------------------------------------------------------------
def refuse_shared_writes(graph: fx.Graph, points: list[Point], fresh: Any) -> None:
    """NotFoldable where a point's value is written to in place and somebody else may see that."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        base = node.args[0]
        while base.op == "call_function" and not _is_value(base) and not fresh(base):
            base = next(iter(base.all_input_nodes), None)
            if base is None:
                break
        if base is None or not _is_value(base):
            continue
        call, place = base.args
        point, results = points[call.args[2]], call.args[1]
        if point.kind == "module":
            shared = point.alias
        else:
            source = results[place]
            shared = len(source.users) > 1 or not fresh(source)
        if shared:
            raise NotFoldable(f"what {point.name} gives to its hook is written to in place later")


def _is_value(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "getitem"
        and isinstance(node.args[0], fx.Node)
        and node.args[0].target is _traced_hooks
    )


def place_calls(graph: fx.Graph, points: list[Point], sources: list[str]) -> None:
    """Each traced point as a hook_call; a module that is called as it is leaves the graph.

    sources: names of the placeholders that are inputs.
    """
    places = [n for n in graph.nodes if n.op == "placeholder" and n.name in sources]
    for node in graph.nodes:
        if node.target is not _traced_hooks:
            continue
        inputs, results, number = node.args
        point = points[number]
        values = [r.meta["val"] for r in results]
        point.shapes = [
            tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in v.shape)
            for v in values
        ]
        point.dtypes = [v.dtype for v in values]
        node.target = hook_call
        node.args = (inputs, [] if point.kind == "module" else results, number, places)


# ---- at run time ---------------------------------------------------------------------------------
Caller = Callable[..., list[Tensor]]


def make_call(point: Point, twin: nn.Module, shapes: list[tuple[Any, ...] | None]) -> Caller:
    """(tensors in, tensors the inside gave, *inputs of the whole call) -> tensors out.

    twin: the private copy whose module is called, with its hooks. shapes: symbolic, of the inputs.
    """
    module = twin.get_submodule(point.name)
    expected: dict[Any, list[tuple[int, ...]]] = {}

    def call(tensors: list[Tensor], results: list[Tensor], *inputs: Tensor) -> list[Tensor]:
        args, kwargs = _filled(point.spec, point.leaves, tensors)
        if point.kind == "module":
            value = module(*args, **kwargs)
        elif point.kind == "before":
            value = _before(module, args, kwargs)
        else:
            value = _after(module, args, kwargs, _filled(point.out_spec, point.given, results))
        leaves, spec = pytree.tree_flatten(value)
        if spec != point.out_spec or any(
            want is not _TENSOR and want != got
            for want, got in zip(point.given, leaves, strict=True)
        ):
            raise RuntimeError(_refusal(point, "another structure of results"))
        outs = [x for x, want in zip(leaves, point.given, strict=True) if want is _TENSOR]
        outs += [tensors[n] for n in point.written]
        key = tuple(x.shape for x in inputs)
        sizes = expected.get(key)
        if sizes is None:
            sizes = expected[key] = _sizes(point, shapes, inputs)
        for x, size, dtype in zip(outs, sizes, point.dtypes, strict=True):
            if not isinstance(x, Tensor):
                raise RuntimeError(_refusal(point, f"a {type(x).__name__} for a tensor"))
            if x.shape != size or x.dtype != dtype:
                what = f"{tuple(x.shape)} {x.dtype} for {tuple(size)} {dtype}"
                raise RuntimeError(_refusal(point, what))
        return [
            x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in outs
        ]

    return call


def _refusal(point: Point, what: str) -> str:
    where = point.name or "the model"
    return f"a forward hook on {where} gave {what}; call the model itself, it was folded for this"


def _before(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """As torch.nn.Module calls its pre-hooks."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if number in module._forward_pre_hooks_with_kwargs:
            both = hook(module, args, kwargs)  # type: ignore[misc]
            if both is not None:
                args, kwargs = both
        else:
            result = hook(module, args)
            if result is not None:
                args = result if isinstance(result, tuple) else (result,)
    return args, kwargs


def _after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
    """As torch.nn.Module calls its hooks after the call."""
    for number, hook in list(module._forward_hooks.items()):
        if number in module._forward_hooks_with_kwargs:
            another = hook(module, args, kwargs, result)
        else:
            another = hook(module, args, result)
        if another is not None:
            result = another
    return result


def _sizes(point: Point, shapes: list[Any], inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    known = {
        symbol: size
        for shape, x in zip(shapes, inputs, strict=True)
        for symbol, size in zip(shape or (), x.shape, strict=False)
        if getattr(symbol, "is_symbol", False)
    }
    return [
        tuple(int(s.subs(known)) if hasattr(s, "subs") else s for s in shape)
        for shape in point.shapes
    ]
