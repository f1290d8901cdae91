# SPDX-License-Identifier: BSD-3-Clause
"""The inference benchmark on a GPU: eager channels_last, torch.compile and ours, in turn.

A batch of up to LATENCY images is timed by its latency, from the call to the result (the GPU is
waited for in each call); a larger one by the GPU's time, calls queued one behind the other. Eager
and ours run launch by launch and as a CUDA graph (mode "eval, CUDA graph"); torch.compile is
"max-autotune", which makes graphs of its own. Every answer is compared with float32 eager first.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf

from .gpu_timing import Call, captured, measure
from .inference import difference_of, lively
from .job import Emit
from .models import plain_resnet
from .timing import Timings, quantile

LATENCY = 8
LAUNCHES, GRAPH = "eval", "eval, CUDA graph"
Say = Callable[[str], None]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in this thread, the main one, after so long: a compiler asks for no time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Rivals:
    """Builds the rivals of one batch and dtype, each a call on the images it keeps."""

    def __init__(self, options: dict[str, Any], batch: int, dtype: str) -> None:
        self._device, self._dtype = options["device"], getattr(torch, dtype)
        base, self.source = plain_resnet(options["model"])
        self._base = lively(base).eval().to(self._device)
        shape = (batch, 3, options["size"], options["size"])
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(shape, generator=generator).to(self._device)
        self._x = self.images.to(self._dtype, memory_format=torch.channels_last)

    def expected(self) -> Tensor:
        """Float32 eager's answer, without TF32."""
        flags: Any = torch.backends.cudnn.flags(allow_tf32=False)
        with flags:
            y: Tensor = self._base(self.images)
        return y

    def build(self, provider: str, mode: str) -> Call:
        """The call of one rival; it returns the logits. RuntimeError where it cannot be built."""
        if mode == GRAPH and self._device == "cpu" and provider != "compile":
            raise RuntimeError("there are no CUDA graphs on the CPU")
        if provider == "ours":
            graph = mode == GRAPH
            ours = rf.optimize_for_inference(
                self._base, self._x, dtype=self._dtype, cuda_graph=graph
            )
            return lambda: ours(self._x)
        model: Any = self._plain()
        if provider == "compile":
            model = torch.compile(model, mode="max-autotune", dynamic=False)
        call: Call = lambda: model(self._x)  # noqa: E731
        return captured(call) if mode == GRAPH and provider == "eager" else call

    def _plain(self) -> nn.Module:
        twin = copy.deepcopy(self._base)
        return twin.to(self._dtype, memory_format=torch.channels_last)


def _waited(call: Call, device: str) -> Call:
    def run() -> object:
        y = call()
        if device != "cpu":
            torch.cuda.synchronize()
        return y

    return run


def _cell(
    options: dict[str, Any],
    cell: tuple[int, str],
    compiled: bool,
    left: float,
    emit: Emit,
    say: Say,
) -> None:
    """Time one batch size and dtype and emit its rows."""
    (batch, dtype), device = cell, options["device"]
    began = time.monotonic()
    rivals = Rivals(options, batch, dtype)
    right = rivals.expected()
    common = {"name": options["model"], "shape": list(rivals.images.shape), "dtype": dtype}
    common |= {"layout": "channels_last", "source": rivals.source}
    names = [(p, mode) for mode in (LAUNCHES, GRAPH) for p in ("eager", "ours")]
    names += [("compile", GRAPH)] * compiled
    calls: dict[tuple[str, str], Call] = {}
    differences: dict[tuple[str, str], float] = {}
    for provider, mode in names:
        say(f"{options['model']} batch {batch} {dtype}: {provider}, {mode}")
        try:
            # Only a compiler takes minutes, and only where one may is an alarm set.
            rest = max(left - (time.monotonic() - began), 0)
            with at_most(rest) if provider == "compile" else contextlib.nullcontext():
                call = rivals.build(provider, mode)
                found = difference_of(provider, call(), right, dtype)
        except Exception as error:  # a rival's, of whatever kind; ours too is a row, not the end
            told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            failed = {"kind": "failed", "provider": provider, "mode": mode, "error": told}
            emit({**common, **failed})
            continue
        differences[provider, mode] = found
        calls[provider, mode] = _waited(call, device) if batch <= LATENCY else call
    if not calls:
        return
    keyed = {f"{provider} {mode}": [call] for (provider, mode), call in calls.items()}
    timings = measure(keyed, device=device, budget=options["seconds_each"])
    for name in calls:
        emit({**common, **_row(name, list(calls), timings, batch), "difference": differences[name]})


def _row(
    name: tuple[str, str], names: list[tuple[str, str]], timings: Timings, batch: int
) -> dict[str, Any]:
    provider, mode = name
    times = timings.seconds[f"{provider} {mode}"]
    p50 = quantile(times, 0.5)
    row = {"kind": "inference", "provider": provider, "mode": mode, "rounds": timings.rounds}
    row |= {"p50": p50, "p95": quantile(times, 0.95), "images_s": batch / p50}
    row |= {"graph": mode == GRAPH, "latency": batch <= LATENCY}
    if provider == "ours":
        others = {
            f"{p}, {m}": timings.ratio(f"{p} {m}", f"{provider} {mode}")
            for p, m in names
            if p != "ours"
        }
        if others:
            best = min(others, key=others.__getitem__)
            row |= {"ratio_vs_best": others[best], "best_rival": best}
    return row


def run(options: dict[str, Any], emit: Emit, say: Say) -> int:
    """Measure every cell, then each again with torch.compile; returns how many were left out.

    options: device, model, size, cells (pairs of batch and dtype, in order of importance), compile,
    seconds (for all), seconds_each.
    """
    began, left_out = time.monotonic(), 0
    for compiled in (False, True)[: 1 + options["compile"]]:
        for cell in options["cells"]:
            left = options["seconds"] - (time.monotonic() - began)
            if left <= 0:
                left_out += 1
                continue
            with torch.no_grad(), rf.use_backend("reference"):
                _cell(options, cell, compiled, left, emit, say)
            if options["device"] != "cpu":
                torch.cuda.empty_cache()
            if compiled:
                torch.compiler.reset()
    return left_out
