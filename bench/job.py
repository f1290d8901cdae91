# SPDX-License-Identifier: BSD-3-Clause
"""What one worker process is asked to measure, and the parts that every benchmark shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Emit = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int, str], None]
MEMORY_FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
# Two right implementations differ by rounding, a wrong one by far more. What shows most is elements
# that rounding puts on the other side of the ReLU, with their whole gradient: in float32 a few in
# ten million (5e-4 in norm); in bfloat16, to which eager rounds between its ops, 0.2 % (0.05), and
# in float16, which rounds eight times finer, an eighth of them (0.05 / sqrt(8)).
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.04}


@dataclass(frozen=True)
class Job:
    """One process of work.

    ``sections`` is a subset of ("ops", "models", "memory", "inference", "overhead", "uses",
    "apart"); ``dtypes`` are names of torch dtypes; ``allocator`` is "default" or "tuned"; ``batch``
    is the number of images.
    """

    sections: tuple[str, ...]
    dtypes: tuple[str, ...]
    allocator: str
    batch: int = 16
    threads: int = 2
    compile: bool = True
    quick: bool = False
    networks: tuple[str, ...] = ("resnet18", "resnet50", "resnet101")
    batches: tuple[int, ...] = (1, 16, 64)


def job_of(text: str) -> Job:
    """The Job that ``json.dumps(asdict(job))`` was made of."""
    fields = json.loads(text)
    return Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def check_equal(
    what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Rivals must do the same work: RuntimeError where a tensor's relative error is too large.

    dtype: of the activations, whose rounding every result carries, float32 gradients included.
    """
    for name, reference in expected.items():
        right = reference.double()
        error = (got[name].double() - right).norm() / right.norm().clamp_min(1e-30)
        # "not <=" so that a NaN fails too.
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{what}: {name} differs from eager by {float(error):.1e}, not timed"
            )
