# SPDX-License-Identifier: BSD-3-Clause
"""explain: which block of a model runs which implementation, and why not a fast one."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from resnet_fast import adapters, dispatch, graphs
from resnet_fast._ready import why_not_block, why_not_module
from resnet_fast.inference.module import OptimizedModule
from resnet_fast.inference.table import Table
from resnet_fast.nn import AddReLU, ConvBNAct2d

NOT_RUN = "not run"
BY_INPUT = "by input"
_HINT = "not accelerated: call resnet_fast.accelerate(model)"


class Row(NamedTuple):
    """What one module did, `calls` times: `op` is an operator's name, or "block" for all of it.

    implementation: "cpu", "cuda" or "reference"; "not run" for a module that the call did not come
    to; "by input" where no input was given. reason: why it is not a fast one, "" if it is.
    """

    module: str
    block: str
    op: str
    implementation: str
    reason: str
    calls: int


class Explanation:
    """The answer of explain(): ``rows`` as data, ``print(...)`` as a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @property
    def fast_share(self) -> float:
        """The share of calls in ``rows`` that do not run the reference; 0.0 if there are none."""
        ran = [row for row in self.rows if row.implementation != NOT_RUN]
        fast = sum(row.calls for row in ran if row.implementation != "reference")
        return fast / max(sum(row.calls for row in ran), 1)

    def __str__(self) -> str:
        if not self.rows:
            return "no residual block, batch norm or fused op in this model"
        head = ("module", "block", "op", "calls", "implementation", "reason")
        table = [head] + [
            (row.module or "(model)", row.block, row.op, str(row.calls), *row[3:5])
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths[:-1]))
        return "\n".join([*lines, f"fast: {self.fast_share:.0%} of the calls listed"])

    __repr__ = __str__


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation | Table:
    """Run a model once, as it is, and say which block ran which implementation, and why.

    inputs, kwargs: what the model is called with. It runs in its current mode without gradients;
    afterwards every buffer and random state is as it was, also if the model raises, so running
    statistics do not move. (Hooks of your own see the call.) Without inputs nothing runs, and the
    rows say which blocks could be fused. (With gradients, blocks of plain parts on small tensors
    run PyTorch's operators: dispatch.counters() has them under "torch".) Modules that are not
    accelerated are listed, with why.

    Of an optimized module (optimize_for_inference) it is the table made when it was folded.

    Raises TypeError if model is not an nn.Module, and whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        return model.explain()
    adapters.load()
    units = _units(model)
    if inputs or kwargs:
        rows = _run(model, units, inputs, kwargs)
    else:
        rows = [_static_row(name, module) for name, module in units.items()]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows += _left_out(model, units)
    return Explanation(sorted(rows, key=lambda row: order.get(row.module, -1)))


# ---- what there is -------------------------------------------------------------------------------
def _units(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ask for fused ops: our blocks, accelerated ones, graphs traced from them."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(type(module), "_resnet_fast_norms")
        or isinstance(module, AddReLU | ConvBNAct2d)
        or graphs.is_fused(module)
    }


def _norms(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of the norms that objects of a class fuse; () for a class that is not ours."""
    return getattr(cls, "_resnet_fast_norms", ())


def _method(module: nn.Module) -> str:
    """The name of the method that a unit runs fused."""
    original = adapters.original_class(module)
    adapter = None if original is None else adapters.adapter_of(original)
    return "forward" if adapter is None else adapter.method


def _static_row(name: str, module: nn.Module) -> Row:
    why = ""
    if isinstance(module, ConvBNAct2d):
        why = why_not_module("bn", module.bn, nn.BatchNorm2d)
    elif own := getattr(type(module), "_resnet_fast_why_not", None):
        why = own(module)
    elif norms := _norms(type(module)):
        why = why_not_block(module, norms)
    return Row(name, type(module).__name__, "block", "reference" if why else BY_INPUT, why, 1)


def _left_out(model: nn.Module, units: dict[str, nn.Module]) -> list[Row]:
    """A row for each module with work for us that it does not give us."""
    rows: list[Row] = []
    inside: tuple[str, ...] = ()  # blocks whose own modules need no row
    for name, module in model.named_modules():
        if name in units:
            inside += _within(name, type(module), graphs.is_fused(module))
            continue
        if name.startswith(inside):
            continue
        known = adapters.adapter_of(type(module))
        why = adapters.why_not(module)
        if (known is None or (known.idle is not None and why)) and not _has_bare_norm(module):
            continue
        why = why or _HINT
        rows.append(Row(name, type(module).__name__, "block", "reference", why, 1))
        inside += () if known is None else _within(name, known.accelerated)
    return rows


def _has_bare_norm(module: nn.Module) -> bool:
    """True if a child is a batch norm that nothing of ours looks after."""
    return any(
        isinstance(m, _BatchNorm) and not adapters.is_accelerated(m) for m in module.children()
    )


def _within(name: str, cls: type[nn.Module], block: bool = False) -> tuple[str, ...]:
    """The prefix of what lies in a block; () for a whole model or a sequence of any modules."""
    block = block or len(_norms(cls)) > 1 or hasattr(cls, "_resnet_fast_block")
    return () if not block else (f"{name}." if name else "",)


# ---- the run -------------------------------------------------------------------------------------
def _run(
    model: nn.Module, units: dict[str, nn.Module], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Row]:
    with (
        _untouched(model, (inputs, kwargs)),
        dispatch.recording() as events,
        _entries(units, events) as entries,
        torch.no_grad(),
    ):
        model(*inputs, **kwargs)
    counts: dict[tuple[str, dispatch.Event], int] = {}
    seen: set[str] = set()
    for (start, name), (end, _) in zip(entries, [*entries[1:], (len(events), "")], strict=True):
        seen.add(name)
        for event in events[start:end]:
            counts[name, event] = counts.get((name, event), 0) + 1
    rows = []
    for (name, event), calls in counts.items():
        block = type(units[name]).__name__ if name in units else type(model).__name__
        op = "block" if event.op == block else event.op
        rows.append(Row(name, block, op, event.impl, event.reason, calls))
    for name in seen & units.keys() - {name for name, _ in counts}:
        # A forward of its own that does not come to the method which runs the norms fused.
        if _norms(type(units[name])):
            block, method = type(units[name]).__name__, _method(units[name])
            why = f"its forward does not run {method}, which is what is fused"
            rows.append(Row(name, block, "block", "reference", why, 1))
    for name in units.keys() - seen:
        rows.append(Row(name, type(units[name]).__name__, "block", NOT_RUN, "", 0))
    return rows


@contextmanager
def _entries(
    units: dict[str, nn.Module], events: list[dispatch.Event]
) -> Generator[list[tuple[int, str]], None, None]:
    """Collect (number of events so far, name of the innermost unit) at each change of unit."""
    entries: list[tuple[int, str]] = [(0, "")]
    stack = [""]
    handles: list[RemovableHandle] = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            stack.append(name)
            entries.append((len(events), name))

        def leave(*_: Any) -> None:
            stack.pop()
            entries.append((len(events), stack[-1]))

        # Hooks on the blocks themselves: unlike hooks inside them these change no decision.
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in units.items():
            watch(name, module)
        yield entries
    finally:
        for handle in handles:
            handle.remove()


# ---- leaving no trace ----------------------------------------------------------------------------
@contextmanager
def _untouched(model: nn.Module, inputs: Any) -> Generator[None, None, None]:
    """Give every buffer and the random states back what they had, in place."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    legacy = numpy.get_state() if numpy is not None else None
    versioned = tuple(buffer for _, _, buffer, _ in buffers if not buffer.is_inference())
    with ExitStack() as stack:
        # The values will be those of before, so a graph that has saved them must stay valid.
        stack.enter_context(_unsafe_preserve_version_counter(versioned))
        for kind in sorted(_device_types(model, inputs)):
            devices = range(torch.get_device_module(kind).device_count())
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        try:
            yield
        finally:
            _restore(buffers)
            random.setstate(python)
            if numpy is not None:
                numpy.set_state(legacy)


def _restore(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)


def _device_types(model: nn.Module, inputs: Any) -> set[str]:
    """Types of the devices with a random state of their own that a call may draw from."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return {t.device.type for t in tensors} - {"cpu", "meta"}
