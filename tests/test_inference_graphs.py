# SPDX-License-Identifier: BSD-3-Clause
"""The cache of recorded graphs, with graphs that are functions on static tensors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from inference_cases import agrees, image, lively
from inference_devices import Card, Recorder, on_card
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import module
from resnet_fast.inference.capture import GraphCache


def double(x: Tensor) -> list[Any]:
    return [x * 2, None]


def cache(recorder: Recorder, limit: int = 2) -> GraphCache:
    return GraphCache(double, lambda x: x.to(torch.float32), recorder, limit)


def test_each_shape_is_recorded_once_and_replayed() -> None:
    recorder = Recorder()
    run = cache(recorder)
    for n in range(3):
        for size in (2, 3):
            x = torch.full((size,), float(n))
            y, none = run([x])
            assert none is None
            assert torch.equal(y, x * 2)
    assert (recorder.captures, recorder.replays, len(run)) == (2, 6, 2)


def test_results_and_inputs_are_the_callers_own() -> None:
    run = cache(Recorder())
    x = torch.ones(2)
    first, _ = run([x])
    run([torch.full((2,), 5.0)])
    assert first.tolist() == [2, 2], "a later call wrote into an earlier result"
    first.zero_()
    assert run([x])[0].tolist() == [2, 2]
    assert x.tolist() == [1, 1]


def test_other_dtypes_share_a_graph() -> None:
    recorder = Recorder()
    run = cache(recorder)
    for dtype in (torch.float64, torch.float16):
        y, _ = run([torch.ones(2, dtype=dtype)])
        assert (y.dtype, y.tolist()) == (torch.float32, [2, 2])
    assert recorder.captures == 1


def test_the_graph_used_longest_ago_goes() -> None:
    recorder = Recorder()
    run = cache(recorder)
    for size in (1, 2, 1, 3):
        run([torch.ones(size)])
    assert len(run) == 2
    assert recorder.order.count("finish") == 1, "a graph that may still run was dropped"
    run([torch.ones(1)])
    assert recorder.captures == 3
    run([torch.ones(2)])
    assert recorder.captures == 4


def test_every_replay_is_between_enter_and_leave() -> None:
    recorder = Recorder()
    run = cache(recorder)
    for _ in range(2):
        run([torch.ones(1)])
    assert recorder.order == ["enter", "replay", "leave"] * 2


def test_other_settings_are_another_graph() -> None:
    recorder = Recorder()
    run = cache(recorder)
    for settings in ("", "tf32", ""):
        run([torch.ones(1)], settings)
    assert recorder.captures == 2


def test_what_cannot_be_recorded_runs_and_says_why() -> None:
    recorder = Recorder(refuses="operation not permitted when stream is capturing\nmore")
    run = cache(recorder)
    for _ in range(2):
        assert run([torch.ones(2)])[0].tolist() == [2, 2]
    assert recorder.order == ["enter", "leave"], "it is tried once"
    assert run.reasons() == [
        "no CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_inside_somebody_elses_recording_it_is_the_function() -> None:
    recorder = Recorder()
    recorder.is_recording = True
    run = cache(recorder)
    assert run([torch.ones(2)])[0].tolist() == [2, 2]
    assert recorder.captures == 0


def test_an_empty_batch_is_not_recorded() -> None:
    recorder = Recorder()
    assert cache(recorder)([torch.ones(0, 3)])[0].shape == (0, 3)
    assert recorder.captures == 0


def test_inference_mode_leaves_no_tensor_that_cannot_be_written() -> None:
    run = cache(Recorder())
    with torch.inference_mode():
        run([torch.ones(2)])
    assert run([torch.full((2,), 3.0)])[0].tolist() == [6, 6]


def test_threads() -> None:
    recorder = Recorder()
    run = cache(recorder)
    wrong: list[float] = []

    def work(number: int) -> None:
        for turn in range(50):
            x = torch.full((1 + turn % 3,), float(number * 100 + turn))
            if not torch.equal(run([x])[0], x * 2):
                wrong.append(float(x[0]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- in an optimized module ----------------------------------------------------------------------
def model() -> Any:
    return lively(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())).eval()


X = image(2, 3, 8, 8)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made: list[Recorder] = []
    on_card(monkeypatch, Card())
    monkeypatch.setattr(module, "_recorder", lambda device: made.append(Recorder()) or made[-1])
    return made


def test_a_module_replays_and_agrees(recorders: list[Recorder]) -> None:
    net = model()
    fast = rf.optimize_for_inference(net, X, cuda_graph=True)
    for seed in range(3):
        agrees(fast, net, image(2, 3, 8, 8, seed=seed))
    agrees(fast, net, image(1, 3, 9, 8))
    kept = fast(X)
    before = kept.clone()
    fast(-X)
    assert torch.equal(kept, before)
    assert recorders[-1].captures == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype(recorders: list[Recorder], dtype: torch.dtype) -> None:
    net = model()
    fast = rf.optimize_for_inference(net, X, dtype=dtype, cuda_graph=True)
    agrees(fast, net, X, dtype)
    assert fast(X).is_contiguous(memory_format=torch.channels_last)


def test_no_graph_outlives_its_weights(recorders: list[Recorder]) -> None:
    net = model()
    fast = rf.optimize_for_inference(net, X, cuda_graph=True)
    fast(X)
    old = recorders[-1]
    with torch.no_grad():
        net[0].weight.neg_()
    with pytest.raises(RuntimeError, match="refresh"):
        fast(X)
    fast.refresh(net)
    replayed = old.replays
    agrees(fast, net, X)
    assert old.replays == replayed
    assert recorders[-1] is not old, "two caches would share a pool under two locks"
    assert recorders[-1].captures == 1
    assert old.order[-1] == "finish", "memory of a graph that may still run was given back"


def test_hooks_run_at_every_call(recorders: list[Recorder]) -> None:
    net, seen = model(), []
    net[0].register_forward_hook(lambda m, x, y: seen.append(1))
    fast = rf.optimize_for_inference(net, X, cuda_graph=True)
    for _ in range(3):
        fast(X)
    assert len(seen) == 3
    assert "no CUDA graph: forward hooks" in str(rf.explain(fast))


def test_a_model_that_runs_whole(recorders: list[Recorder]) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    fast = rf.optimize_for_inference(Branch(), X, cuda_graph=True)
    assert torch.equal(fast(X), Branch()(X))
    assert torch.equal(fast(-X), Branch()(-X))
    assert "no CUDA graph: the model runs as it is" in str(rf.explain(fast))


def test_autocast_changes_nothing() -> None:
    """dtype= says what is calculated in, on every device."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    fast = rf.optimize_for_inference(net, X)
    right = fast(X)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(X)
    assert torch.equal(got, right)
