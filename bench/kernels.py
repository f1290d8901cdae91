# SPDX-License-Identifier: BSD-3-Clause
"""The op benchmark: forward + backward of each op over ResNet-50's layer shapes.

Rivals: ``eager`` as torchvision writes it (F.batch_norm, add in place, ReLU in place), ``compile``
(torch.compile of the same, channels_last only), ``ours``. All start from the same tensors, compute
the gradients of x, residual, weight and bias by torch.autograd.grad (nothing is accumulated), and
free everything inside the timed call, as a training step does. Inputs are in ``dtype``; weight,
bias and statistics are float32, as under autocast.

``share_of_copy`` is the op's least bytes (layers.bytes_moved) a second, as a share of the speed of
a large copy. Tensors that fit the last-level cache can exceed 100 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf

from .job import MEMORY_FORMATS, Emit, Job, Progress, check_equal
from .layers import Layer, add_relu_layers, bytes_moved, resnet50_layers
from .timing import Timings, measure, quantile

COPY_BYTES = 128 << 20
Forward = Callable[..., Tensor]


def _eager(op: str) -> Forward:
    """(x, residual, weight, bias, running_mean, running_var) -> y, as torchvision does it."""
    if op == "add_relu":
        return lambda x, r, w, b, mean, var: F.relu(x + r, inplace=True)
    if op == "gated_add_relu":  # timm: the product by the attention module, the rest by the block
        return lambda x, r, w, b, mean, var: F.relu((x * w).add_(r), inplace=True)

    def forward(
        x: Tensor, r: Tensor | None, w: Tensor, b: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor:
        y = F.batch_norm(x, mean, var, w, b, training=True)
        if r is not None:
            y += r
        return y if op == "bn" else F.relu(y, inplace=True)

    return forward


def _ours(op: str) -> Forward:
    if op == "add_relu":
        return lambda x, r, w, b, mean, var: rf.functional.add_relu(x, r)
    if op == "gated_add_relu":
        return lambda x, r, w, b, mean, var: rf.functional.add_relu(x, r, scale=w)
    activation = None if op == "bn" else "relu"
    return lambda x, r, w, b, mean, var: rf.functional.batch_norm_act(
        x, w, b, mean, var, residual=r, training=True, activation=activation
    )


class Case:
    """One layer's tensors, and its rivals as calls without arguments."""

    def __init__(self, layer: Layer, dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        fmt: Any = MEMORY_FORMATS[layout]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def image() -> Tensor:
            return random(*layer.shape).to(dtype=dtype, memory_format=fmt)

        channels = layer.shape[1]
        self.op = layer.op
        self.x = image().requires_grad_()
        self.residual = image().requires_grad_() if "add" in layer.op else None
        self.grad = image()
        self.weight = (random(channels) * 0.2 + 1).requires_grad_()
        self.bias = (random(channels) * 0.2).requires_grad_()
        self.wanted = {"x": self.x, "residual": self.residual}
        if layer.op == "gated_add_relu":
            gate = random(layer.shape[0], channels, 1, 1).sigmoid().to(dtype)
            self.weight = gate.requires_grad_()
            self.wanted |= {"weight": self.weight}
        elif layer.op != "add_relu":
            self.wanted |= {"weight": self.weight, "bias": self.bias}
        self.wanted = {name: t for name, t in self.wanted.items() if t is not None}

    def results(self, forward: Forward) -> dict[str, Tensor]:
        """Output, gradients and running statistics of one call, to compare rivals."""
        mean, var = torch.zeros_like(self.bias), torch.ones_like(self.bias)
        y = forward(self.x, self.residual, self.weight, self.bias, mean, var)
        grads = torch.autograd.grad(y, tuple(self.wanted.values()), self.grad)
        named = {f"gradient of {name}": g for name, g in zip(self.wanted, grads, strict=True)}
        out = {"output": y.detach(), **named}
        return {**out, "mean": mean, "variance": var} if "bn" in self.op else out

    def call(self, forward: Forward) -> Callable[[], None]:
        mean, var = torch.zeros_like(self.bias), torch.ones_like(self.bias)
        wanted = tuple(self.wanted.values())

        def step() -> None:
            y = forward(self.x, self.residual, self.weight, self.bias, mean, var)
            torch.autograd.grad(y, wanted, self.grad)

        return step


def rivals_of(case: Case, what: str, with_compile: bool) -> dict[str, Forward]:
    """Rival name -> forward, after all were seen to compute what eager does."""
    forwards = {"eager": _eager(case.op), "ours": _ours(case.op)}
    if with_compile:
        # One static graph a shape is the compiler's best case; the reset keeps earlier shapes from
        # counting towards its recompilation limit, after which it would silently run eager.
        torch._dynamo.reset()
        forwards["compile"] = torch.compile(_eager(case.op), dynamic=False, fullgraph=True)
    expected = case.results(forwards["eager"])
    for name in [name for name in forwards if name != "eager"]:
        check_equal(f"{name} {what}", case.results(forwards[name]), expected, case.x.dtype)
    return forwards


class CopyMeter:
    """The machine's copy speed, between two held buffers too large for any cache.

    Sampled right before and after each measurement that refers to it, because on a shared machine
    the speed changes from minute to minute.
    """

    def __init__(self, quick: bool) -> None:
        self.count = (COPY_BYTES >> (4 if quick else 0)) // 4
        self.bytes = 2 * 4 * self.count  # read and written
        self._source, self._target = torch.ones(self.count), torch.zeros(self.count)
        self.seconds: list[float] = []

    def sample(self) -> list[float]:
        """Seconds of four copies, after one that is not counted."""
        calls = {"copy": lambda: self._target.copy_(self._source)}
        found: list[float] = measure(calls, max_rounds=4, warmup=1).seconds["copy"]
        self.seconds += found
        return found

    def row(self) -> dict[str, Any]:
        """All samples of this process as one result row."""
        p20, p50, p80 = Timings({"copy": self.seconds}).quantiles("copy")
        return {
            "kind": "copy",
            "name": "copy",
            "shape": [self.count],
            "dtype": "float32",
            "layout": "",
            "provider": "eager",
            "mode": "",
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "rounds": len(self.seconds),
            "bytes": self.bytes,
            "bytes_per_second": self.bytes / p50,
        }


def ratios(timings: Timings, provider: str) -> dict[str, float]:
    """``ratio_vs_<base>`` for every other rival that was measured."""
    bases = [name for name in ("eager", "compile") if name in timings.seconds and name != provider]
    return {f"ratio_vs_{base}": timings.ratio(base, provider) for base in bases}


def layer_rows(layer: Layer, dtype: torch.dtype, timings: Timings, bandwidth: float) -> list[Any]:
    """A row a rival; bandwidth: bytes a second of a large copy."""
    rows = []
    for provider in timings.seconds:
        p20, p50, p80 = timings.quantiles(provider)
        row = {
            "kind": "op",
            "name": layer.op,
            "shape": list(layer.shape),
            "count": layer.count,
            "provider": provider,
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "rounds": timings.rounds,
            **ratios(timings, provider),
        }
        if provider != "compile":  # what a generated kernel moves is the compiler's business
            row["bytes"] = bytes_moved(layer.op, layer.numel, dtype.itemsize, provider)
            row["share_of_copy"] = row["bytes"] / p50 / bandwidth
        rows.append(row)
    return rows


# (name of the total, the ops it sums)
TOTALS = (
    ("resnet50 all norms", ("bn", "bn_relu", "bn_add_relu")),
    ("resnet50 bn_add_relu", ("bn_add_relu",)),
    ("resnet50 bn_relu", ("bn_relu",)),
    ("resnet50 add_relu", ("add_relu",)),
    ("resnet50 gated_add_relu", ("gated_add_relu",)),
)


def total_rows(rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Sums over the network: each layer's quantile times its count; ratios are of the p50 sums."""
    totals = []
    for name, ops in TOTALS:
        sums: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["name"] in ops:
                of = sums.setdefault(row["provider"], dict.fromkeys(("p20", "p50", "p80"), 0.0))
                for q in of:
                    of[q] += row[q] * row["count"]
        for provider, of in sums.items():
            bases = [b for b in ("eager", "compile") if b in sums and b != provider]
            against = {f"ratio_vs_{base}": sums[base]["p50"] / of["p50"] for base in bases}
            totals.append(
                {"kind": "total", "name": name, "shape": [batch], "provider": provider}
                | of
                | against
            )
    return totals


def run_ops(job: Job, emit: Emit, progress: Progress) -> None:
    """Measure every layer x dtype x layout of ``job`` and emit its rows."""
    copy = CopyMeter(job.quick)
    layers = resnet50_layers(2, 32) if job.quick else resnet50_layers(job.batch)
    joins = add_relu_layers(layers) + add_relu_layers(layers, "gated_add_relu")
    layers = (layers + joins)[:: 4 if job.quick else 1]
    plan = [(dtype, layout) for dtype in job.dtypes for layout in MEMORY_FORMATS]
    done = 0
    for dtype_name, layout in plan:
        dtype: torch.dtype = getattr(torch, dtype_name)
        common = {"dtype": dtype_name, "layout": layout, "mode": "train"}
        rows: list[dict[str, Any]] = []
        for layer in layers:
            what = f"{layer.op} {'x'.join(map(str, layer.shape))} {dtype_name} {layout}"
            progress(done, len(plan) * len(layers), what)
            case = Case(layer, dtype, layout)
            forwards = rivals_of(case, what, job.compile and layout == "channels_last")
            rivals = {name: case.call(forward) for name, forward in forwards.items()}
            limits = (0.05, 2) if job.quick else (0.8, 5)
            copies = copy.sample()
            timings = measure(rivals, budget=limits[0], min_rounds=limits[1], max_rounds=40)
            copies += copy.sample()
            bandwidth = copy.bytes / quantile(copies, 0.5)
            measured = layer_rows(layer, dtype, timings, bandwidth)
            for row in measured:
                emit({**common, **row})
            rows += measured
            done += 1
        for row in total_rows(rows, layers[0].shape[0]):
            emit({**common, **row})
    emit(copy.row())
    progress(done, done, "ops")
