# SPDX-License-Identifier: BSD-3-Clause
"""The inference benchmark: latency of ResNets, ours against every rival that is installed.

One process, rivals in turn on the same images, all with the job's number of threads. Every answer
is compared with float32 eager before anything is timed: a rival that is too far off is left out,
ours stops the benchmark. What is left out is a row of kind "failed" with its reason.

memory_bytes is how far the process's resident memory rises above its level in one call after the
build (Linux only), with what ours keeps from call to call: what a call needs beside the weights.
What ONNX Runtime and OpenVINO keep is not known and not counted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf

from .job import Emit, Job, Progress
from .models import plain_resnet
from .rivals import Rivals, reason
from .timing import Timings, measure, quantile

Call = Callable[[], object]
# Relative error in norm that separates rounding from a wrong answer (which gives about 1.4).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1, "int8": 0.5}


def rise_of_memory(call: Call) -> int | None:
    """Bytes that resident memory rises by at the most in a call; None where Linux is not."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)

    def kilobytes(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = kilobytes("VmRSS")
    refs.write_text("5")  # sets the peak back to the present
    call()
    return max(kilobytes("VmHWM") - before, 0) * 1024


def difference_of(name: str, got: Any, expected: Tensor, dtype: str) -> float:
    """Relative error in norm; RuntimeError where it is too large."""
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name} {dtype}: differs from eager by {error:.1e}, not timed")
    return error


def _cells(job: Job) -> list[tuple[str, int, str]]:
    models = ("resnet18",) if job.quick else job.networks
    sizes = (1, 2) if job.quick else job.batches
    return [(m, n, d) for d in job.dtypes for m in models for n in sizes]


def lively(model: nn.Module) -> nn.Module:
    """As after training: logits of a fresh network hardly differ from image to image."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def run_inference(job: Job, emit: Emit, progress: Progress) -> None:
    """Time every cell and emit its rows."""
    cells = _cells(job)
    for done, (name, batch, dtype) in enumerate(cells):

        def say(what: str, done: int = done, cell: str = f"{name} batch {batch} {dtype}") -> None:
            progress(done, len(cells), f"{cell}: {what}")

        say("building")
        with torch.no_grad(), rf.use_backend("reference"):
            base, source = plain_resnet(name)
            size = 64 if job.quick else 224
            images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
            rivals = Rivals(lively(base).eval(), dtype, job, images)
            found = _prepared(rivals, images, base(images), dtype, say)
            limits = {"budget": 1.0, "min_rounds": 2} if job.quick else {"budget": 30.0}
            calls = {rival: call for rival, (call, _) in found.items()}
            # One picture after the other: a call right after a rival's would pay for that one's
            # spinning threads. For a batch that is little.
            timings = measure(calls, max_rounds=60, settle=int(batch == 1), **limits)
        common = {"name": name, "shape": list(images.shape), "dtype": dtype, "source": source}
        common["mode"] = "eval"
        for rival in calls:
            row = _row(rival, batch, timings) | found[rival][1]
            note = {"note": rivals.notes[rival]} if rival in rivals.notes else {}
            emit(common | row | note)
        for rival, error in rivals.left_out.items():
            provider, _, layout = rival.partition(" ")
            failed = {"kind": "failed", "provider": provider, "layout": layout, "error": error}
            emit(common | failed)
        del rivals, calls, found
    progress(len(cells), len(cells), "inference")


def _prepared(
    rivals: Rivals, images: Tensor, expected: Tensor, dtype: str, say: Callable[[str], None]
) -> dict[str, tuple[Call, dict[str, Any]]]:
    """Of each rival that gives the right answer: its call, and what was measured once."""
    found: dict[str, tuple[Call, dict[str, Any]]] = {}
    for rival, run in rivals.runs.items():
        say(rival)
        x = rivals.input(rival, images)

        def call(run: Callable[[Tensor], Any] = run, x: Tensor = x) -> object:
            return run(x)

        try:
            difference = difference_of(rival, call(), expected, dtype)
            memory = rise_of_memory(call)
            if memory is not None:
                memory += getattr(run, "kept_bytes", 0)
            found[rival] = call, {"difference": difference, "memory_bytes": memory}
        except Exception as error:
            if rival.startswith("ours"):
                raise
            rivals.left_out[rival] = reason(error)
    return found


def _row(rival: str, batch: int, timings: Timings) -> dict[str, Any]:
    provider, _, layout = rival.partition(" ")
    times = timings.seconds[rival]
    p50 = quantile(times, 0.5)
    row: dict[str, Any] = {"kind": "inference", "rounds": timings.rounds}
    row |= {"provider": provider, "layout": layout, "p50": p50, "p95": quantile(times, 0.95)}
    row["images_s"] = batch / p50
    if provider == "ours":
        others = {name: timings.ratio(name, rival) for name in timings.seconds if name != rival}
        best = min(others, key=others.__getitem__)
        row |= {"ratio_vs_best": others[best], "best_rival": best}
        row["ratio_vs_eager"] = min(
            ratio for name, ratio in others.items() if name.startswith("eager")
        )
    return row
