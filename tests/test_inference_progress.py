# SPDX-License-Identifier: BSD-3-Clause
"""What optimize_for_inference says while it loads."""

from __future__ import annotations

import io
import logging
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import module, progress

X = torch.zeros(1, 3, 8, 8)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()


def loaded(monkeypatch: pytest.MonkeyPatch, stream: Any, model: nn.Module, **options: Any) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        rf.optimize_for_inference(model, X, **options)
    return str(stream.getvalue())


def test_a_function_is_told_every_step(model: nn.Module) -> None:
    steps: list[tuple[int, int, str]] = []
    fast = rf.optimize_for_inference(model, X, progress=lambda *step: steps.append(step))
    assert [what for _, _, what in steps] == [
        "tracing with torch.export",
        "folding and packing 0",
        "folding and packing 2",
        "ready",
    ]
    assert [done for done, _, _ in steps] == sorted({done for done, _, _ in steps})
    assert steps[0][0] == 0
    assert {total for _, total, _ in steps} == {steps[-1][0]}
    steps.clear()
    fast.refresh(model)
    assert steps[-1][2] == "ready"


def test_true_writes_lines_and_false_none(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = loaded(monkeypatch, io.StringIO(), model, progress=True).splitlines()
    assert lines[0] == "optimize_for_inference:   0 % tracing with torch.export"
    assert "loaded in" in lines[-1]
    assert len(lines) == 5
    monkeypatch.setattr(progress, "AFTER", 0.0)
    assert loaded(monkeypatch, Terminal(), model, progress=False) == ""


def test_a_terminal_hears_only_of_what_takes_long(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = module.capture

    def slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return traced(*args)

    monkeypatch.setattr(progress, "AFTER", 60.0)
    assert loaded(monkeypatch, Terminal(), model) == ""
    monkeypatch.setattr(progress, "AFTER", 0.05)
    monkeypatch.setattr(module, "capture", slowly)
    said = loaded(monkeypatch, Terminal(), model)
    assert said.startswith("\r\033[Koptimize_for_inference:   0 % tracing with torch.export")
    assert said.endswith(" s\n")
    assert loaded(monkeypatch, io.StringIO(), model) == "", "stderr is no terminal"


def test_the_logger_is_told_how_long_it_took(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "resnet_fast"):
        rf.optimize_for_inference(model, X)
    assert any("loaded in" in record.getMessage() for record in caplog.records)


def test_a_model_that_runs_whole_is_ready_too() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    steps: list[str] = []
    rf.optimize_for_inference(Branch(), X, progress=lambda *step: steps.append(step[2]))
    assert steps == ["tracing with torch.export", "ready"]


def test_what_the_function_raises_is_raised(model: nn.Module) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rf.optimize_for_inference(model, X, progress=stop)


def test_another_progress_is_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="progress must be"):
        rf.optimize_for_inference(model, X, progress="yes")  # type: ignore[arg-type]
