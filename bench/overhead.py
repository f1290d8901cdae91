# SPDX-License-Identifier: BSD-3-Clause
"""The cost of the calls: networks on pictures so small that little else is left.

Forward in eval mode without gradients at batch 1, and forward with backward in training mode, both
at 32 px, float32, NCHW, ours against eager in turn. Training takes two pictures: a single one of 32
px leaves the last stage one value a channel, which PyTorch's batch norm refuses; and a single one
with the stem that is usual for such pictures, a convolution of 3x3 and no pooling. Numbers too
small for the normal range count as zero: a norm over two values makes them, and they would take
most of the time. And the time that accelerate() takes for a ResNet-152, and loading for inference
for a ResNet-50.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import trace

from .job import Emit, Job, Progress, check_equal
from .kernels import ratios
from .models import on_reference, plain_resnet
from .timing import Timings, measure

PIXELS = 32
# Mode, pictures, and whether the stem is that for small ones.
CASES = (("eval", 1, False), ("train", 2, False), ("train", 1, True))


def networks_of(job: Job) -> tuple[str, ...]:
    """The networks that are timed."""
    return ("resnet18",) if job.quick else ("resnet18", "resnet50")


def with_small_stem(model: Any) -> nn.Module:
    """A torchvision-like ResNet for pictures of 32 px, in place."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return cast(nn.Module, model)


def step_of(model: nn.Module, images: Tensor, mode: str) -> Callable[[], Tensor]:
    """One call of the model in a mode: "eval", or "train" with its backward; the output."""

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(images)
        return out

    def forward_backward() -> Tensor:
        model.zero_grad(set_to_none=True)
        out: Tensor = model(images)
        out.sum().backward()
        return out.detach()

    model.train(mode == "train")
    return forward if mode == "eval" else forward_backward


def _check(what: str, base: nn.Module, source: str, images: Tensor, mode: str) -> None:
    """Both compute the same, in float64.

    A norm over two values is 1 and -1, however close they are: in float32 even eager's training
    output is half wrong by the last stage.
    """
    plain = copy.deepcopy(base).double()
    fast, images = rf.accelerate(copy.deepcopy(plain)), images.double()
    expected = on_reference(step_of(plain, images, mode), source == "resnet_fast")()
    got = step_of(fast, images, mode)()
    check_equal(what, {"output": got}, {"output": expected}, torch.float32)


def seconds_of_accelerate(model: nn.Module, rounds: int) -> Timings:
    """How long accelerate() takes on a model that is not accelerated."""
    rf.restore(rf.accelerate(model))  # imports the adapters
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        rf.accelerate(model)
        taken.append(time.perf_counter() - began)
        rf.restore(model)
    return Timings({"ours": taken})


def seconds_of_loading(model: nn.Module, images: Tensor, rounds: int) -> dict[str, Timings]:
    """How long optimize_for_inference() and what the first call adds take: "load".

    "trace" is the part of it that is torch.export's; what is left is folding and packing.
    """
    taken: dict[str, list[float]] = {"load": [], "trace": []}
    for round_ in range(rounds + 1):  # the first imports the tracer
        times = [time.perf_counter()]
        trace.capture(trace.private_copy(model), images)
        times.append(time.perf_counter())
        fast = rf.optimize_for_inference(model, images)
        for _ in range(2):
            fast(images)
            times.append(time.perf_counter())
        began, traced, first, second = times
        if round_:
            taken["trace"].append(traced - began)
            # Two calls: the first packs, the second is what a call takes.
            taken["load"].append((first - traced) - (second - first))
    return {mode: Timings({"ours": seconds}) for mode, seconds in taken.items()}


def emit_rows(row: dict[str, Any], timings: Timings, emit: Emit) -> None:
    for provider in timings.seconds:
        p20, p50, p80 = timings.quantiles(provider)
        times = {"p20": p20, "p50": p50, "p80": p80, "rounds": timings.rounds}
        emit(row | {"provider": provider} | times | ratios(timings, provider))


def run_overhead(job: Job, emit: Emit, progress: Progress) -> None:
    """Time every network in both modes, then accelerate(), and emit the rows."""
    names = networks_of(job)
    limits = {"budget": 0.5, "max_rounds": 5} if job.quick else {"budget": 20, "max_rounds": 1000}
    total = len(CASES) * len(names) + 2
    torch.set_flush_denormal(True)
    row: dict[str, Any] = {"kind": "overhead", "dtype": "float32", "layout": "nchw"}
    for index, name in enumerate(names):
        for at, (mode, batch, small) in enumerate(CASES):
            base, source = plain_resnet(name)
            if small:
                base = with_small_stem(base)
            ours = rf.accelerate(copy.deepcopy(base))
            progress(len(CASES) * index + at, total, f"{name} {mode}")
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(batch, 3, PIXELS, PIXELS, generator=generator)
            eager = on_reference(step_of(base, images, mode), source == "resnet_fast")
            rivals = {"eager": eager, "ours": step_of(ours, images, mode)}
            _check(f"{name} {mode}", base, source, images, mode)
            timings = measure(rivals, **limits)
            called = f"{name}, stem of 3x3" if small else name
            facts = {"name": called, "shape": list(images.shape), "mode": mode, "source": source}
            emit_rows(row | facts, timings, emit)
    torch.set_flush_denormal(False)
    name = "resnet18" if job.quick else "resnet152"
    progress(total - 2, total, f"accelerate({name})")
    model, source = plain_resnet(name)
    timings = seconds_of_accelerate(model, 3 if job.quick else 20)
    facts = {"name": name, "shape": [], "mode": "accelerate", "source": source}
    emit_rows(row | facts, timings, emit)
    name, size = ("resnet18", 64) if job.quick else ("resnet50", 224)
    progress(total - 1, total, f"loading {name} for inference")
    model, source = plain_resnet(name)
    images = torch.randn(1, 3, size, size)
    loading = seconds_of_loading(model.eval(), images, 1 if job.quick else 5)
    for mode, timings in loading.items():
        facts = {"name": name, "shape": list(images.shape), "mode": mode, "source": source}
        emit_rows(row | facts, timings, emit)
    progress(total, total, "overhead")
