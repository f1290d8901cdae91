# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark whose rivals each have a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_fast import cli

pytest.importorskip("rich")

apart = cli.load_bench("apart")
job = cli.load_bench("job")
rows = cli.load_bench("rows")


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    options = ["--apart", "--quick", "--threads", "1", "--dtype", "float32", "--results", str(path)]
    assert cli.main(["bench", *options]) == 0
    found = rows.load(path)
    assert [(row["provider"], row["layout"], row["allocator"]) for row in found] == [
        ("eager", "nchw", "default"),
        ("eager", "channels_last", "default"),
        ("ours", "channels_last", "tuned"),
    ]
    for row in found:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    assert found[-1]["ratio_vs_eager"] > 0
    assert found[-1]["ratio_vs_eager_nchw"] > 0
    assert "eager without" in capsys.readouterr().out


def test_a_rival_whose_process_stops_is_named() -> None:
    options = job.Job(("apart",), ("float32",), "default", quick=True)
    with (
        apart.rival(options, "float32", "nobody nchw") as step,
        pytest.raises(RuntimeError, match="the process of nobody nchw stopped with code 1"),
    ):
        step()
