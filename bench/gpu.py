# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bench.gpu {kernels,models,inference,slowest,profile,table,plot}``: on a GPU.

``kernels``, ``models`` and ``inference`` append rows to ``--rows`` (default: results/<card>.jsonl);
``table`` prints what is there, ``plot`` draws it. ``slowest`` runs the ops that stay furthest below
the copy bandwidth once more, for a profiler around it, and ``profile`` makes rows of what ncu wrote
to ``--csv``. ``--device cpu --quick`` is the dry run: tiny shapes, the same code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import gpu_inference, gpu_kernels, gpu_models, gpu_plot, gpu_profile
from .kernels import Case, rivals_of
from .layers import Layer
from .rows import RESULTS, Row, append, context, load, newest

DTYPES = ("bfloat16", "float16", "float32")
COMMANDS = ("kernels", "models", "inference", "slowest", "profile", "table", "plot")


def card_name(device: str) -> str:
    """The card, or "cpu dry run"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu dry run"


def file_stem(card: str) -> str:
    """A card's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.split("\n")[0].strip()


def gpu_context(device: str, quick: bool, commit: str = "") -> Row:
    """The fields that every row shares; commit: in place of what git says, where it is not ""."""
    row = {k: v for k, v in context("torch", quick).items() if k != "threads"}
    if commit:
        row["commit"] = commit
    return {**row, "card": card_name(device), "driver": _driver(), "cuda": torch.version.cuda}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--rows", type=Path, help="JSON lines to append to or to read")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all, roughly")
    parser.add_argument("--commit", default="", help="of this copy, where it has no .git")
    parser.add_argument("--csv", type=Path, help="profile: the log of ncu --csv")
    parser.add_argument("--count", type=int, default=3, help="slowest: how many")
    options = parser.parse_args(arguments)
    reads_rows = options.what in ("table", "plot") and options.rows is not None
    if options.device == "cuda" and not reads_rows and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --quick is a dry run")
    if (options.what == "profile") != (options.csv is not None):
        parser.error("profile needs --csv, and nothing else takes it")
    if options.rows is None:
        options.rows = RESULTS.with_name(f"{file_stem(card_name(options.device))}.jsonl")
    return options


def kernel_options(options: argparse.Namespace) -> dict[str, Any]:
    """gpu_kernels.run's options."""
    quick, cuda = options.quick, options.device == "cuda"
    return {
        "device": options.device,
        "batches": [2] if quick else options.batches,
        "dtypes": options.dtypes,
        "size": 32 if quick else 224,
        "stride": 4 if quick else 1,
        "compile": not options.no_compile,
        "l2": torch.cuda.get_device_properties().L2_cache_size if cuda else 1 << 20,
        "copy_bytes": 8 << 20 if quick else gpu_kernels.COPY_BYTES,
        "seconds": options.seconds,
        "seconds_each": 0.01 if quick else 0.3,
    }


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """gpu_models.run's options."""
    quick = options.quick
    return {
        "device": options.device,
        "model": "resnet18" if quick else "resnet50",
        "batch": 4 if quick else options.batches[0],
        "size": 64 if quick else 224,
        "dtype": "bfloat16",
        "compile": not options.no_compile,
        "seconds": 0.1 if quick else options.seconds / 3,  # the rest goes to warm-up and compiling
    }


def inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """gpu_inference.run's options: batch 1 for its latency, the largest for its rate."""
    quick = options.quick
    batches = (1, 16) if quick else (1, options.batches[0])
    return {
        "device": options.device,
        "model": "resnet18" if quick else "resnet50",
        "size": 64 if quick else 224,
        "cells": [(n, d) for d in options.dtypes if d != "float32" for n in batches],
        "compile": not options.no_compile,
        "seconds": options.seconds,
        "seconds_each": 0.05 if quick else 2.0,
    }


def slowest(rows: list[Row], count: int) -> list[Row]:
    """Our ops with the smallest share of the copy bandwidth."""
    ours = [r for r in newest(rows) if r["kind"] == "op" and r["provider"] == "ours"]
    return sorted(ours, key=lambda row: row["share_of_copy"])[:count]


def run_once(row: Row, device: str) -> None:
    """One forward and backward of a row's op, for a profiler."""
    layer = Layer(row["name"], tuple(row["shape"]), row["count"])
    case = Case(layer, getattr(torch, row["dtype"]), row["layout"], device)
    step = case.call(rivals_of(case, "profiled", False)["ours"])
    if device == "cpu":
        step()
        return
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        step()
        torch.cuda.synchronize()


def table(rows: list[Row]) -> list[str]:
    """Lines: every op and model row, with its time and its share of the copy bandwidth."""
    lines = [f"{'what':44} {'dtype':18} {'layout':14} {'rival':8} {'ms p50':>9} {'of copy':>8}"]
    for row in newest(rows):
        what = f"{row['name']} {'x'.join(map(str, row['shape']))}"
        what += ", graph" * (row["kind"] == "inference" and row["graph"])
        head = f"{what:44} {row['dtype']:18} {row['layout']:14} {row['provider']:8}"
        if row["kind"] == "failed":
            lines.append(f"{head} failed: {row['error']}")
        elif row["kind"] == "profile":
            lines.append(f"{head} {row['seconds'] * 1e3:9.3f} {row['dram']:8.0%} of DRAM's peak")
        elif "p50" in row:
            share = f"{row['share_of_copy']:8.0%}" if "share_of_copy" in row else " " * 8
            lines.append(f"{head} {row['p50'] * 1e3:9.3f} {share}")
    return lines


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    options = parse(arguments)
    if options.what in ("kernels", "models", "inference", "profile"):
        common = gpu_context(options.device, options.quick, options.commit)

        def emit(row: Row) -> None:
            append(options.rows, {**common, **row})

        def say(text: str) -> None:
            print(text, flush=True)

        if options.what == "profile":
            for row in gpu_profile.rows_of(options.csv.read_text(encoding="utf-8")):
                emit(row)
        elif options.what == "models":
            gpu_models.run(model_options(options), emit, say)
        elif options.what == "inference":
            if left := gpu_inference.run(inference_options(options), emit, say):
                print(f"{left} cells were left out: the time was up")
        elif left := gpu_kernels.run(kernel_options(options), emit, say):
            print(f"{left} cases were left out: the time was up")
        return 0
    rows = load(options.rows) if options.rows.exists() else []
    if not rows:
        print(f"no rows in {options.rows}")
        return 1
    if options.what == "table":
        print("\n".join(table(rows)))
    elif options.what == "plot":
        print(gpu_plot.draw(newest(rows), options.rows.with_suffix(".png")) or "no plot was drawn")
    else:
        for row in slowest(rows, options.count):
            print(row["name"], row["shape"], row["dtype"], f"{row['share_of_copy']:.0%} of copy")
            run_once(row, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
