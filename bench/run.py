# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnet_fast bench``: one worker per allocator setting, rows kept, tables printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from resnet_fast.cli import UserError

from . import comparison, plot
from .job import Job
from .rows import RESULTS, ROOT, Row, append, load, newest

SECTIONS = ("ops", "models", "memory")
ALONE = ("inference", "overhead", "uses", "apart")  # only when named
ALLOCATORS = ("default", "tuned")


def jobs_of(options: Namespace) -> list[Job]:
    """One job per section and allocator setting; without any section named, the three of --all."""
    wanted = [name for name in (*SECTIONS, *ALONE) if getattr(options, name)]
    if options.all or not wanted:
        wanted = list(SECTIONS)
    if options.dtype == "int8" and wanted != ["inference"]:
        raise UserError("--dtype int8 is a dtype of --inference alone")
    dtypes: tuple[str, ...] = (options.dtype,)
    if options.dtype == "all":
        dtypes = ("float32", "bfloat16", "int8")
    allocators = ALLOCATORS if options.allocator == "both" else (options.allocator,)
    return [
        Job(
            sections=(section,),
            dtypes=tuple(d for d in dtypes if d != "int8" or section == "inference"),
            allocator=allocator,
            batch=options.batch,
            threads=options.threads,
            compile=options.compile,
            quick=options.quick,
            networks=tuple(options.networks),
            batches=tuple(options.batches),
        )
        for section in wanted
        # What is saved for backward does not depend on the allocator, nor do small tensors;
        # inference sets none.
        for allocator in (allocators[:1] if section in ("memory", *ALONE) else allocators)
    ]


def _environment(cache: Path) -> dict[str, str]:
    """The caller's environment without malloc settings: "default" must mean default.

    cache: where torch.compile keeps what it compiled. One folder a run: the allocator settings
    share their kernels, and what an interrupted compilation left behind is never met again.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    kept["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return kept


def last_words(errors: str) -> str:
    """The error in a process's standard error: its last "SomeError: ...", else its last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or lines or ["no message"])[-1]


def _messages(job: Job, cache: Path) -> Iterator[dict[str, Any]]:
    """What the worker of ``job`` sends; UserError with its last words where it fails."""
    command = [sys.executable, "-m", "bench.worker", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(cache),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            code = process.wait()
        if code != 0:
            errors.seek(0)
            reason = last_words(errors.read())
            raise UserError(f"the benchmark process stopped with code {code}: {reason}")


def measure(jobs: list[Job], keep: Callable[[Row], None], console: Console) -> list[str]:
    """Run the jobs one after the other, hand each row to ``keep``; returns remarks to print."""
    remarks: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as cache, Progress(*columns, console=console) as bar:
        for job in jobs:
            title = f"{job.sections[0]} ({job.allocator} allocator)"
            task = bar.add_task(title, total=None)
            for message in _messages(job, Path(cache)):
                if "row" in message:
                    keep(message["row"])
                elif "progress" in message:
                    done, total, what = message["progress"]
                    bar.update(task, completed=done, total=total, description=f"{title}: {what}")
                else:
                    remarks.append(f"{title} left out: {message['unavailable']}")
            bar.update(task, completed=1, total=1, description=title)
    return remarks


def stored_rows(path: Path) -> list[Row]:
    """Newest row per key of ``path``; UserError where there is no such file or it is not rows."""
    try:
        return newest(load(path))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: run `python -m resnet_fast bench` first, or name another "
            "file with --results"
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def main(options: Namespace) -> int:
    """Measure and print, or with ``options.show`` print what is stored; returns the exit code."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    path: Path | None = options.results or (None if options.quick else RESULTS)
    if options.show:
        rows = stored_rows(path or RESULTS)
    else:
        rows = []

        def keep(row: Row) -> None:
            rows.append(row)
            if path is not None:
                append(path, row)

        for remark in measure(jobs_of(options), keep, console):
            console.print(remark)
    comparison.print_tables(rows, console, layers=options.layers)
    if options.show:
        return 0
    if path is None:
        console.print("quick run: rows are only kept with --results FILE")
        return 0
    console.print(f"rows appended to {path}")
    picture = plot.draw(newest(load(path)), path.with_suffix(".png"))
    console.print(f"plot written to {picture}" if picture else "no plot: matplotlib is missing")
    return 0
