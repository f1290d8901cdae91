# SPDX-License-Identifier: BSD-3-Clause
"""The inference benchmark: latency of ResNets, ours against every rival that is installed.

One process, rivals in turn on the same images, all with the job's number of threads. Every answer
is compared with float32 eager before anything is timed. Rivals: eager (NCHW, channels_last;
bfloat16 also under autocast), torch.jit.optimize_for_inference, torch.compile with freezing, ONNX
Runtime and OpenVINO on the ONNX file of the folded model.

memory_bytes is how far the process's resident memory rises above its level in one call after the
build (Linux only): what a call needs beside the weights.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf

from .job import Emit, Job, Progress
from .models import plain_resnet
from .timing import Timings, measure, quantile

Call = Callable[[], object]
# Relative error in norm that separates rounding from a wrong answer.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Rivals:
    """Builds each rival once for a model and dtype; ``calls(images)`` gives name -> call."""

    def __init__(self, model: nn.Module, dtype: str, job: Job, images: Tensor) -> None:
        self._dtype, self._job = DTYPES[dtype], job
        self._name = dtype
        self._plain = model
        self._last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self._example = images
        self.left_out: list[str] = []
        self._runs: dict[str, Callable[[Tensor], Any]] = {"eager nchw": self._eager(self._plain)}
        self._runs["eager channels_last"] = self._eager(self._last)
        if dtype == "bfloat16":
            self._runs["autocast channels_last"] = self._autocast
        for name, build in (
            ("jit channels_last", self._jit),
            ("compile channels_last", self._compiled),
            ("onnxruntime nchw", self._onnxruntime),
            ("openvino nchw", self._openvino),
        ):
            try:
                run = build()
            except ImportError as error:
                self.left_out.append(f"{name}: {error}")
            else:
                if run is not None:
                    self._runs[name] = run
        self._runs["ours channels_last"] = rf.optimize_for_inference(
            model, images, dtype=self._dtype
        )

    def runs(self) -> dict[str, Callable[[Tensor], Any]]:
        return self._runs

    def input(self, name: str, images: Tensor) -> Tensor:
        """The images as the rival wants them: conversions are not timed for anybody."""
        if name.endswith("channels_last"):
            images = images.contiguous(memory_format=torch.channels_last)
        own = name.partition(" ")[0] in ("eager", "jit", "compile", "ours")
        return images.to(self._dtype) if own else images

    def _eager(self, model: nn.Module) -> Callable[[Tensor], Any]:
        return copy.deepcopy(model).to(self._dtype)

    def _autocast(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self._last(x)

    def _jit(self) -> Callable[[Tensor], Any]:
        model = copy.deepcopy(self._last).to(self._dtype)
        traced = torch.jit.trace(model, self.input("jit channels_last", self._example))
        frozen: Callable[[Tensor], Any] = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        return frozen

    def _compiled(self) -> Callable[[Tensor], Any] | None:
        if not self._job.compile:
            return None
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        inductor.freezing = True
        return torch.compile(copy.deepcopy(self._last).to(self._dtype), dynamic=False)

    def _onnx(self, folder: str) -> Path:
        from resnet_fast.inference.export import to_onnx

        return to_onnx(self._plain, self._example, Path(folder) / "model.onnx")

    def _onnxruntime(self) -> Callable[[Tensor], Any] | None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ImportError("onnxruntime is not installed")
        if self._name != "float32":
            return None  # its CPU convs have no bfloat16
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._job.threads, 1
        with tempfile.TemporaryDirectory() as folder:
            path = str(self._onnx(folder))
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    def _openvino(self) -> Callable[[Tensor], Any]:
        if importlib.util.find_spec("openvino") is None:
            raise ImportError("openvino is not installed")
        import openvino as ov

        core = ov.Core()
        with tempfile.TemporaryDirectory() as folder:
            network = core.read_model(str(self._onnx(folder)))
        network.reshape(list(self._example.shape))
        precision = {"float32": "f32", "bfloat16": "bf16"}[self._name]
        settings = {
            "INFERENCE_NUM_THREADS": self._job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


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


def _check(name: str, got: Any, expected: Tensor, dtype: str) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name} {dtype}: differs from eager by {float(error):.1e}, not timed")


def _cells(job: Job) -> list[tuple[str, int, str]]:
    models = ("resnet18",) if job.quick else job.networks
    sizes = (1, 2) if job.quick else job.batches
    return [(m, n, d) for d in job.dtypes for m in models for n in sizes]


def _lively(model: nn.Module) -> nn.Module:
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
        progress(done, len(cells), f"{name} batch {batch} {dtype}: building")
        with torch.no_grad(), rf.use_backend("reference"):
            base, source = plain_resnet(name)
            size = 64 if job.quick else 224
            images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
            rivals = Rivals(_lively(base).eval(), dtype, job, images)
            expected = base(images)
            calls, memory = {}, {}
            for rival, run in rivals.runs().items():
                progress(done, len(cells), f"{name} batch {batch} {dtype}: {rival}")
                x = rivals.input(rival, images)
                _check(rival, run(x), expected, dtype)
                calls[rival] = lambda run=run, x=x: run(x)
                memory[rival] = rise_of_memory(calls[rival])
            limits = {"budget": 1.0, "min_rounds": 2} if job.quick else {"budget": 30.0}
            timings = measure(calls, max_rounds=60, **limits)
        for rival in calls:
            row = {"name": name, "shape": list(images.shape), "dtype": dtype, "source": source}
            emit(row | _row(rival, batch, timings, memory[rival]))
        del rivals, calls
    progress(len(cells), len(cells), "inference")


def _row(rival: str, batch: int, timings: Timings, memory: int | None) -> dict[str, Any]:
    provider, _, layout = rival.partition(" ")
    times = timings.seconds[rival]
    p50 = quantile(times, 0.5)
    row: dict[str, Any] = {"kind": "inference", "mode": "eval", "rounds": timings.rounds}
    row |= {"provider": provider, "layout": layout, "p50": p50, "p95": quantile(times, 0.95)}
    row |= {"images_s": batch / p50, "memory_bytes": memory}
    if provider == "ours":
        others = {name: timings.ratio(name, rival) for name in timings.seconds if name != rival}
        best = min(others, key=others.__getitem__)
        row |= {"ratio_vs_best": others[best], "best_rival": best}
        row["ratio_vs_eager"] = min(
            ratio for name, ratio in others.items() if name.startswith("eager")
        )
    return row
