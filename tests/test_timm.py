# SPDX-License-Identifier: BSD-3-Clause
"""timm's ResNet family by name: a step of each is the same after accelerate, and mostly fused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import shims
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from twins import Log, assert_same, image, randomise, reasons, step, twin

import resnet_fast as rf
from resnet_fast import adapters, dispatch

timm = shims.timm_or_skip()

PATTERNS = (
    *("resnet*", "resnext*", "wide_resnet*", "seresnet*", "seresnext*", "ecaresnet*"),
    *("skresnet*", "skresnext*", "legacy_seres*"),
)
NAMES = sorted({name for pattern in PATTERNS for name in timm.list_models(pattern)})
# One of each kind of block, stem, shortcut, attention and activation; the others are slow.
QUICK = (
    "resnet10t",  # deep tiered stem, average-pooled shortcuts
    "resnet18",
    "resnet26d",  # deep stem, bottlenecks
    "resnetblur18",  # anti-aliasing
    "seresnet18",
    "ecaresnet26t",
    "skresnet18",  # blocks of their own
    "resnetv2_18",  # BatchNormAct2d, pre-activation
    "resnext26ts",  # SiLU, blocks put together from a description
    "legacy_seresnet18",
)
MOST_PARAMETERS = 150e6
X = image(2, 3, 64, 64)
COUNTS: dict[str, tuple[int, int]] = {}  # of each name that ran: norms fused, norms


def make(name: str, **kwargs: Any) -> Any:
    """A model of timm in float64 with a small head and no parameter at its initial 0 or 1."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=4, **kwargs))


def share(name: str, model: nn.Module, events: list[dispatch.Event]) -> float:
    """Of the batch norms of a model that ran once: how many ran fused."""
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    fast = sum(e.op == "batch_norm_act" and e.impl != "reference" for e in events)
    COUNTS[name] = fast, norms
    return fast / norms if norms else 0.0


@pytest.fixture(scope="module", autouse=True)
def whole_family() -> Iterator[None]:
    """Print, with `-s`, the share of all names that ran together."""
    yield
    fast, norms = (sum(counts) for counts in zip((0, 0), *COUNTS.values(), strict=True))
    print(f"\n{len(COUNTS)} names: {fast} of {norms} batch norms fused")


def drop_zero_gradient(results: Any) -> None:
    """Take out what is 0 but for rounding, and see that it is.

    The bias of an attention pool's keys (the names with "clip") shifts all scores of a softmax
    alike.
    """
    bias = results.pop("head.k.bias.grad", None)
    if bias is not None:
        assert float(bias.abs().max()) <= 1e-10 * float(results["head.k.weight.grad"].abs().max())


# What is not fused at all, and why: none of these have a batch norm in a block that we know.
NONE_OF_IT = ("legacy_", "sk", "_bit", "_gn", "_evos", "_frn")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_step_of_every_name(name: str) -> None:
    parameters = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    if parameters > MOST_PARAMETERS:
        pytest.skip(f"{parameters / 1e6:.0f} million parameters in float64, four times")
    theirs = make(name)
    x = X if "clip" not in name else image(2, 3, *theirs.default_cfg["input_size"][1:])
    ours = rf.accelerate(twin(theirs))
    torch.manual_seed(1)  # some names have dropout
    with dispatch.recording() as events:
        got = step(ours, x)
    torch.manual_seed(1)
    want = step(theirs, x)
    for results in (got, want):
        drop_zero_gradient(results)
    # Statistics of eight values a channel over up to 400 layers: rounding grows on the way.
    assert_same(got, want, rtol=1e-5)
    fused = share(name, ours, events)
    print(f"{name}: {fused:.0%} of the batch norms fused")
    if rf.is_available() and not any(part in name for part in NONE_OF_IT):
        assert fused >= 0.9
    assert [type(m) for m in rf.restore(ours).modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.parametrize("name", QUICK)
def test_answers_in_float32(name: str) -> None:
    theirs = make(name).float().eval()
    oracle = twin(theirs).double()(X)
    eager, ours = theirs(X.float()), rf.accelerate(twin(theirs))(X.float())
    error, baseline = (float((y.double() - oracle).norm()) for y in (ours, eager))
    assert error <= 2 * baseline + torch.finfo(torch.float32).eps * float(oracle.norm())


# ---- parts of a block ----------------------------------------------------------------------------
def check(change: Any, why: str | None, name: str = "seresnet18", **kwargs: Any) -> None:
    """Do the same to a model and its twin: all equal, what hooks saw too; fallbacks say why."""
    theirs = make(name, **kwargs)
    logs, results = (Log(), Log()), []
    for model, log in zip((theirs, rf.accelerate(twin(theirs))), logs, strict=True):
        change(model.layer2[0], log)
        torch.manual_seed(1)
        slow = reasons(lambda model=model: results.append(step(model, X[:, :, :32, :32])))
    assert_same(results[1], results[0], rtol=1e-7)
    logs[1].same_as(logs[0])
    assert not slow if why is None else any(why in reason for _, reason in slow), slow


@pytest.mark.parametrize("part", ["conv1", "bn1", "drop_block", "act1", "aa", "bn2", "se", "act2"])
def test_hooks_on_the_parts(part: str) -> None:
    def change(block: Any, log: Log) -> None:
        m = getattr(block, part)
        m.register_forward_hook(lambda _, args, out: log.add(part, args[0], out))

    check(change, "has a forward hook" if "bn" in part else None)


def test_a_kept_output_of_the_last_gate_is_the_sum_as_in_timm() -> None:
    """timm adds the shortcut in place, so that is what a hook that keeps the tensor holds."""
    kept: list[torch.Tensor] = []

    def change(block: Any, log: Log) -> None:
        block.se.register_forward_hook(lambda _, __, out: kept.append(out))

    check(change, None)
    torch.testing.assert_close(kept[1], kept[0])


def test_stochastic_depth_drop_block_and_other_parts() -> None:
    def nothing(block: Any, log: Log) -> None:
        pass

    check(nothing, None, "resnet18", drop_path_rate=0.5)
    check(nothing, None, "resnet18", drop_block_rate=0.5)
    check(nothing, None, "resnet18", act_layer="silu")
    check(nothing, None, "resnet18", output_stride=8)
    check(nothing, None, "resnet18", in_chans=3, stem_type="deep", avg_down=True)
    check(nothing, "GroupNorm", "resnet18", norm_layer="groupnorm")


def test_frozen_norms_of_timm() -> None:
    from timm.utils.model import freeze_batch_norm_2d

    theirs = freeze_batch_norm_2d(make("resnet18"))
    ours = rf.accelerate(twin(theirs))
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), rtol=1e-8))


def test_features_checkpointing_and_new_heads() -> None:
    theirs = make("resnet18")
    ours = rf.accelerate(twin(theirs))
    for model in (theirs, ours):
        model.reset_classifier(0)
        model.set_grad_checkpointing(True)
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), rtol=1e-8))
    for a, b in zip(ours.forward_intermediates(X)[1], theirs.forward_intermediates(X)[1], strict=1):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    maps = make("resnet18", features_only=True)
    for a, b in zip(rf.accelerate(twin(maps))(X), maps(X), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_copies_and_pickles() -> None:
    model = rf.accelerate(make("resnetv2_18")).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(X), model(X))


def test_a_replaced_forward_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers.norm_act import BatchNormAct2d
    from timm.models import resnet as tm

    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    block = rf.accelerate(make("resnet18")).layer1[0]
    norm = rf.accelerate(BatchNormAct2d(3).double())
    assert adapters.is_accelerated(block)
    assert adapters.is_accelerated(norm)
    monkeypatch.setattr(tm.BasicBlock, "forward", doubled)
    monkeypatch.setattr(BatchNormAct2d, "forward", doubled)
    x = image(1, 64, 4, 4)
    slow = reasons(lambda: torch.testing.assert_close(block(x), 2 * x))
    assert slow == [("BasicBlock", "BasicBlock.forward was replaced")]
    slow = reasons(lambda: torch.testing.assert_close(norm(X), 2 * X))
    assert ("BatchNormAct2d", "BatchNormAct2d.forward was replaced") in slow


def test_explain_lists_what_is_left() -> None:
    model = make("skresnet18")
    rows = rf.explain(rf.accelerate(model)).rows
    assert any("no adapter for timm.layers." in row.reason for row in rows)
    fused = rf.explain(rf.accelerate(make("resnetv2_18")), X)
    assert fused.fast_share == (1.0 if rf.is_available() else 0.0)
