# SPDX-License-Identifier: BSD-3-Clause
"""The training-step benchmark on a GPU: rivals in turn, each step one CUDA graph where it can be.

A step is as on the CPU (models.py): forward, cross entropy, backward, SGD with momentum; bfloat16
means torch.autocast with float32 weights. A rival whose step cannot be captured runs launch by
launch, and its row has ``graph`` false.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import resnet_fast as rf
from resnet_fast import dispatch

from .gpu_timing import Call, captured, measure
from .job import Emit
from .kernels import ratios
from .models import CLASSES, LOSS_TOLERANCE, Trainer, on_reference, plain_resnet
from .timing import Timings

RIVALS = ("eager nchw", "eager channels_last", "ours channels_last", "compile channels_last")


def _trainer(rival: str, base: torch.nn.Module, options: dict[str, Any], data: Any) -> Trainer:
    provider, _, layout = rival.partition(" ")
    model = copy.deepcopy(base).to(options["device"])
    if provider == "ours":
        model = rf.accelerate(model)
    trainer = Trainer(model, layout, options["dtype"], *data)
    if provider == "compile":
        trainer.model = torch.compile(model, dynamic=False)
    return trainer


def _steps(
    options: dict[str, Any], say: Callable[[str], None]
) -> tuple[dict[str, Call], dict[str, bool], dict[str, str], str]:
    """Rival -> its step, whether that is a graph, why rivals are missing; the model's source."""
    device, dtype = options["device"], options["dtype"]
    base, source = plain_resnet(options["model"])
    generator = torch.Generator(device).manual_seed(1)
    shape = (options["batch"], 3, options["size"], options["size"])
    images = torch.randn(shape, generator=generator, device=device)
    labels = torch.randint(CLASSES, shape[:1], generator=generator, device=device)
    steps: dict[str, Call] = {}
    graphs: dict[str, bool] = {}
    failed: dict[str, str] = {}
    expected = None
    for rival in RIVALS[: 4 if options["compile"] else 3]:
        say(rival)
        plain = source == "resnet_fast" and not rival.startswith("ours")
        try:
            trainer = _trainer(rival, base, options, (images, labels))
            with dispatch.recording() as events:
                loss = on_reference(trainer.step, plain)()
            reasons = sorted({event.reason for event in events if event.impl == "reference"})
            if reasons and rival.startswith("ours"):  # timed all the same, and said
                failed[rival] = f"in part on the reference: {'; '.join(reasons)}"
            expected = loss if expected is None else expected
            if not abs(loss - expected) <= LOSS_TOLERANCE[dtype] * abs(expected):
                raise RuntimeError(f"loss {loss}, eager NCHW has {expected}")
            launch = on_reference(trainer.launch, plain)
            steps[rival], graphs[rival] = _as_graph(launch, device, say)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failed[rival] = str(error).splitlines()[0]
    return steps, graphs, failed, source


def _as_graph(step: Call, device: str, say: Callable[[str], None]) -> tuple[Call, bool]:
    if device == "cpu":
        return step, False
    try:
        return captured(step), True
    except RuntimeError as error:
        say(f"not captured: {str(error).splitlines()[0]}")
        return step, False


def run(options: dict[str, Any], emit: Emit, say: Callable[[str], None]) -> None:
    """Time one training step of every rival and emit the rows.

    options: device, model, batch, size, dtype ("float32" or "bfloat16"), compile, seconds.
    """
    steps, graphs, failed, source = _steps(options, say)
    dtype = options["dtype"]
    common = {
        "name": options["model"],
        "shape": [options["batch"], 3, options["size"], options["size"]],
        "dtype": dtype if dtype == "float32" else f"{dtype} autocast",
        "mode": "train",
        "source": source,
    }
    for rival, error in failed.items():
        provider, _, layout = rival.partition(" ")
        emit({"kind": "failed", **common, "provider": provider, "layout": layout, "error": error})
    if not steps:
        return
    say("in turn")
    calls = {rival: [step] for rival, step in steps.items()}
    timings = measure(calls, device=options["device"], budget=options["seconds"], max_rounds=60)
    # Ratios are within the layout; eager NCHW stands as a rival of its own.
    by_provider = {n.partition(" ")[0]: t for n, t in timings.seconds.items() if "nchw" not in n}
    same_layout = Timings(by_provider)
    for rival in timings.seconds:
        provider, _, layout = rival.partition(" ")
        p20, p50, p80 = timings.quantiles(rival)
        row = {"kind": "model", **common, "provider": provider, "layout": layout}
        row |= {"rounds": timings.rounds, "graph": graphs[rival]}
        row |= {"p20": p20, "p50": p50, "p80": p80, "images_per_second": options["batch"] / p50}
        if layout != "nchw":
            row |= ratios(same_layout, provider)
            if "eager nchw" in timings.seconds:
                row["ratio_vs_eager_nchw"] = timings.ratio("eager nchw", rival)
        emit(row)
