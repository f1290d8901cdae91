# SPDX-License-Identifier: BSD-3-Clause
"""What a user gains over PyTorch as it comes: ours tuned against eager with the default malloc.

Allocator settings hold for a whole process, so each rival has one, ``python -m bench.apart JOB
DTYPE RIVAL``: it takes a training step for every line that it is sent and answers with the loss.
The processes wait while another works, so that rounds are paired as within one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

import resnet_fast as rf

from .job import Emit, Job, Progress, job_of
from .models import batch_of, check_loss, on_reference, plain_resnet, step_row, trainer_of
from .rows import ROOT
from .timing import Timings, measure

# Rival -> the allocator of its process.
RIVALS = {
    "eager nchw": "default",
    "eager channels_last": "default",
    "ours channels_last": "tuned",
}
OURS = "ours channels_last"


class Rival:
    """A rival's process; a context that ends it."""

    def __init__(self, job: Job, dtype: str, name: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "bench.apart", json.dumps(asdict(job)), dtype, name]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        """One training step; returns its loss. RuntimeError where the process has stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(file=self._process.stdin, flush=True)
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            code = self._process.wait()
            raise RuntimeError(f"the process of {self.name} stopped with code {code}") from None

    def __enter__(self) -> Rival:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


def run_apart(job: Job, emit: Emit, progress: Progress) -> None:
    """Time a training step of every rival, in turn, and emit a row each."""
    for index, dtype in enumerate(job.dtypes):
        with ExitStack() as stack:
            rivals = [stack.enter_context(Rival(job, dtype, name)) for name in RIVALS]
            progress(2 * index, 2 * len(job.dtypes), f"first steps {dtype}")
            losses = {rival.name: rival.step() for rival in rivals}
            for name, loss in losses.items():
                check_loss(f"{name} {dtype}", loss, losses["eager nchw"], dtype)
            progress(2 * index + 1, 2 * len(job.dtypes), f"training step {dtype}: in turn")
            limits = {"budget": 1.0, "min_rounds": 2} if job.quick else {"budget": 120.0}
            steps = {rival.name: rival.step for rival in rivals}
            timings = measure(steps, warmup=0, settle=1, max_rounds=25, **limits)  # type: ignore[arg-type]
        for row in _rows(job, dtype, timings):
            emit(row)
    progress(1, 1, "apart")


def _rows(job: Job, dtype: str, timings: Timings) -> list[dict[str, Any]]:
    rows = []
    for name, allocator in RIVALS.items():
        provider, _, layout = name.partition(" ")
        row = step_row(job, batch_of(job)[0], provider, layout, dtype)
        row |= {"kind": "apart", "allocator": allocator, "rounds": timings.rounds}
        row |= timings.quantiles(name)._asdict()
        if name == OURS:
            row["ratio_vs_eager"] = timings.ratio("eager channels_last", name)
            row["ratio_vs_eager_nchw"] = timings.ratio("eager nchw", name)
        rows.append(row)
    return rows


def main(text: str, dtype: str, name: str) -> int:
    """A rival's process."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = job_of(text)
    if RIVALS[name] == "tuned" and not rf.tune_cpu_memory():
        raise SystemExit("rf.tune_cpu_memory() has no effect on this system")
    torch.set_num_threads(job.threads)
    base, source = plain_resnet("resnet18" if job.quick else "resnet50")
    step = trainer_of(name, base, dtype, *batch_of(job)).step
    if name != OURS:
        step = on_reference(step, source == "resnet_fast")
    for _ in sys.stdin:
        print(step(), file=channel)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
