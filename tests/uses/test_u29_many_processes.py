# SPDX-License-Identifier: BSD-3-Clause
"""U29: DistributedDataParallel, FSDP2 and SyncBatchNorm: two processes are one on the whole batch.

Two processes over gloo, each with its part of a batch of digits, against one process with all of
it, on the untouched model. (Plain PyTorch has no SyncBatchNorm on the CPU; the truth is one
process.) The workers are in processes.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from distributed import run
from twins import assert_same
from ways import Way

WAY = Way("U29", "many processes")


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """Three steps of the untouched model in one process, on the joined batches."""
    return processes.one_process()


@pytest.mark.parametrize("order", ["convert, accelerate", "accelerate, convert", "ours"])
def test_synchronised_norms(order: str, one: dict[str, Any], tmp_path: Path) -> None:
    """Gradients, statistics and three steps of SGD, with uneven parts of the batch."""
    results = run(processes.synchronised, tmp_path, order)
    for result in results:
        assert not result.pop("slow")
        assert_same(result, one, rtol=1e-7)


def test_synchronised_norms_of_half_precision(tmp_path: Path) -> None:
    """bfloat16: the statistics of two processes agree to the bit, though their batches differ."""
    a, b = run(processes.synchronised_bfloat16, tmp_path)
    assert len(a) > 40
    assert all(torch.equal(a[name], t) for name, t in b.items())


def test_groups_and_empty_batches(tmp_path: Path) -> None:
    """A group of one process, a process with nothing, and a call in eval mode."""
    for result in run(processes.groups, tmp_path):
        for name, (got, want) in result.items():
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)


def test_local_norms_under_ddp(tmp_path: Path) -> None:
    """Without SyncBatchNorm: the accelerated model does what the untouched one does."""
    for fast, plain in run(processes.local_norms, tmp_path):
        assert_same(fast, plain, rtol=1e-7)


def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP2: the same losses, gradients and full parameters as the untouched model."""
    for fast, plain in run(processes.fully_sharded, tmp_path):
        assert_same(fast, plain, rtol=1e-7)
