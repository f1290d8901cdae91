# SPDX-License-Identifier: BSD-3-Clause
"""One benchmark process: allocator settings hold for a whole process, so each gets its own.

``python -m bench.worker JOB`` with JOB a Job as JSON. Standard output carries one JSON object a
line, ``{"progress": [done, total, what]}``, ``{"row": {...}}`` or ``{"unavailable": "why"}``;
everything else that prints (compilers, warnings) is sent to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

import resnet_fast as rf

from .apart import run_apart
from .inference import run_inference
from .job import job_of
from .kernels import run_ops
from .models import run_memory, run_models
from .overhead import run_overhead
from .rows import context
from .uses import run_uses


def main(text: str) -> int:
    """Run the job, in this process; returns the exit code."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    job = job_of(text)
    if job.allocator == "tuned" and not rf.tune_cpu_memory():
        send({"unavailable": "rf.tune_cpu_memory() has no effect on this system"})
        return 0
    torch.set_num_threads(job.threads)
    common = context(job.allocator, job.quick)

    def emit(row: dict[str, Any]) -> None:
        send({"row": {**common, **row}})

    def progress(done: int, total: int, what: str) -> None:
        send({"progress": [done, total, what]})

    sections = {"ops": run_ops, "memory": run_memory, "models": run_models}
    sections |= {"inference": run_inference, "overhead": run_overhead, "uses": run_uses}
    sections["apart"] = run_apart
    for name in job.sections:
        sections[name](job, emit, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
