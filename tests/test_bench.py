# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark: its timing core on fake clocks, its arithmetic, and a quick run end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import cli

pytest.importorskip("rich")

timing = cli.load_bench("timing")
layers = cli.load_bench("layers")
rows = cli.load_bench("rows")
job = cli.load_bench("job")
kernels = cli.load_bench("kernels")
models = cli.load_bench("models")
overhead = cli.load_bench("overhead")
uses = cli.load_bench("uses")
comparison = cli.load_bench("comparison")
inference = cli.load_bench("inference")
plot = cli.load_bench("plot")
run = cli.load_bench("run")


class FakeClock:
    """Time that passes only when a rival works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def rival(self, name: str, *seconds: float) -> Callable[[], None]:
        remaining = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return work


# ---- timing core ---------------------------------------------------------------------------------
def test_rivals_run_in_turn() -> None:
    clock = FakeClock()
    rivals = {"a": clock.rival("a", 1.0), "b": clock.rival("b", 2.0)}
    timings = timing.measure(rivals, budget=8.0, min_rounds=1, warmup=1, clock=clock)
    assert clock.calls == ["a", "b"] * 4  # one warm-up, then rounds of 3 s until 8 s are spent
    assert timings.seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert timings.rounds == 3


def test_bounds_on_the_rounds_outrank_the_budget() -> None:
    clock = FakeClock()
    few = timing.measure({"a": clock.rival("a", 9.0)}, budget=1.0, min_rounds=4, clock=clock)
    many = timing.measure({"a": clock.rival("a", 0.1)}, budget=100.0, max_rounds=7, clock=clock)
    assert (few.rounds, many.rounds) == (4, 7)


def test_ratio_pairs_the_rounds() -> None:
    # The machine is slow in the second round, for both; one round is disturbed for one of them.
    timings = timing.Timings({"eager": [2.0, 20.0, 2.0, 2.0], "ours": [1.0, 10.0, 1.0, 8.0]})
    assert timings.ratio("eager", "ours") == 2.0
    assert timings.ratio("ours", "eager") == 0.5


def test_quantiles() -> None:
    timings = timing.Timings({"a": [5.0, 1.0, 2.0, 4.0, 3.0, 6.0]})
    assert timings.quantiles("a") == timing.Quantiles(2.0, 3.5, 5.0)
    assert timing.quantile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="no values"):
        timing.quantile([], 0.5)


def test_measure_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one rival"):
        timing.measure({})
    with pytest.raises(ValueError, match="min_rounds"):
        timing.measure({"a": int}, min_rounds=5, max_rounds=4)


def test_the_collector_is_back_after_a_failure() -> None:
    import gc

    def fail() -> None:
        assert not gc.isenabled()
        raise OSError("rival failed")

    with pytest.raises(OSError, match="rival failed"):
        timing.measure({"a": fail})
    assert gc.isenabled()


# ---- layers and bytes ----------------------------------------------------------------------------
def test_layers_are_resnet50s() -> None:
    found = layers.resnet50_layers(16)
    assert sum(layer.count for layer in found) == 53
    by_op = {op: sum(x.count for x in found if x.op == op) for op in layers.OPS}
    assert by_op == {"bn": 4, "bn_relu": 33, "bn_add_relu": 16, "add_relu": 0, "gated_add_relu": 0}
    assert found[0] == layers.Layer("bn_relu", (16, 64, 112, 112), 1)
    assert ("bn_add_relu", (16, 2048, 7, 7), 3) in found
    joins = layers.add_relu_layers(found)
    assert [layer.count for layer in joins] == [3, 4, 6, 3]
    gated = layers.add_relu_layers(found, "gated_add_relu")
    assert [layer._replace(op="add_relu") for layer in gated] == joins
    # 11.1 million normalised values an image, as published profiles of ResNet-50 have it.
    assert sum(x.numel * x.count for x in found) / 16 == pytest.approx(11.11e6, rel=0.01)


@pytest.mark.parametrize(
    ("op", "eager", "ours"),
    [
        *(("bn", 32, 32), ("bn_relu", 52, 32), ("bn_add_relu", 64, 40.25)),
        *(("add_relu", 32, 20.25), ("gated_add_relu", 64, 28.25)),
    ],
)
def test_bytes_an_element(op: str, eager: float, ours: float) -> None:
    assert layers.bytes_moved(op, 1000, 4, "eager") == eager * 1000
    assert layers.bytes_moved(op, 1000, 4, "ours") == ours * 1000


# ---- rivals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("op", layers.OPS)
def test_rivals_of_an_op_are_equal(op: str, layout: str, dtype: torch.dtype) -> None:
    case = kernels.Case(layers.Layer(op, (2, 5, 4, 3), 1), dtype, layout)
    assert list(case.wanted) == {
        "add_relu": ["x", "residual"],
        "gated_add_relu": ["x", "residual", "weight"],
        "bn_add_relu": ["x", "residual", "weight", "bias"],
    }.get(op, ["x", "weight", "bias"])
    assert set(kernels.rivals_of(case, op, False)) == {"eager", "ours"}


def test_a_wrong_rival_is_not_timed() -> None:
    right = {"output": torch.ones(4)}
    job.check_equal("ours", right, right, torch.float32)
    for wrong in (torch.ones(4) * 1.01, torch.full((4,), float("nan"))):
        with pytest.raises(RuntimeError, match="output differs"):
            job.check_equal("ours", {"output": wrong}, right, torch.float32)


def test_totals_weigh_layers_by_their_count() -> None:
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    slow = {q: 4 * t for q, t in times.items()}
    measured = [
        {"name": "bn_relu", "count": 3, "provider": "eager", **slow},
        {"name": "bn_relu", "count": 3, "provider": "ours", **times},
        {"name": "bn", "count": 1, "provider": "eager", **times},
        {"name": "bn", "count": 1, "provider": "ours", **times},
    ]
    totals = {(r["name"], r["provider"]): r for r in kernels.total_rows(measured, 16)}
    whole = totals["resnet50 all norms", "ours"]
    assert whole["p50"] == 3 * 2.0 + 2.0
    assert whole["ratio_vs_eager"] == (3 * 8.0 + 2.0) / 8.0
    assert totals["resnet50 bn_relu", "ours"]["ratio_vs_eager"] == 4.0
    assert ("resnet50 bn_add_relu", "ours") not in totals


# ---- memory --------------------------------------------------------------------------------------
def test_saved_bytes_counts_each_storage_once() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)

    def twice() -> torch.Tensor:
        hidden = (x @ weight).exp()  # saves x, weight; its own result
        return (hidden * hidden.view(8, 4).view(4, 8)).sum()  # the same storage twice more

    assert models.saved_bytes(twice, [weight]) == 2 * 4 * 8 * 4
    assert models.saved_bytes(twice, []) == 2 * 4 * 8 * 4 + 8 * 8 * 4


# ---- rows and tables -----------------------------------------------------------------------------
def a_row(**fields: Any) -> dict[str, Any]:
    base = rows.context("default", False) | {
        "kind": "model", "name": "resnet50", "shape": [16, 3, 224, 224], "dtype": "float32",
        "layout": "channels_last", "provider": "eager", "mode": "train", "source": "torchvision",
        "p20": 2.9, "p50": 3.0, "p80": 3.1, "rounds": 5,
    }  # fmt: skip
    return base | fields


def test_newest_row_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    for row in (a_row(p50=4.0), a_row(provider="ours", p50=2.0), a_row(p50=3.0)):
        rows.append(path, row)
    found = rows.newest(rows.load(path))
    assert [(row["provider"], row["p50"]) for row in found] == [("eager", 3.0), ("ours", 2.0)]


def test_a_torn_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "--show", "--results", str(path)]) == 1
    assert "does not exist" in capsys.readouterr().err
    path.write_text(json.dumps(a_row()) + "\n{half")
    assert cli.main(["bench", "--show", "--results", str(path)]) == 1
    assert "rows.jsonl:2" in capsys.readouterr().err


def test_show_prints_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    timed = {"kind": "op", "name": "bn", "shape": [16, 4, 2, 2], "count": 2, "bytes": 2_000_000}
    measured = [
        a_row(), a_row(layout="nchw", p50=4.0), a_row(provider="ours", allocator="tuned", p50=2.0),
        a_row(**timed), a_row(**timed, provider="ours", ratio_vs_eager=1.75, share_of_copy=0.87),
        a_row(kind="total", name="resnet50 all norms", shape=[16]),
        a_row(kind="memory", memory_bytes=2**30),
        a_row(kind="memory", provider="ours", memory_bytes=2**29, ratio_vs_eager=2.0),
        a_row(kind="copy", name="copy", bytes_per_second=1.2e10),
        a_row(kind="apart", p50=4.5),
        a_row(kind="apart", provider="ours", ratio_vs_eager=1.5, ratio_vs_eager_nchw=2.5),
    ]  # fmt: skip
    for row in measured:
        rows.append(path, row)
    assert cli.main(["bench", "--show", "--layers", "--results", str(path)]) == 0
    out = capsys.readouterr().out
    for part in ("12.0 GB/s", "1.75x", "87%", "512 MiB", "4.500 s", "2.50x", "all norms"):
        assert part in out


def test_jobs_of_the_options() -> None:
    def jobs(*arguments: str) -> list[tuple[str, str]]:
        made = run.jobs_of(cli.parser().parse_args(["bench", *arguments]))
        return [(one.sections[0], one.allocator) for one in made]

    everything = [(s, a) for s in ("ops", "models") for a in ("default", "tuned")]
    assert jobs() == jobs("--all") == [*everything, ("memory", "default")]
    assert jobs("--ops", "--allocator", "tuned") == [("ops", "tuned")]
    assert jobs("--inference") == [("inference", "default")]


def test_int8_is_a_dtype_of_inference_alone() -> None:
    def dtypes(*arguments: str) -> list[tuple[str, ...]]:
        made = run.jobs_of(cli.parser().parse_args(["bench", *arguments]))
        return [one.dtypes for one in made]

    assert dtypes("--inference") == [("float32", "bfloat16", "int8")]
    assert dtypes("--inference", "--dtype", "int8") == [("int8",)]
    assert set(dtypes("--ops", "--models")) == {("float32", "bfloat16")}
    with pytest.raises(cli.UserError, match="--inference alone"):
        dtypes("--ops", "--dtype", "int8")


def test_overhead_is_measured_once() -> None:
    made = run.jobs_of(cli.parser().parse_args(["bench", "--overhead"]))
    assert [(one.sections, one.allocator) for one in made] == [(("overhead",), "default")]


def test_default_means_the_default_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "-1")
    assert "MALLOC_TRIM_THRESHOLD_" not in run._environment(tmp_path)


def test_last_words_name_the_error() -> None:
    words = (
        "Traceback\n  File x\ntorch._inductor.exc.InductorError: no compiler\n\nSet FLAGS for more"
    )
    assert run.last_words(words) == "torch._inductor.exc.InductorError: no compiler"
    assert run.last_words("Killed\n") == "Killed"
    assert run.last_words("") == "no message"


# ---- inference ---------------------------------------------------------------------------------
def inference_rows(monkeypatch: pytest.MonkeyPatch, *dtypes: str) -> list[dict[str, Any]]:
    """Rows of the inference benchmark on a tiny network, two pictures a dtype."""

    def tiny(name: str) -> tuple[torch.nn.Module, str]:
        torch.manual_seed(0)
        nn = torch.nn
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)), "test"

    monkeypatch.setattr(inference, "plain_resnet", tiny)
    monkeypatch.setattr(inference, "_cells", lambda job: [("tiny", 2, d) for d in job.dtypes])
    found: list[dict[str, Any]] = []
    work = job.Job(("inference",), dtypes, "default", threads=1, compile=False, quick=True)
    inference.run_inference(work, found.append, lambda *_: None)
    return found


RIVALS = {"eager nchw", "eager channels_last", "jit channels_last", "compile channels_last",
          "onnxruntime nchw", "openvino nchw", "ours channels_last"}  # fmt: skip


@pytest.mark.slow
def test_every_inference_rival_is_a_row_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inference_rows(monkeypatch, "float32", "bfloat16", "int8")
    for dtype in ("float32", "bfloat16", "int8"):
        of = {f"{r['provider']} {r['layout']}": r for r in found if r["dtype"] == dtype}
        assert set(of) == RIVALS | ({"autocast channels_last"} if dtype == "bfloat16" else set())
        failed = {name: row["error"] for name, row in of.items() if row["kind"] == "failed"}
        assert "--no-compile" in failed.get("compile channels_last", "") or dtype == "int8"
        for name, row in of.items():
            if name not in failed:
                assert 0 < row["p50"] <= row["p95"]
                assert row["images_s"] == 2 / row["p50"]
                assert 0 <= row["difference"] <= inference.TOLERANCE[dtype]
        if dtype == "int8":
            assert "does not quantise" in failed["jit channels_last"]
        else:
            assert of["ours channels_last"]["ratio_vs_eager"] > 0
    assert {(r["name"], r["mode"], tuple(r["shape"])) for r in found} == {
        ("tiny", "eval", (2, 3, 64, 64))
    }


def test_a_missing_or_wrong_inference_rival_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    wrong = torch.zeros(2, 5)
    monkeypatch.setattr(inference.Rivals, "_jit", lambda self: lambda x: wrong)
    found = inference_rows(monkeypatch, "float32")
    failed = {row["provider"]: row["error"] for row in found if row["kind"] == "failed"}
    assert set(failed) == {"compile", "onnxruntime", "openvino", "jit"}
    assert "onnxruntime is not installed" in failed["onnxruntime"]
    assert "differs from eager" in failed["jit"]
    monkeypatch.setattr(inference.Rivals, "_ours", lambda self: lambda x: wrong)
    with pytest.raises(RuntimeError, match="ours channels_last float32: differs"):
        inference_rows(monkeypatch, "float32")


def test_reasons_are_shown_until_the_rival_has_run() -> None:
    failed = a_row(kind="failed", provider="openvino", error="not there", time="2026-01-02")
    (line,) = comparison.left_out_lines([failed], [a_row(provider="openvino", time="2026-01-01")])
    assert line.endswith("openvino channels_last left out: not there")
    assert (
        comparison.left_out_lines([failed], [a_row(provider="openvino", time="2026-01-03")]) == []
    )


def test_a_plot_compares_what_was_measured_together() -> None:
    common = {"kind": "model", "dtype": "float32", "allocator": "default", "layout": "nhwc"}
    found = [
        common | {"provider": provider, "time": time, "p50": p50}
        for provider, time, p50 in (("eager", "2", 3.0), ("compile", "1", 1.0), ("ours", "2", 2.0))
    ]
    assert plot._groups(found, 1.0) == [("float32\ndefault malloc", {"eager": 3.0, "ours": 2.0})]


# ---- end to end ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    options = ["--quick", "--no-compile", "--dtype", "float32", "--allocator", "default",
               "--threads", "1"]  # fmt: skip
    code = cli.main(["bench", "--all", *options, "--results", str(path)])
    assert code == 0
    found = rows.load(path)
    assert {row["kind"] for row in found} == {"copy", "op", "total", "model", "memory"}
    for row in found:
        assert set(rows.KEY) - {"card"} <= set(row)  # a GPU's rows name one
        assert row["quick"]
        assert row["threads"] == 1
        if row["kind"] != "memory":
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if row["provider"] == "ours":
            assert row["ratio_vs_eager"] > 0
    memory = {row["provider"]: row["memory_bytes"] for row in found if row["kind"] == "memory"}
    assert 0 < memory["ours"] < 1.1 * memory["eager"]
    assert "Training step of resnet18" in capsys.readouterr().out
    if plot.draw(found, tmp_path / "plot.png"):
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_quick_run_of_the_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    options = ["--overhead", "--quick", "--threads", "1", "--results", str(path)]
    assert cli.main(["bench", *options]) == 0
    found = rows.load(path)
    assert {row["kind"] for row in found} == {"overhead"}
    assert [(row["mode"], row["provider"], row["shape"]) for row in found] == [
        ("eval", "eager", [1, 3, 32, 32]), ("eval", "ours", [1, 3, 32, 32]),
        ("train", "eager", [2, 3, 32, 32]), ("train", "ours", [2, 3, 32, 32]),
        ("train", "eager", [1, 3, 32, 32]), ("train", "ours", [1, 3, 32, 32]),
        ("accelerate", "ours", []), ("load", "ours", [1, 3, 64, 64]),
        ("trace", "ours", [1, 3, 64, 64]),
    ]  # fmt: skip
    for row in found:
        assert set(rows.KEY) - {"card"} <= set(row)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        timed = row["provider"] == "ours" and row["mode"] in ("eval", "train")
        assert ("ratio_vs_eager" in row) == timed
    out = capsys.readouterr().out
    assert "The cost of the calls" in out
    assert "accelerate" in out


@pytest.mark.slow
def test_quick_run_of_the_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    options = ["--uses", "--quick", "--threads", "1", "--results", str(path)]
    assert cli.main(["bench", *options]) == 0
    found = rows.load(path)
    assert [(row["kind"], row["row"], row["provider"]) for row in found] == [
        ("use", use.row, provider) for use in uses.USES[:2] for provider in ("eager", "ours")
    ]
    for row in found:
        assert set(rows.KEY) - {"card"} <= set(row)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert ("ratio_vs_eager" in row) == (row["provider"] == "ours")
    assert "Ways of use" in capsys.readouterr().out


@pytest.mark.parametrize("use", uses.USES, ids=lambda use: use.row)
def test_the_steps_of_a_use_do_the_same_work(use: Any) -> None:
    torch.manual_seed(0)
    rivals, _, shape = uses.rivals_of(use, quick=True)  # compares the results
    assert sorted(rivals) == ["eager", "ours"]
    assert shape == [2, 3, 64, 64]


def test_overhead_steps_do_the_same_work() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    images = torch.randn(2, 3, 4, 4)
    out = overhead.step_of(model, images, "train")()
    assert model.training
    assert not out.requires_grad
    assert model[0].weight.grad is not None
    assert torch.equal(out, model(images).detach())
    out = overhead.step_of(model, images, "eval")()
    assert not model.training
    assert torch.equal(out, model(images).detach())


def test_a_failed_worker_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)  # no bench package there
    monkeypatch.setenv("PYTHONPATH", "")
    code = cli.main(["bench", "--memory", "--quick", "--results", str(tmp_path / "rows.jsonl")])
    assert code == 1
    err = capsys.readouterr().err
    assert "stopped with code 1" in err
    assert "Traceback" not in err
