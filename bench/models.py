# SPDX-License-Identifier: BSD-3-Clause
"""The model benchmark: a whole ResNet-50 training step, and its activation memory.

A step is forward, cross entropy, backward and SGD with momentum, on 224 px images; bfloat16 means
torch.autocast with float32 weights. Rivals in turn: eager NCHW, eager channels_last, torch.compile
channels_last, ours (accelerated) channels_last. All start from the same weights; losses are
compared before timing. Activation memory is what autograd saves for backward, counted once per
storage, parameters and buffers left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.demo.vision import import_torchvision

from .job import MEMORY_FORMATS, Emit, Job, Progress
from .kernels import ratios
from .timing import Timings, measure

CLASSES = 1000
# Relative difference of the losses of two right implementations at a ResNet-50's first step.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def plain_resnet(name: str) -> tuple[nn.Module, str]:
    """A plain ResNet and its source: torchvision's where it can be imported, else ours.

    Ours is plain only while the backend is "reference", which callers must set.
    """
    torch.manual_seed(0)
    torchvision = import_torchvision()
    if torchvision is None:
        return rf.models.create_model(name, num_classes=CLASSES), "resnet_fast"
    return torchvision.models.get_model(name, num_classes=CLASSES), "torchvision"


class Trainer:
    """One rival: a model of its own, its optimizer and its batch."""

    def __init__(
        self, model: nn.Module, layout: str, dtype: str, images: Tensor, labels: Tensor
    ) -> None:
        fmt: Any = MEMORY_FORMATS[layout]
        self.model: Callable[[Tensor], Tensor] = model.to(memory_format=fmt).train()
        self.parameters = list(model.parameters())
        self.images = images.to(memory_format=fmt)
        self.labels = labels
        self.autocast = dtype == "bfloat16"
        # A small rate: over the benchmark's steps on one batch the weights must stay finite.
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(self.images), self.labels)

    def launch(self) -> Tensor:
        """One training step, without waiting for a GPU; returns the loss before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self) -> float:
        """As launch(), the loss as a number."""
        return self.launch().item()


def saved_bytes(run: Callable[[], object], owned: list[Tensor]) -> int:
    """Bytes that autograd saves for backward while ``run()`` builds a graph.

    Each storage counts once, however many saved tensors look into it; storages of ``owned``
    (parameters, buffers) do not count.
    """
    skip = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive by the graph, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()
    del graph
    return sum(found.values())


def _model_name(job: Job) -> str:
    return "resnet18" if job.quick else "resnet50"


def batch_of(job: Job) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count, size = (4, 64) if job.quick else (job.batch, 224)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def step_row(job: Job, images: Tensor, provider: str, layout: str, dtype: str) -> dict[str, Any]:
    return {
        "name": _model_name(job),
        "shape": list(images.shape),
        "dtype": dtype if dtype == "float32" else f"{dtype} autocast",
        "layout": layout,
        "provider": provider,
        "mode": "train",
    }


def on_reference(call: Callable[[], Any], plain_is_ours: bool) -> Callable[[], Any]:
    """Run ``call`` on the reference backend where the plain model is one of our own."""
    if not plain_is_ours:
        return call

    def plain() -> Any:
        with rf.use_backend("reference"):
            return call()

    return plain


def trainer_of(rival: str, model: nn.Module, dtype: str, images: Tensor, labels: Tensor) -> Trainer:
    """rival: "eager" or "ours", and the layout, as in "ours channels_last"."""
    provider, _, layout = rival.partition(" ")
    model = rf.accelerate(model) if provider == "ours" else model
    return Trainer(model, layout, dtype, images, labels)


def check_loss(rival: str, loss: float, expected: float, dtype: str) -> None:
    """RuntimeError if two right implementations could not differ so much at a first step."""
    if not abs(loss - expected) <= LOSS_TOLERANCE[dtype] * abs(expected):
        raise RuntimeError(f"{rival}: loss {loss}, eager NCHW has {expected}, not timed")


def _trainers(job: Job, dtype: str, progress: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Rival name -> its step, after one compared step each; and where the model is from."""
    images, labels = batch_of(job)
    base, source = plain_resnet(_model_name(job))
    names = ("eager nchw", "eager channels_last", "ours channels_last")
    made = {n: trainer_of(n, copy.deepcopy(base), dtype, images, labels) for n in names}
    if job.compile:
        torch._dynamo.reset()
        trainer = Trainer(base, "channels_last", dtype, images, labels)
        trainer.model = torch.compile(base, dynamic=False)
        made["compile channels_last"] = trainer
    steps = {
        name: trainer.step
        if name.startswith("ours")
        else on_reference(trainer.step, source == "resnet_fast")
        for name, trainer in made.items()
    }
    expected = None
    for name, step in steps.items():
        progress(f"{name} {dtype}: first step")
        loss = step()
        expected = loss if expected is None else expected
        check_loss(f"{name} {dtype}", loss, expected, dtype)
    return steps, source


def _emit_steps(job: Job, dtype: str, source: str, timings: Timings, emit: Emit) -> None:
    images, _ = batch_of(job)
    layouts = {"eager nchw": "nchw"}
    # Ratios are within the layout; eager NCHW stands as a rival of its own.
    by_provider = {
        name.partition(" ")[0]: times
        for name, times in timings.seconds.items()
        if name not in layouts
    }
    same_layout = Timings(by_provider)
    for name in timings.seconds:
        provider, _, layout = name.partition(" ")
        p20, p50, p80 = timings.quantiles(name)
        row = step_row(job, images, provider, layout, dtype)
        row |= {"kind": "model", "source": source, "rounds": timings.rounds}
        row |= {"p20": p20, "p50": p50, "p80": p80}
        if name not in layouts:
            row |= ratios(same_layout, provider)
            row["ratio_vs_eager_nchw"] = timings.ratio("eager nchw", name)
        emit(row)


def run_models(job: Job, emit: Emit, progress: Progress) -> None:
    """Time the training step of every rival, one dtype after the other, and emit the rows."""
    total = 2 * len(job.dtypes)
    for index, dtype in enumerate(job.dtypes):
        steps, source = _trainers(
            job, dtype, lambda what, at=2 * index: progress(at, total, f"{_model_name(job)} {what}")
        )
        progress(2 * index + 1, total, f"training step {dtype}: in turn")
        limits = {"budget": 1.0, "min_rounds": 2} if job.quick else {"budget": 90, "min_rounds": 5}
        # The compared step was the warm-up: it compiled, and made gradients and momentum.
        timings = measure(steps, warmup=0, settle=1, max_rounds=15, **limits)
        _emit_steps(job, dtype, source, timings, emit)
        del steps
    progress(total, total, "models")


def run_memory(job: Job, emit: Emit, progress: Progress) -> None:
    """Count what one training step saves for backward, eager and ours, channels_last."""
    images, labels = batch_of(job)
    for index, dtype in enumerate(job.dtypes):
        base, source = plain_resnet(_model_name(job))
        rivals = {"eager": copy.deepcopy(base), "ours": rf.accelerate(base)}
        rows: dict[str, int] = {}
        for provider, model in rivals.items():
            progress(index, len(job.dtypes), f"activation memory {provider} {dtype}")
            trainer = Trainer(model, "channels_last", dtype, images, labels)
            run = trainer.loss
            if provider == "eager":
                run = on_reference(run, source == "resnet_fast")
            rows[provider] = saved_bytes(run, [*model.parameters(), *model.buffers()])
        for provider, count in rows.items():
            row = step_row(job, images, provider, "channels_last", dtype)
            row |= {"kind": "memory", "source": source, "memory_bytes": count}
            if provider == "ours":
                row["ratio_vs_eager"] = rows["eager"] / count
            emit(row)
    progress(1, 1, "memory")
