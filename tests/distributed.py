# SPDX-License-Identifier: BSD-3-Clause
"""Two processes over gloo: start them, run a function in each, bring back what they return."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """function(rank, *args) in two fresh processes of one gloo group; their results by rank.

    function: of the top level of an importable module. Raises what a process raised.
    """
    mp.spawn(_process, (function, str(folder), list(sys.path), args), nprocs=WORLD, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _process(rank: int, function: Any, folder: str, path: list[str], args: Any) -> None:
    torch.set_num_threads(1)
    sys.path[:] = path
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD
    )
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
