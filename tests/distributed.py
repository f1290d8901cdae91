# SPDX-License-Identifier: BSD-3-Clause
"""Two processes over gloo that stay: run a function in each, bring back what they return.

They are started once a session, because starting is what costs: each imports torch anew.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
LIMIT = timedelta(minutes=3)  # for what waits for a process that has failed


@functools.cache
def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(WORLD, mp_context=multiprocessing.get_context("spawn"))


def run(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """function(rank, *args) in two processes of one gloo group; their results by rank.

    function: of the top level of an importable module. Raises what a process raised.
    """
    # Neither ends before both have met, so each gets a process of its own.
    calls = [
        _processes().submit(_process, rank, function, str(folder), args) for rank in range(WORLD)
    ]
    errors = [error for call in calls if (error := call.exception()) is not None]
    if errors:
        raise errors[0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _process(rank: int, function: Any, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD, timeout=LIMIT
    )
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
