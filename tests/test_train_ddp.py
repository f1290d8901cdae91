# SPDX-License-Identifier: BSD-3-Clause
"""examples/train_ddp.py under torchrun: a process killed, and the run gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 9, 3


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0", "--no-python", sys.executable]
    command += [str(ROOT / "examples" / "train_ddp.py"), "--out", str(out), "--size", "16"]
    command += ["--steps", str(STEPS), "--every", str(EVERY), "--batch", "16", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(out: Path, *options: str) -> str:
    process = start(out, *options)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


def worker_of(launcher: int) -> int:
    """The process id of one of the processes that torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    assert len(children) == 2
    return int(children[1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="local", marks=pytest.mark.slow),
        pytest.param(("--sync-bn",), id="synchronised"),
    ],
)
def test_killed_and_resumed(options: tuple[str, ...], tmp_path: Path) -> None:
    """One worker is killed after the first checkpoint; the rerun ends at the same weights."""
    whole = finish(tmp_path / "whole", *options)
    assert "starting at step 0" in whole

    process = start(tmp_path / "killed", *options)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(f"step {EVERY + 1}/"):
                os.kill(worker_of(process.pid), signal.SIGKILL)
                break
        process.stdout.read()
        assert process.wait(timeout=60) != 0
    finally:
        if process.poll() is None:
            process.kill()
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert step in range(EVERY, STEPS, EVERY)

    resumed = finish(tmp_path / "killed", *options)
    assert f"resuming at step {step}" in resumed
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert a["step"] == b["step"] == STEPS
    assert list(a["model"]) == list(b["model"])
    for name, t in a["model"].items():
        assert torch.equal(b["model"][name], t), name


@pytest.mark.slow
def test_pictures_from_a_folder(tmp_path: Path) -> None:
    from resnet_fast.demo.images import shipped_photos

    for i, (name, picture) in enumerate(shipped_photos()[:4]):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").resize((40, 32)).save(folder / f"{name}.png")
    options = ("--images", str(tmp_path / "photos"), "--batch", "4", "--steps", "2")
    text = finish(tmp_path / "out", *options)
    assert "step 2/2 loss" in text
