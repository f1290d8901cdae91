# SPDX-License-Identifier: BSD-3-Clause
"""The command line: commands, exit codes, and errors as one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fast as rf
from resnet_fast import cli, env


def run(*arguments: str) -> int:
    return cli.main(arguments)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, which must not be a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.startswith("resnet_fast ")
    assert err.count("\n") == 1
    return err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fast", "env"], capture_output=True, text=True, check=True
    )
    assert rf.__version__ in done.stdout


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["bench"], ["explain"], ["env"]):
        with pytest.raises(SystemExit) as stop:
            run(*command, "--help")
        assert stop.value.code == 0
        assert "usage: python -m resnet_fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("bench", "--threads", "0"), ("demo", "--epochs", "many"), ("explain",)],
)
def test_wrong_usage_exits_with_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_env_prints_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    out = capsys.readouterr().out
    for name, value in env.report().items():
        assert name in out
        assert value.splitlines()[0] in out


def test_env_prints_without_the_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "_why_unavailable", "somebody removed it")
    monkeypatch.setattr(env, "_build_info", None)
    assert run("env") == 0
    assert "somebody removed it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_explain_one_of_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", name, "--size", "32") == 0
    assert "layer1.0" in capsys.readouterr().out


def test_explain_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    from resnet_fast.demo.vision import import_torchvision

    if import_torchvision() is None:
        pytest.skip("torchvision is not installed")
    assert run("explain", "torchvision:resnet18", "--size", "32", "--train", "--batch", "2") == 0
    assert "layer1.0" in capsys.readouterr().out
    assert run("explain", "torchvision:vgg16") == 1
    assert "vgg16" in error_of(capsys)


def test_explain_names_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "resnet51") == 1
    message = error_of(capsys)
    assert "resnet51" in message
    assert "resnet50" in message
    assert run("explain", "keras:resnet50") == 1
    assert "torchvision" in error_of(capsys)


def test_explain_of_too_small_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    # One value a channel: PyTorch's batch norm refuses it in training.
    assert run("explain", "resnet18", "--size", "32", "--train") == 1
    assert "(1, 3, 32, 32)" in error_of(capsys)


def test_a_missing_library_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert run("demo") == 1
    message = error_of(capsys)
    assert "rich" in message
    assert "resnet_fast[bench]" in message


def test_bench_outside_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "resnet_fast" / "cli.py"))
    assert run("bench", "--show") == 1
    assert "checkout" in error_of(capsys)


def test_an_interruption_is_not_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "report", interrupted)
    assert run("env") == 130
    assert "interrupted" in error_of(capsys)
