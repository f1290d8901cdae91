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
MOST_PARAMETERS = 400e6  # float64, of both models, with gradients: 18 GB
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


# ---- products before the sum ---------------------------------------------------------------------
def joins(model: Any, x: torch.Tensor = X) -> dict[str, int]:
    """How many sums a forward runs as each op, where all of it is fast."""
    with dispatch.recording() as events:
        model(x)
    assert not rf.is_available() or all(event.impl != "reference" for event in events)
    ops = [event.op for event in events if "add_relu" in event.op]
    return {op: ops.count(op) for op in set(ops)}


GATES = {
    "se": "se",
    "se with max-pooling": {"attn_layer": "se", "attn_kwargs": {"add_maxpool": True}},
    "ese": "ese",
    "eca": "eca",
    "eca with two convolutions": {"attn_layer": "eca", "attn_kwargs": {"use_mlp": True}},
    "ceca": "ceca",
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
def test_channel_attention_is_one_op_with_the_sum(gate: str, name: str) -> None:
    kwargs = GATES[gate]
    if isinstance(kwargs, str):
        kwargs = {"attn_layer": kwargs}
    if "attn_kwargs" in kwargs:
        from timm.layers import create_attn

        own, attn = kwargs["attn_kwargs"], kwargs["attn_layer"]
        kwargs = {"attn_layer": lambda channels, **dd: create_attn(attn, channels, **own, **dd)}
    theirs = make(name, block_args=kwargs)
    ours = rf.accelerate(twin(theirs))
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), rtol=1e-7))
    for mode in (True, False):
        assert joins(ours.train(mode)) == {"scaled_add_relu": 8}


def test_stochastic_depth_is_one_op_with_the_sum() -> None:
    """The same images are dropped as by timm; in eval mode nothing lies between norm and sum."""
    theirs = make("resnet18", drop_path_rate=0.5)
    ours = rf.accelerate(twin(theirs))
    results = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        results.append(step(model, X) | {"next": torch.rand(3)})
    assert_same(results[1], results[0], rtol=1e-7)
    assert joins(ours) == {"scaled_add_relu": 7}  # the first block's rate is 0
    assert not joins(ours.eval())
    both = rf.accelerate(make("resnet18", drop_path_rate=0.5, block_args={"attn_layer": "se"}))
    assert joins(both.eval()) == {"scaled_add_relu": 8}


@pytest.mark.parametrize("part", ["se.fc1", "se.act", "se.fc2", "se.gate"])
def test_hooks_inside_attention(part: str) -> None:
    """They see what they see in timm, while the product is fused."""

    def change(block: Any, log: Log) -> None:
        m = block.get_submodule(part)
        m.register_forward_hook(lambda _, args, out: log.add(part, args[0], out))
        m.register_forward_hook(lambda _, args, out: out * 0.75)

    check(change, None)
    check(change, None, drop_path_rate=0.3)


def changed_gate(block: Any, how: str) -> None:
    from timm.layers.squeeze_excite import SEModule

    class Half(SEModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    class Blind(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1].sigmoid()

    if how == "subclass":
        block.se.__class__ = Half
    elif how == "pre-hook":
        block.se.register_forward_pre_hook(lambda _, args: args[0] * 0.5)
    elif how == "forward of the object":
        block.se.forward = lambda x: x * 0.25
    else:  # one value for all channels: the product alone is PyTorch's
        block.se.gate = Blind()


@pytest.mark.parametrize(
    "how", ["subclass", "pre-hook", "forward of the object", "a gate of another shape"]
)
def test_attention_that_is_not_plain_is_called(how: str) -> None:
    check(lambda block, _: changed_gate(block, how), None)
    model = rf.accelerate(make("seresnet18"))
    changed_gate(model.layer2[0], how)
    assert joins(model) == {"scaled_add_relu": 7, "add_relu": 1}


def test_a_replaced_forward_of_attention_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers.squeeze_excite import SEModule

    model = rf.accelerate(make("seresnet18"))
    monkeypatch.setattr(SEModule, "forward", lambda self, x: 2 * x)
    assert joins(model) == {"add_relu": 8}


def test_attention_under_autocast_and_another_activation() -> None:
    theirs = make("seresnet18").float()
    ours, theirs = rf.accelerate(twin(theirs)).eval(), theirs.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert joins(ours, X.float()) == {"scaled_add_relu": 8}
        a, b = ours(X.float()), theirs(X.float())
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    silu = rf.accelerate(make("seresnet18", act_layer="silu"))
    assert not joins(silu)


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


@pytest.mark.parametrize("indices", [(0, 1, 2, 3, 4), (2, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_only(indices: tuple[int, ...], checkpointing: bool) -> None:
    """The norm of the stem, too, but where checkpoints lie between the getter's children."""
    theirs = make("resnet18", features_only=True, out_indices=indices)
    ours = rf.accelerate(twin(theirs))
    results = []
    for model in (theirs, ours):
        model.set_grad_checkpointing(checkpointing)
        with dispatch.recording() as events:
            maps = model(X)
        sum(y.square().mean() for y in maps).backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({str(i): y.detach() for i, y in enumerate(maps)} | named)
    assert_same(results[1], results[0], rtol=1e-7)
    if rf.is_available():
        norms = sum(isinstance(m, _BatchNorm) for m in theirs.modules())
        fused = sum(e.op == "batch_norm_act" and e.impl != "reference" for e in events)
        assert fused == norms - checkpointing
    assert [type(m) for m in rf.restore(ours).modules()] == [type(m) for m in theirs.modules()]


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
