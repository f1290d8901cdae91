# SPDX-License-Identifier: BSD-3-Clause
"""The module that optimize_for_inference returns."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fast.dispatch import logger
from resnet_fast.inference import cpu
from resnet_fast.inference.batches import pieces, samplewise
from resnet_fast.inference.fold import MAX_SIZES
from resnet_fast.inference.fuse import fuse, fused_conv, module_name
from resnet_fast.inference.hooks import Caller, Point, hook_call, hooked_modules, make_call
from resnet_fast.inference.program import compile_graph, evaluate_constants
from resnet_fast.inference.table import Row, Table
from resnet_fast.inference.trace import NotTraceable, Trace, capture, check_shape
from resnet_fast.inference.trace import private_copy as copy_of
from resnet_fast.inference.watch import Watch


class OptimizedModule(nn.Module):
    """What ``model.eval()`` computes, from folded and packed private copies of its weights.

    Made by ``resnet_fast.optimize_for_inference``. Runs without gradients, from any number of
    threads at once. Raises RuntimeError where the model's weights or hooks changed since (see
    refresh) and ValueError for inputs that the trace does not hold for.
    """

    _run: Callable[..., Any]
    _watch: Watch
    _rows: list[Row]

    def __init__(self, model: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.training = False
        self.dtype = dtype
        self.compute, self.why_compute = cpu.compute_dtype(dtype)
        self._example = torch.empty(example.shape, dtype=example.dtype, device="meta")
        cpu.let_malloc_keep()
        self.trace: Trace | None = None
        self._signature: list[Any] = []
        self._hooks: list[tuple[str, bool, bool]] = []
        self._build(model)

    def refresh(self, model: nn.Module) -> None:
        """Fold and pack ``model``'s weights anew; the same architecture, with whatever weights
        and hooks.

        Raises ValueError where the parameters are not those of the model folded before; then
        nothing is changed. Calls that run in other threads meanwhile finish with the old weights.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        self._build(model)

    def explain(self) -> Table:
        """What runs for each layer, and why where it is not the fast way."""
        return Table(self._rows, self.why_compute)

    def forward(self, *inputs: Any) -> Any:
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed} changed after optimize_for_inference: call "
                "refresh(model) on the optimized module to take it over"
            )
        with torch.no_grad():
            return self._run(*inputs)

    # ---- building --------------------------------------------------------------------------------
    def _build(self, model: nn.Module) -> None:
        """Everything is made before anything is replaced."""
        watch = Watch(model)
        signature = _signature(model)
        if self._signature and signature != self._signature:
            raise ValueError(
                "model is not the one that was optimized: its modules or the shapes of its "
                "parameters differ; call optimize_for_inference again"
            )
        hooks = hooked_modules(model)
        trace = self.trace if hooks == self._hooks else None
        try:
            trace = trace or self._traced(model)
            run, rows = self._compile(trace, model)
        except NotTraceable as error:
            run, rows = self._as_module(model, str(error))
            trace = None
        self.trace, self._signature, self._hooks, self._rows = trace, signature, hooks, rows
        self._watch, self._run = watch, run

    def _traced(self, model: nn.Module) -> Trace:
        from resnet_fast.config import use_backend

        with use_backend("reference"):  # our own models trace to PyTorch's operators
            twin = copy_of(model).to(self.compute)
            trace = capture(twin, self._example_as(self.compute))
        fuse(trace)
        return trace

    def _example_as(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._example.shape, dtype=dtype, device="cpu")

    def _compile(self, trace: Trace, model: nn.Module) -> tuple[Callable[..., Any], list[Row]]:
        values = evaluate_constants(trace.graph, trace.known, state_of(trace, model))
        rows: list[Row] = []

        def make_conv(spec: Any, constants: Any) -> Callable[..., Tensor]:
            function, how, why = cpu.make_conv(spec, constants, self.compute)
            rows.append(Row(spec.name, spec.label(), how, why))
            return function

        rest = {
            n: v.to(self.compute, copy=True)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for n, v in values.items()
            if any(user.target is not fused_conv for user in n.users)
        }
        calls, guard = self._hook_calls(trace, model)
        run = compile_graph(trace.graph, trace.inputs, values | rest, make_conv, calls)
        rows += [_hook_row(point) for point in trace.points]
        rows += [
            Row(module_name(n), str(n.target), "PyTorch", "")
            for n in trace.graph.nodes
            if n.op == "call_function"
            and n not in trace.known
            and n.target not in (fused_conv, hook_call, operator.getitem)
        ]
        return _Call(run, trace, self.dtype, self.compute, guard), rows

    def _hook_calls(self, trace: Trace, model: nn.Module) -> tuple[list[Caller], _Guard | None]:
        """What the trace's hook_calls call, in a private copy with hooks, and the copy's guard."""
        if not trace.points:
            return [], None
        twin = copy_of(model).to(self.compute)
        calls = [make_call(point, twin, trace.shapes) for point in trace.points]
        return calls, _Guard(twin)

    def _as_module(self, model: nn.Module, why: str) -> tuple[Callable[..., Any], list[Row]]:
        logger.warning("optimize_for_inference: the model runs as it is: %s", why)
        twin = copy_of(model).to(self.dtype)

        def run(*inputs: Any) -> Any:
            dtype = self.dtype
            return twin(*(x.to(dtype) if isinstance(x, Tensor) else x for x in inputs))

        return run, [Row("(model)", type(model).__name__, "module", why)]

    # ---- what a folded module is not -------------------------------------------------------------
    def train(self, mode: bool = True) -> OptimizedModule:
        """Stays in eval mode; ValueError for train(True)."""
        if mode:
            raise ValueError("an optimized module has no training mode: train the model itself")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise TypeError(
            "an optimized module keeps its device and dtype: call optimize_for_inference with "
            "the model there, or with dtype="
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an optimized module is not pickled or copied: save the model and optimize again, or "
            "use resnet_fast.inference.export"
        )


class _Call:
    """One compiled trace: checks, layout and dtype of the inputs, pieces of the batch."""

    def __init__(
        self,
        run: Callable[..., Any],
        trace: Trace,
        dtype: torch.dtype,
        compute: torch.dtype,
        guard: _Guard | None,
    ) -> None:
        self._function, self._trace, self._guard = run, trace, guard
        self._dtype, self._compute = dtype, compute
        self._seen: dict[Any, list[int]] = {}
        self._out_spec = trace.out_spec
        self._single = trace.out_spec.is_leaf()
        self._samplewise = samplewise(trace)

    def __call__(self, *inputs: Any) -> Any:
        leaves = pytree.tree_leaves(inputs) if len(inputs) != 1 else list(inputs)
        key = (
            tuple((x.shape, x.dtype, x.device) for x in leaves)
            if all(map(_is_tensor, leaves))
            else None
        )
        sizes = self._seen.get(key)
        if sizes is None:
            sizes = self._admit(leaves)
            if len(self._seen) >= MAX_SIZES:
                self._seen.clear()
            self._seen[key] = sizes
        if sizes:
            split = zip(*(x.split(sizes) for x in leaves))  # noqa: B905
            parts = [self._function([*map(self._ready, piece)]) for piece in split]
            outputs = [torch.cat(group) for group in zip(*parts)]  # noqa: B905
        else:
            outputs = self._function([*map(self._ready, leaves)])
        if self._guard is not None:
            self._guard.check()
        if self._dtype is not self._compute:
            outputs = [
                y.to(self._dtype) if isinstance(y, Tensor) and y.dtype is self._compute else y
                for y in outputs
            ]
        return outputs[0] if self._single else pytree.tree_unflatten(outputs, self._out_spec)

    def _admit(self, leaves: list[Any]) -> list[int]:
        """Check inputs of shapes not seen before; returns the sizes of the batch's pieces."""
        if len(leaves) != len(self._trace.shapes):
            raise TypeError(f"expected {len(self._trace.shapes)} inputs; got {len(leaves)}")
        for x in leaves:
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs must be tensors; got {type(x).__name__}")
            self._check(x)
        check_shape(self._trace, leaves)
        return pieces(self._trace, leaves[0].shape) if self._samplewise else []

    def _check(self, x: Tensor) -> None:
        if x.device.type != "cpu":
            raise ValueError(f"input is on {x.device}; the optimized module is on cpu")
        if not x.is_floating_point():
            raise TypeError(f"input must be floating point; got {x.dtype}")

    def _ready(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.to(self._compute, memory_format=torch.channels_last)
        return x.to(self._compute)


class _Guard:
    """What is folded does not see what a hook writes to the modules it is given."""

    def __init__(self, twin: nn.Module) -> None:
        self._twin, self._watch = twin, Watch(twin)

    def check(self) -> None:
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(
                f"a forward hook changed {changed} of its private copy, which is folded: hooks "
                "may read and replace what passes; for this one call the model itself"
            )


def _hook_row(point: Point) -> Row:
    """The table's row of a hooked module."""
    name = point.name or "(model)"
    if point.kind == "module":
        return Row(name, "module", "module", "called as it is: it has forward hooks")
    what = "what goes in" if point.kind == "before" else "what comes out"
    return Row(name, "forward hooks", "hooks", f"called with {what}; its inside is folded")


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def state_of(trace: Trace, model: nn.Module) -> dict[str, Tensor]:
    """Placeholder -> tensor, of the model as it is now, for all that is no input."""
    return trace.constants | {name: _tensor(model, key) for name, key in trace.state.items()}


def _tensor(model: nn.Module, key: str) -> Tensor:
    """A parameter or buffer by its qualified name; the current one."""
    owner, _, name = key.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(owner), name)).detach()


def _signature(model: nn.Module) -> list[Any]:
    """What refresh asks to be the same."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [*modules, *((name, t.shape) for name, t in tensors)]
