# SPDX-License-Identifier: BSD-3-Clause
"""Choosing by measurement, on a CPU that stands for a card; the timer says what it is told."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import agrees, image, lively, table
from inference_devices import Card, candidate, failing, on_card, registry
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import candidates, choose
from resnet_fast.inference.agree import Trial
from resnet_fast.inference.candidates import Candidate, Unsuitable
from resnet_fast.inference.fold import ConvSpec
from resnet_fast.inference.plan import PLAIN, Plan

X = image(2, 3, 16, 16)


class Net(nn.Module):
    """A stem with pooling, a block with a residual, a conv without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.bn(self.stem(x))))
        return self.last(torch.relu(self.norm(self.conv(y)) + y))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return lively(Net()).eval()


def how(fast: Any) -> dict[str, str]:
    """Conv -> what explain says runs it."""
    return {name: by for name, (_, by) in table(fast).items() if name in ("stem", "conv", "last")}


def test_the_fastest_is_chosen_and_runs(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0, "slow": 3.0})
    plan = on_card(monkeypatch, card)
    called = []
    with registry(candidate("fast", lambda y: called.append(1) or y), candidate("slow")):
        fast = rf.optimize_for_inference(net, X)
        assert set(how(fast).values()) == {PLAIN}
        assert choose.NOT_YET in str(rf.explain(fast))
        agrees(fast, net, X)
        assert how(fast) == dict.fromkeys(("stem", "conv", "last"), "fast")
        assert card.timed == [[PLAIN, "fast", "slow"]] * 3
        assert [entry.chosen for entry in plan.entries().values()] == ["fast"] * 3
        called.clear()
        agrees(fast, net, X)
        assert len(called) == 3
    assert len(card.timed) == 3, "a shape is measured once"


def test_a_candidate_for_other_convs_takes_no_part(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = on_card(monkeypatch, Card({"fast": 1.0}))
    given = dataclasses.replace(candidate("fast"), fits=lambda spec: spec.residual)
    with registry(given):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
        assert how(fast) == {"stem": PLAIN, "conv": "fast", "last": PLAIN}
        rf.optimize_for_inference(net, X)(X)
    assert [list(entry.seconds) for entry in plan.entries().values()] == [[], [PLAIN, "fast"], []]
    assert not any(entry.refused for entry in plan.entries().values())


def test_the_plain_one_stays_where_nothing_is_faster(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card(monkeypatch, Card({"slow": 2.5}))
    with registry(candidate("slow")):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}


def test_shapes_choose_for_themselves(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0})
    on_card(monkeypatch, card)
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
        card.times["fast"] = 9.0
        agrees(fast, net, image(3, 3, 20, 24))
    assert how(fast)["conv"] == f"2x8x4x4: fast | 3x8x5x6: {PLAIN}"
    assert len(card.timed) == 6


WRONG = {
    "residual forgotten": lambda conv: (
        lambda x, *residual: conv(x, *(torch.zeros_like(r) for r in residual))
    ),
    "samples in another order": lambda conv: lambda *inputs: conv(*inputs).flip(0),
    "one element": lambda conv: lambda *inputs: _one_element(conv(*inputs)),
    "another dtype": lambda conv: lambda *inputs: conv(*inputs).double(),
    "another shape": lambda conv: lambda *inputs: conv(*inputs)[:, :, 1:],
    "a NaN": lambda conv: (
        lambda *inputs: conv(*inputs).index_fill(0, torch.tensor([1]), float("nan"))
    ),
    "coarse arithmetic": lambda conv: lambda *inputs: conv(*inputs).bfloat16().float(),
}


def _one_element(y: Tensor) -> Tensor:
    y[-1, -1, -1, -1] += 1
    return y


def spec_of(**kw: Any) -> ConvSpec:
    given = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, **kw}
    return ConvSpec(name="conv", weight=None, bias=None, **given)  # type: ignore[arg-type]


def filter_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = image(8, 8, 3, 3, seed=2).mul(0.1).to(dtype)
    return weight.contiguous(memory_format=torch.channels_last), image(8, seed=3)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_never_admitted(name: str) -> None:
    spec, (weight, bias) = spec_of(residual=True, relu=True), filter_of()
    plain = candidates.plain(spec, weight, bias)
    trial = Trial(spec, weight, bias, (7, 8, 6, 6), torch.channels_last, plain)
    assert trial.disagrees(plain) == ""
    assert trial.disagrees(WRONG[name](plain)) != ""


def test_what_the_dtype_cannot_hold_must_lie_where_it_lies_plainly() -> None:
    spec, (weight, bias) = spec_of(), filter_of(torch.float16)
    weight = weight * 100_000  # overflows for some outputs
    plain = candidates.plain(spec, weight, bias)
    trial = Trial(spec, weight, bias, (2, 8, 6, 6), torch.channels_last, plain)
    assert not plain(trial.x).isfinite().all()
    assert trial.disagrees(plain) == ""
    assert "elsewhere" in trial.disagrees(lambda x: plain(x).nan_to_num())


OWN = [
    (candidates._conv_apply, {"relu": True}),
    (candidates._conv_apply, {"residual": True}),
    (candidates._conv_apply, {"residual": True, "relu": True}),
    (candidates._conv_add_relu, {"residual": True, "relu": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("make", "fused"), OWN)
def test_our_own_candidates_are_admitted(
    make: Any, fused: dict[str, bool], dtype: torch.dtype
) -> None:
    """By the same operators as on a GPU, here of CPU tensors."""
    if not rf.is_available():
        pytest.skip(str(rf.why_unavailable()))
    spec, (weight, bias) = spec_of(**fused), filter_of(dtype)
    bias = bias.double() if dtype is torch.float64 else bias
    plain = candidates.plain(spec, weight, bias)
    trial = Trial(spec, weight, bias, (3, 8, 6, 5), torch.channels_last, plain)
    assert trial.disagrees(make(spec, weight, bias)) == ""


def test_our_own_candidates_pool() -> None:
    spec, (weight, bias) = spec_of(relu=True, max_pool=True), filter_of()
    plain = candidates.plain(spec, weight, bias)
    trial = Trial(spec, weight, bias, (3, 8, 9, 8), torch.channels_last, plain)
    assert plain(trial.x).shape == (3, 8, 5, 4)
    assert trial.disagrees(candidates._conv_apply(spec, weight, bias)) == ""


def test_cudnns_convs_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = filter_of()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(Unsuitable, match="cuDNN is missing"):
        candidates._cudnn(spec_of(relu=True), weight, bias)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with pytest.raises(Unsuitable, match="deterministic"):
        candidates._cudnn(spec_of(relu=True), weight, bias)


@pytest.mark.parametrize("residual", [False, True])
def test_cudnns_convs_get_their_arguments(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: the operator's own schema takes them, in their places."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    spec, (weight, bias) = spec_of(residual=residual, relu=True), filter_of()
    conv = candidates._cudnn(spec, weight, bias)
    x = image(2, 8, 6, 6)
    with pytest.raises(NotImplementedError, match="cudnn_convolution"):
        conv(x, x) if residual else conv(x)


def test_a_candidate_that_raises_is_left_out_with_its_reason(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = on_card(monkeypatch, Card({"fast": 1.0}))

    def refuses(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Any:
        raise Unsuitable("only on Sundays")

    given = [failing("refuses", RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nat line 3"))]
    given += [Candidate("picky", refuses, ("cpu",)), candidate("wrong", lambda y: y + 1)]
    with registry(*given):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}
    for entry in plan.entries().values():
        assert entry.refused["refuses"] == "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"
        assert entry.refused["picky"] == "only on Sundays"
        assert "differs from float64" in entry.refused["wrong"]
        assert not entry.seconds, "the plain one alone needs no timing"
    assert "only on Sundays" in str(rf.explain(fast))


@pytest.mark.parametrize("where", ["candidate", "timer"])
def test_out_of_memory_is_no_verdict(
    where: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain one runs here, and the plan does not keep what may hold for this moment alone."""
    card, error = Card({"fast": 1.0}), torch.OutOfMemoryError("CUDA out of memory")
    plan = on_card(monkeypatch, card)
    if where == "timer":

        def seconds(calls: Any) -> Any:
            raise error

        monkeypatch.setattr(card, "seconds", seconds)
    with registry(failing("fast", error) if where == "candidate" else candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}
    assert "CUDA out of memory" in str(rf.explain(fast))
    assert len(plan) == 0


def test_a_loaded_plan_is_used_without_measuring(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = on_card(monkeypatch, Card({"fast": 1.0}))
    with registry(candidate("fast")):
        rf.optimize_for_inference(net, X)(X)
        path, other = plan.save(tmp_path / "plan.json"), Card({"fast": 99.0})
        on_card(monkeypatch, other, Plan.load(path))
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
        assert how(fast)["conv"] == "fast"
        assert other.timed == []


DIFFERENT = {"card": "card B", "libraries": "torch 2", "switches": "tf32"}


@pytest.mark.parametrize("what", DIFFERENT)
def test_entries_of_another_card_version_or_setting_are_not_used(
    what: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = on_card(monkeypatch, Card({"fast": 1.0}))
    with registry(candidate("fast")):
        rf.optimize_for_inference(net, X)(X)
        other = Card({"fast": 99.0})
        setattr(other, what, DIFFERENT[what])
        on_card(monkeypatch, other, plan)
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}
    assert len(other.timed) == 3
    assert len(plan) == 6, "the other card's are kept"


def test_a_new_candidate_has_its_turn(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0, "faster": 0.5})
    plan = on_card(monkeypatch, card)
    with registry(candidate("fast")):
        rf.optimize_for_inference(net, X)(X)
        with registry(candidate("faster")):
            fast = rf.optimize_for_inference(net, X)
            agrees(fast, net, X)
            assert how(fast)["conv"] == "faster"
            assert len(plan) == 3
        agrees(fast, net, X)  # goes on with what it chose
        again = rf.optimize_for_inference(net, X)
        agrees(again, net, X)
        assert how(again)["conv"] == "fast", "what is not there any more is not taken from the plan"


def test_a_planned_candidate_that_fails_here_is_measured_anew(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card({"fast": 1.0})
    plan = on_card(monkeypatch, card)
    with registry(candidate("fast")):
        rf.optimize_for_inference(net, X)(X)
    with registry(failing("fast", RuntimeError("no engine"))):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}
    assert {e.refused["fast"] for e in plan.entries().values()} == {"RuntimeError: no engine"}


def test_a_plan_that_does_not_measure(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0})
    plan = on_card(monkeypatch, card, Plan(measure=False))
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
    assert set(how(fast).values()) == {PLAIN}
    assert "does not measure" in str(rf.explain(fast))
    assert (card.timed, len(plan)) == ([], 0)


def test_changed_settings_are_followed(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0})
    on_card(monkeypatch, card)
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        fast(X)
        card.switches, card.times = "deterministic", {PLAIN: 1.0, "fast": 2.0}
        agrees(fast, net, X)
        assert set(how(fast).values()) == {PLAIN}
        card.switches = ""
        agrees(fast, net, X)
        assert how(fast)["conv"] == "fast"
    assert len(card.timed) == 6, "the first settings' choices are in the plan"


def test_what_a_graph_may_read_outlives_a_change_of_settings(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph recorded before holds addresses, and is replayed when the settings come back."""
    card, made = Card({"fast": 1.0}), []
    on_card(monkeypatch, card)
    given = candidate("fast")

    def make(*args: Any) -> Any:
        conv = given.make(*args)
        made.append((card.switches, weakref.ref(conv)))
        return conv

    with registry(dataclasses.replace(given, make=make)):
        fast = rf.optimize_for_inference(net, X)
        for switches in ("", "deterministic", "", "deterministic"):
            card.switches = switches
            fast(X)
        fast(image(1, 3, 24, 24))
    gc.collect()
    assert all(conv() is not None for _, conv in made)
    assert sorted(switches for switches, _ in made) == [""] * 3 + ["deterministic"] * 3


def test_while_somebody_records_nothing_is_measured(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card({"fast": 1.0})
    on_card(monkeypatch, card)
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        card.is_recording = True
        agrees(fast, net, X)
        assert (card.timed, choose.NOT_YET in str(rf.explain(fast))) == ([], True)
        card.is_recording = False
        agrees(fast, net, X)
    assert how(fast)["conv"] == "fast"


def test_the_shapes_of_a_conv_are_bounded(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0})
    on_card(monkeypatch, card)
    monkeypatch.setattr(choose, "MAX_SIZES", 2)
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        for size in (16, 24, 32, 16):
            agrees(fast, net, image(1, 3, size, size))
    assert how(fast)["conv"].count("x8x") <= 2
    assert len(card.timed) == 9, "and the plan still knows those that were dropped"


def test_refresh_keeps_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    net, card = lively(Net()).eval(), Card({"fast": 1.0})
    on_card(monkeypatch, card)
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        agrees(fast, net, X)
        with torch.no_grad():
            net.conv.weight.mul_(-2)
        fast.refresh(net)
        agrees(fast, net, X)
        assert how(fast)["conv"] == "fast"
    assert len(card.timed) == 3


def test_threads_measure_once(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({"fast": 1.0})
    on_card(monkeypatch, card)
    right, wrong = net(X).detach(), []
    with registry(candidate("fast")):
        fast = rf.optimize_for_inference(net, X)
        start = threading.Barrier(4)

        def work() -> None:
            start.wait()
            for _ in range(5):
                if not torch.allclose(fast(X), right, rtol=1e-4, atol=1e-4):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(card.timed) == 3


def test_an_empty_batch(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    on_card(monkeypatch, card)
    with registry(candidate("fast")):
        kernels = choose.MeasuredKernels(torch.device("cpu"), card, Plan())
        weight, bias = filter_of()
        conv = choose.MeasuredConv(spec_of(relu=True), weight, bias, kernels)
        assert conv(X.new_empty(0, 8, 6, 6)).shape == (0, 8, 6, 6)
    assert card.timed == []


def test_names_are_given_once() -> None:
    with registry(candidate("mine")):
        for name in ("mine", PLAIN):
            with pytest.raises(ValueError, match="taken"):
                candidates.register(candidate(name))
    with pytest.raises(KeyError):
        candidates.unregister("mine")


def test_arguments() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on a CUDA device"):
        rf.optimize_for_inference(model, X, cuda_graph=True)
    with pytest.raises(ValueError, match="plan must be None on cpu"):
        rf.optimize_for_inference(model, X, plan=Plan())
    with pytest.raises(TypeError, match="plan must be a Plan"):
        rf.optimize_for_inference(model, X, plan="plan.json")
    with pytest.raises(ValueError, match="int8"):
        rf.optimize_for_inference(model, X, dtype="int8", calibration=[X], cuda_graph=True)
    with pytest.raises(ValueError, match="one device"):
        rf.optimize_for_inference(nn.Sequential(model, nn.Conv2d(4, 4, 3, device="meta")), X)
    with pytest.raises(ValueError, match="model must be on cpu"):
        rf.optimize_for_inference(model, X).refresh(nn.Conv2d(3, 4, 3, device="meta"))
    assert rf.optimize_for_inference(model, X).plan is None
