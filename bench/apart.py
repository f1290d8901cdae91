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
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
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


@contextmanager
def rival(job: Job, dtype: str, name: str) -> Generator[Callable[[], float], None, None]:
    """A rival's process, as a function that takes one training step there and returns its loss.

    The function raises RuntimeError where the process has stopped.
    """
    command = [sys.executable, "-m", "bench.apart", json.dumps(asdict(job)), dtype, name]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    to, answers = process.stdin, process.stdout

    def step() -> float:
        try:
            print(file=to, flush=True)
            return float(answers.readline())
        except (OSError, ValueError):
            code = process.wait()
            raise RuntimeError(f"the process of {name} stopped with code {code}") from None

    try:
        yield step
    finally:
        process.kill()
        process.communicate()


def run_apart(job: Job, emit: Emit, progress: Progress) -> None:
    """Time a training step of every rival, in turn, and emit a row each."""
    for index, dtype in enumerate(job.dtypes):
        with ExitStack() as stack:
            steps = {name: stack.enter_context(rival(job, dtype, name)) for name in RIVALS}
            progress(2 * index, 2 * len(job.dtypes), f"first steps {dtype}")
            losses = {name: step() for name, step in steps.items()}
            for name, loss in losses.items():
                check_loss(f"{name} {dtype}", loss, losses["eager nchw"], dtype)
            progress(2 * index + 1, 2 * len(job.dtypes), f"training step {dtype}: in turn")
            limits = {"budget": 1.0, "min_rounds": 2} if job.quick else {"budget": 120.0}
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
