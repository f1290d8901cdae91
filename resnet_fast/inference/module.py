# SPDX-License-Identifier: BSD-3-Clause
"""The module that optimize_for_inference returns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from resnet_fast.dispatch import logger
from resnet_fast.inference.batches import cut, samplewise, whole
from resnet_fast.inference.call import Call, Guard
from resnet_fast.inference.capture import Recorder
from resnet_fast.inference.cuda import CudaGraphs
from resnet_fast.inference.fold import Conv, Writes
from resnet_fast.inference.fuse import fuse, fused_conv, module_name
from resnet_fast.inference.hooks import Caller, Point, hook_call, hooked_modules, make_call
from resnet_fast.inference.kernels import kernels_for
from resnet_fast.inference.plan import Plan
from resnet_fast.inference.program import Program, compile_segment, evaluate_constants
from resnet_fast.inference.progress import Progress, Tell
from resnet_fast.inference.table import Row, Table
from resnet_fast.inference.trace import NotTraceable, Trace, capture
from resnet_fast.inference.trace import private_copy as copy_of
from resnet_fast.inference.watch import Watch

STEPS, TRACING = 100, 80  # of loading, in percent; torch.export takes most of the time


class OptimizedModule(nn.Module):
    """What ``model.eval()`` computes, from folded and packed private copies of its weights.

    Made by ``resnet_fast.optimize_for_inference``. Runs without gradients, from any number of
    threads at once. Raises RuntimeError where the model's weights or hooks changed since (see
    refresh) and ValueError for inputs that the trace does not hold for.
    """

    _run: Callable[..., Any]
    _watch: Watch
    _rows: Sequence[Row | Callable[[], Row]]

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        dtype: torch.dtype,
        *,
        cuda_graph: bool = False,
        plan: Plan | None = None,
        progress: bool | Tell | None = None,
    ) -> None:
        super().__init__()
        self._progress = progress
        self.training = False
        self.dtype = dtype
        self.device = device_of(model, example)
        self._kernels = kernels_for(self.device, plan)
        self._cuda_graph = cuda_graph
        if cuda_graph:
            _recorder(self.device)  # ValueError where there are no graphs
        self.compute, self.why_compute = self._kernels.compute_dtype(dtype)
        self._example = torch.empty(example.shape, dtype=example.dtype, device="meta")
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

    @property
    def plan(self) -> Plan | None:
        """What was measured and chosen, to print and save; None on the CPU, which counts."""
        return self._kernels.plan

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that calls left to the next ones, beside the weights."""
        return self._run.kept_bytes if isinstance(self._run, Call) else 0

    def explain(self) -> Table:
        """What runs for each layer, and why where it is not the fast way.

        On CUDA a conv's row names the candidate chosen, for each input shape if they differ.
        """
        rows = [row if isinstance(row, Row) else row() for row in self._rows]
        if isinstance(self._run, Call):
            graphs = self._run.reasons()
        else:
            graphs = ["no CUDA graph: the model runs as it is"] * self._cuda_graph
        return Table(rows, "\n".join(filter(None, [self.why_compute, *graphs])))

    def forward(self, *inputs: Any) -> Any:
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(
                f"the model's {changed} changed after optimize_for_inference: call "
                "refresh(model) on the optimized module to take it over"
            )
        with torch.no_grad():
            if torch.is_autocast_enabled(self.device.type):  # dtype= says what to calculate in
                with torch.autocast(self.device.type, enabled=False):
                    return self._run(*inputs)
            return self._run(*inputs)

    # ---- building --------------------------------------------------------------------------------
    def _build(self, model: nn.Module) -> None:
        """Everything is made before anything is replaced."""
        device = _model_device(model)
        if device not in (self.device, None):
            raise ValueError(f"model must be on {self.device}, as before; it is on {device}")
        watch = Watch(model)
        signature = _signature(model)
        if self._signature and signature != self._signature:
            raise ValueError(
                "model is not the one that was optimized: its modules or the shapes of its "
                "parameters differ; call optimize_for_inference again"
            )
        hooks = hooked_modules(model)
        trace = self.trace if hooks == self._hooks else None
        with Progress(self._progress) as say:
            try:
                say(0, STEPS, "tracing with torch.export")
                trace = trace or self._traced(model)
                run, rows = self._compile(trace, model, say)
            except NotTraceable as error:
                run, rows = self._as_module(model, str(error))
                trace = None
            say(STEPS, STEPS, "ready")
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
        return torch.empty(self._example.shape, dtype=dtype, device=self.device)

    def _compile(
        self, trace: Trace, model: nn.Module, say: Tell
    ) -> tuple[Callable[..., Any], list[Row | Callable[[], Row]]]:
        convs = sum(node.target is fused_conv for node in trace.graph.nodes)
        values = evaluate_constants(trace.graph, trace.known, state_of(trace, model))
        rows: list[Row | Callable[[], Row]] = []

        def make_conv(spec: Any, constants: Any) -> Conv:
            done = TRACING + (STEPS - TRACING) * len(rows) // convs
            say(done, STEPS, f"folding and packing {spec.name}")
            function, describe = self._kernels.make_conv(spec, constants, self.compute)
            rows.append(lambda: Row(spec.name, spec.label(), *describe()))
            return function

        rest = {
            n: v.to(self.compute, copy=True)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for n, v in values.items()
            if any(user.target is not fused_conv for user in n.users)
        }
        calls, guard = self._hook_calls(trace, model)
        in_pieces = self._kernels.in_pieces and samplewise(trace)
        segments, known = cut(trace) if in_pieces else [whole(trace)], values | rest
        writing: dict[Any, Writes] = {}
        functions = [compile_segment(s, known, make_conv, writing, calls) for s in segments]
        batch = trace.shapes[0][0] if in_pieces and trace.shapes[0] else None
        program = Program(functions, segments, writing, batch)
        rows += [_hook_row(point) for point in trace.points]
        rows += [
            Row(module_name(n), str(n.target), "PyTorch", "")
            for n in trace.graph.nodes
            if n.op == "call_function"
            and n not in trace.known
            and n.target not in (fused_conv, hook_call, operator.getitem)
        ]
        call = Call(program, trace, self._kernels, (self.dtype, self.compute), guard)
        if self._cuda_graph:
            # One for these weights: graphs of the old ones, in other threads, have another pool.
            call.record(_recorder(self.device))
        return call, rows

    def _hook_calls(self, trace: Trace, model: nn.Module) -> tuple[list[Caller], Guard | None]:
        """What the trace's hook_calls call, in a private copy with hooks, and the copy's guard."""
        if not trace.points:
            return [], None
        twin = copy_of(model).to(self.compute)
        calls = [make_call(point, twin, trace.shapes) for point in trace.points]
        return calls, Guard(twin)

    def _as_module(
        self, model: nn.Module, why: str
    ) -> tuple[Callable[..., Any], list[Row | Callable[[], Row]]]:
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


def _hook_row(point: Point) -> Row:
    """The table's row of a hooked module."""
    name = point.name or "(model)"
    if point.kind == "module":
        return Row(name, "module", "module", "called as it is: it has forward hooks")
    what = "what goes in" if point.kind == "before" else "what comes out"
    return Row(name, "forward hooks", "hooks", f"called with {what}; its inside is folded")


def device_of(model: nn.Module, example: Tensor) -> torch.device:
    """The one device of the model and the example; ValueError where there are several."""
    device = _model_device(model)
    if device is None:
        return example.device
    if example.device != device and example.device.type != "meta":
        raise ValueError(
            f"example_input must be on the model's device, {device}; it is on {example.device}"
        )
    return device


def _model_device(model: nn.Module) -> torch.device | None:
    """The device of parameters and buffers, None where there are none; ValueError for several."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, t in tensors:
        if t.device != tensors[0][1].device:
            first, device = tensors[0][0], tensors[0][1].device
            raise ValueError(
                f"model must be on one device: {first} is on {device}, {name} on {t.device}"
            )
    return tensors[0][1].device if tensors else None


def _recorder(device: torch.device) -> Recorder:
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a model on a CUDA device; it is on {device}")
    return CudaGraphs(device)


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
