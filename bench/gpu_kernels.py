# SPDX-License-Identifier: BSD-3-Clause
"""The op benchmark on a GPU: forward + backward over ResNet-50's layers, as kernels.py on the CPU.

Rivals within a layout: eager, torch.compile (channels_last) and ours. ``share_of_copy`` is the
op's least bytes a second as a share of what a copy of COPY_BYTES reaches on the same card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .gpu_timing import GRAPH_BELOW, Call, captured, measure, sets_needed
from .job import MEMORY_FORMATS, Emit
from .kernels import Case, layer_rows, rivals_of, total_rows
from .layers import Layer, add_relu_layers, bytes_moved, resnet50_layers
from .timing import Timings

COPY_BYTES = 2 << 30
Say = Callable[[str], None]


def copy_row(device: str, size: int = COPY_BYTES) -> dict[str, Any]:
    """The card's copy speed between two held buffers of ``size`` bytes, as a row."""
    source = torch.empty(size // 4, device=device)
    target = torch.empty_like(source)
    source.zero_()
    timings = measure({"eager": [lambda: target.copy_(source)]}, device=device, budget=0.5)
    p20, p50, p80 = timings.quantiles("eager")
    row = {"kind": "copy", "name": "copy", "shape": [size], "dtype": "", "layout": "", "mode": ""}
    row |= {"provider": "eager", "p20": p20, "p50": p50, "p80": p80, "rounds": timings.rounds}
    return row | {"bytes": 2 * size, "bytes_per_second": 2 * size / p50}


def plan(batches: Sequence[int], dtypes: Sequence[str], size: int = 224) -> list[tuple[Any, ...]]:
    """(batch, dtype, layout, layers) in order of importance: a budget cuts off the end."""
    cases = []
    for dtype in dtypes:
        for batch in batches:
            layers = resnet50_layers(batch, size)
            layers += add_relu_layers(layers)
            cases += [(batch, dtype, layout, layers) for layout in MEMORY_FORMATS]
    return cases


def _calls(
    layer: Layer, dtype: torch.dtype, layout: str, device: str, l2: int, what: str, compiled: bool
) -> tuple[dict[str, list[Call]], dict[str, str], bool]:
    """Rivals' calls per set of tensors, why some are missing, and whether they are graphs."""
    size = bytes_moved(layer.op, layer.numel, dtype.itemsize, "ours")
    cases = [Case(layer, dtype, layout, device) for _ in range(sets_needed(size, l2))]
    graph = device != "cpu" and size < GRAPH_BELOW
    calls: dict[str, list[Call]] = {}
    failed: dict[str, str] = {}
    for name, forward in rivals_of(cases[0], what, compiled).items():
        steps = [case.call(forward) for case in cases]
        try:
            calls[name] = [captured(step) for step in steps] if graph else steps
        except RuntimeError as error:  # a rival that cannot be captured is left out, and said
            failed[name] = str(error).splitlines()[0]
    return calls, failed, graph


def _measured(
    layer: Layer, dtype: str, layout: str, options: dict[str, Any], bandwidth: float, what: str
) -> list[dict[str, Any]]:
    device, kind = options["device"], getattr(torch, dtype)
    compiled = options["compile"] and layout == "channels_last"
    calls, failed, graph = _calls(layer, kind, layout, device, options["l2"], what, compiled)
    base = {"kind": "failed", "name": layer.op, "shape": list(layer.shape)}
    rows = [{**base, "provider": name, "error": error} for name, error in failed.items()]
    if calls:
        timings: Timings = measure(calls, device=device, budget=options["seconds_each"])
        rows += layer_rows(layer, kind, timings, bandwidth)
    return [{"dtype": dtype, "layout": layout, "mode": "train", "graph": graph, **r} for r in rows]


def run(options: dict[str, Any], emit: Emit, say: Say) -> int:
    """Measure until all is done or ``options["seconds"]`` are spent; returns the cases left out.

    options: device, batches, dtypes, size, compile, l2 (bytes), copy_bytes, seconds, seconds_each,
    stride (take every n-th layer). A case that fails is a row of kind "failed".
    """
    began = time.monotonic()
    copied = copy_row(options["device"], options["copy_bytes"])
    emit(copied)
    left = 0
    for batch, dtype, layout, layers in plan(
        options["batches"], options["dtypes"], options["size"]
    ):
        rows: list[dict[str, Any]] = []
        complete = True
        for layer in layers[:: options["stride"]]:
            what = f"{layer.op} {'x'.join(map(str, layer.shape))} {dtype} {layout}"
            if time.monotonic() - began > options["seconds"]:
                left, complete = left + 1, False
                continue
            say(what)
            try:
                measured = _measured(
                    layer, dtype, layout, options, copied["bytes_per_second"], what
                )
            except (RuntimeError, torch.OutOfMemoryError) as error:
                text = str(error).splitlines()[0]
                measured = [{"kind": "failed", "name": layer.op, "shape": list(layer.shape)}]
                measured[0] |= {"dtype": dtype, "layout": layout, "provider": "", "error": text}
                complete = False
            for row in measured:
                emit(row)
            rows += [row for row in measured if row["kind"] == "op"]
        if complete and options["stride"] == 1:
            for row in total_rows(rows, batch):
                emit({"dtype": dtype, "layout": layout, "mode": "train", **row})
    return left
