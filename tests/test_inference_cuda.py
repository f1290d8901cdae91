# SPDX-License-Identifier: BSD-3-Clause
"""What is asked of CUDA, as far as it can be asked without a card."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inference_devices import Card

from resnet_fast.inference import candidates, cuda
from resnet_fast.inference.choose import MeasuredKernels
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.kernels import NoKernels, kernels_for
from resnet_fast.inference.plan import Plan
from resnet_fast.inference.trace import NotTraceable

DEVICE = torch.device("cuda", 0)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """PyTorch's switches as they were."""
    kept = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = kept
    torch.backends.cudnn.allow_tf32 = False  # as conftest has it


def test_tf32_by_either_of_pytorchs_switches() -> None:
    for on in (True, False):
        torch.backends.cudnn.allow_tf32 = on
        assert cuda.tf32() is on
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert cuda.tf32() is True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert cuda.tf32() is False


def test_settings_and_layout_follow_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cuda.Cuda(DEVICE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert platform.settings(torch.float32) == "tf32"
    assert platform.memory_format(torch.float32) is torch.channels_last
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert platform.settings(torch.float32) == ""
    assert platform.memory_format(torch.float32) is torch.contiguous_format
    assert platform.memory_format(torch.float64) is torch.contiguous_format
    for dtype in HALF:
        assert platform.settings(dtype) == ""
        assert platform.memory_format(dtype) is torch.channels_last
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert platform.settings(torch.half) == "benchmark, deterministic"
    assert platform.graph_settings(torch.float32).startswith("benchmark, deterministic; matmul")


def test_a_card_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cuda.Cuda(DEVICE)
    answers = {"including_emulation": []}
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    def supported(including_emulation: bool) -> bool:
        answers["including_emulation"].append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    dtype, why = platform.compute_dtype(torch.bfloat16)
    assert (dtype, "no bfloat16" in why) == (torch.float32, True)
    assert answers == {"including_emulation": [False]}
    assert platform.compute_dtype(torch.float16) == (torch.float16, "")


class Clock:
    """torch.cuda.Event on a clock that calls move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        one = types.SimpleNamespace(at=None, synchronize=lambda: None)
        one.record = lambda: setattr(one, "at", self.now)
        one.elapsed_time = lambda end: end.at - one.at
        return one


def test_the_timer_takes_medians_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))

    def call(name: str, milliseconds: float) -> Any:
        def run() -> None:
            order.append(name)
            # Once in a while something else has the GPU.
            clock.now += milliseconds * (50 if order.count(name) == 20 else 1)

        return run

    seconds = cuda.Cuda(DEVICE).seconds({"long": call("long", 3.0), "short": call("short", 0.02)})
    assert seconds == pytest.approx({"long": 3e-3, "short": 2e-5})
    # Once to warm up, once to see how long it takes, then ROUNDS times as many as fill AIM.
    assert order.count("long") == 2 + cuda.ROUNDS
    assert order.count("short") == 2 + cuda.ROUNDS * 10
    rounds = [name for name in order[-(11 + 2) * 2 :] if name != "sleep"]
    assert rounds == (["long"] + ["short"] * 10) * 2


class Streams:
    """torch.cuda's streams and graphs, of which only the order is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.log: list[Any] = []
        self.current = "caller"
        self.fails = fails
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.named("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.named(self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        replay = types.SimpleNamespace(replay=lambda: self.log.append("replay"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replay)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def named(self, name: str) -> Any:
        waits = lambda other: self.log.append((name, "waits for", other.name))  # noqa: E731
        return types.SimpleNamespace(name=name, wait_stream=waits)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As PyTorch's: where the capture fails the current stream stays the capture's."""
        self.log.append((pool, stream.name, capture_error_mode))
        self.current = stream.name
        yield
        if self.fails:
            raise RuntimeError("capture failed")
        self.current = "caller"


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_recorded_as_pytorch_asks(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    streams = Streams(monkeypatch, fails)
    recorder = cuda.CudaGraphs(DEVICE)
    x = torch.ones(2)

    def function(y: torch.Tensor) -> list[Any]:
        assert y is x
        streams.log.append(("runs on", streams.current))
        return [y * 2]

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        captured = recorder.capture(function, [x])
        captured.replay()
        assert captured.inputs[0] is x
        assert captured.outputs[0].tolist() == [2, 2]
    assert streams.current == "caller"
    assert streams.log[: 7 + (not fails)] == [
        ("side", "waits for", "caller"),
        *[("runs on", "side")] * cuda.WARM_UP,
        ("caller", "waits for", "side"),
        ("pool", "side", "thread_local"),
        ("runs on", "side"),
        *["replay"] * (not fails),
    ]


def test_kernels_of_each_device() -> None:
    plan = Plan()
    assert kernels_for(DEVICE, plan).plan is plan
    assert isinstance(kernels_for(DEVICE, None).plan, Plan)
    assert kernels_for(torch.device("cpu"), None).plan is None
    other = kernels_for(torch.device("mps"), None)
    assert isinstance(other, NoKernels)
    assert other.compute_dtype(torch.half) == (torch.half, "")
    with pytest.raises(NotTraceable, match="mps"):
        other.make_conv(None, {}, torch.half)  # type: ignore[arg-type]


FITTING = {
    (False, False): [],
    (False, True): [candidates.CUDNN, candidates.APPLY],
    (True, False): [candidates.APPLY],
    (True, True): [candidates.CUDNN, candidates.APPLY, candidates.ADD_RELU],
}


@pytest.mark.parametrize(("residual", "relu"), FITTING)
def test_the_gpus_candidates(residual: bool, relu: bool) -> None:
    spec = ConvSpec("conv", None, None, [1, 1], [1, 1], [1, 1], 1)  # type: ignore[arg-type]
    spec.residual, spec.relu = residual, relu
    names = [candidate.name for candidate in candidates.registered("cuda", spec)]
    assert names == FITTING[residual, relu]
    assert candidates.registered("cpu", spec) == []


def test_settings_are_asked_for_at_each_call() -> None:
    card = Card()
    kernels = MeasuredKernels(torch.device("cpu"), card, Plan())
    card.switches = "tf32"
    assert kernels.begin(torch.float32) == "tf32"
