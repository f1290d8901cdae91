# SPDX-License-Identifier: BSD-3-Clause
"""Blocks that are asked about once: which are, that the others are left alone, and their errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conv_blocks import Function, Mode
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils import prune
from twins import assert_same, randomise, step

import resnet_fast as rf
from resnet_fast import _at_once, blocks, convolution, dispatch
from resnet_fast.models.resnet import BasicBlock, Bottleneck

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))
KINDS = ("basic", "basic_down", "bottleneck", "bottleneck_down")
X = torch.randn(3, 8, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(kind: str = "basic_down") -> Any:
    torch.manual_seed(5)
    block: Any = BasicBlock if "basic" in kind else Bottleneck
    planes = 8 if "basic" in kind else 2
    if "down" not in kind:
        return randomise(block(8, planes))
    out = planes * block.expansion
    down = nn.Sequential(nn.Conv2d(8, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    return randomise(block(8, planes, 2, down))


def at_once(block: Any, x: Tensor) -> Tensor | None:
    names = _at_once.BOTTLENECK if isinstance(block, Bottleneck) else _at_once.BASIC
    return _at_once.residual_block(block, names, x, blocks._add)


# ---- the common block ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_plain_blocks_are(kind: str, training: bool) -> None:
    """The same as with a hook that does nothing, which makes blocks.py ask at every norm."""
    block = make(kind).train(training)
    other = copy.deepcopy(block)
    other.conv1.register_forward_hook(lambda *_: None)
    assert at_once(copy.deepcopy(block), X) is not None
    assert at_once(other, X) is None
    assert_same(step(block, X, 2), step(other, X, 2), rtol=0)


def test_events_are_those_of_the_norms() -> None:
    with dispatch.recording() as events:
        make("basic_down")(X)
    assert events == [("batch_norm_act", "cpu", "")] * 3


def test_half_with_parameters_of_float32() -> None:
    block = make().float().eval()
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.bfloat16()
    y = at_once(block, X.bfloat16())
    assert y is not None
    assert y.dtype == torch.bfloat16


# ---- the others ----------------------------------------------------------------------------------
class OtherConv(nn.Conv2d):
    pass


class OtherNorm(nn.BatchNorm2d):
    pass


class NoDownsample(BasicBlock):
    """A name of the class goes before the module of that name, for nn.Module, too."""

    downsample = None  # type: ignore[assignment]


class Logged(Tensor):
    pass


def hook(part: str, name: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        getattr(block.get_submodule(part), name)(lambda *_: None)

    return change


def put(part: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: block.get_submodule(part).__dict__.__setitem__(name, value)


def turn(part: str, kind: type[nn.Module]) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        module = block.get_submodule(part) if part else block
        module.__class__ = kind

    return change


def subclass(part: str, name: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        module = block.get_submodule(part)
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                tensors[name] = tensors[name].detach().as_subclass(Logged)

    return change


def function_for_a_shortcut(block: Any) -> None:
    del block.downsample
    block.downsample = F.relu


def both(block: Any) -> None:
    block.downsample[1].running_mean = block.bn2.running_mean


PARTS = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample", "downsample.0", "downsample.1")
HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
CHANGES: dict[str, Callable[[Any], Any]] = {
    **{f"{part} {h}": hook(part, f"register_{h}_hook") for part in PARTS for h in HOOKS},
    **{f"{part} forward": put(part, "forward", lambda x: x) for part in PARTS},
    **{f"{part} _call_impl": put(part, "_call_impl", lambda x: x) for part in PARTS},
    **{f"{part} compiled": put(part, "_compiled_call_impl", lambda x: x) for part in PARTS},
    "legacy hook": lambda b: b.register_backward_hook(lambda *_: None),
    "conv subclass": turn("conv2", OtherConv),
    "norm subclass": turn("bn1", OtherNorm),
    "norm of the shortcut": turn("downsample.1", OtherNorm),
    "relu": lambda b: setattr(b, "relu", nn.ReLU6()),
    "conv bias": lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, 3, 2, 1).double()),
    "padding mode": lambda b: setattr(b.conv2, "padding_mode", "circular"),
    "_conv_forward": put("conv1", "_conv_forward", F.conv2d),
    "_check_input_dim": put("bn1", "_check_input_dim", print),
    "weight on the object": put("conv1", "weight", torch.ones(8, 8, 3, 3).double()),
    "bias on the object": put("conv1", "bias", torch.ones(8).double()),
    "norm's weight on the object": put("bn2", "weight", torch.ones(8).double()),
    "norm's bias on the object": put("bn2", "bias", torch.ones(8).double()),
    "mean on the object": put("bn2", "running_mean", torch.ones(8).double()),
    "var on the object": put("bn2", "running_var", torch.ones(8).double()),
    "count on the object": put("bn2", "num_batches_tracked", torch.tensor(0)),
    "weight of a subclass": subclass("conv1", "weight"),
    "mean of a subclass": subclass("bn2", "running_mean"),
    "dtype of a mean": lambda b: setattr(b.bn2, "running_mean", b.bn2.running_mean.float()),
    "pruned": lambda b: prune.random_unstructured(b.conv1, "weight", 0.5),
    "no statistics": lambda b: setattr(b, "bn2", nn.BatchNorm2d(8, track_running_stats=False)),
    "not tracked": lambda b: setattr(b.bn2, "track_running_stats", False),
    "no count": lambda b: setattr(b.bn2, "num_batches_tracked", None),
    "cumulative": lambda b: setattr(b.bn1, "momentum", None),
    "momentum of 1": lambda b: setattr(b.bn1, "momentum", 1),
    "eps of 0": lambda b: setattr(b.bn1, "eps", 0.0),
    "no norm": lambda b: delattr(b, "bn2"),
    "no convolution": lambda b: setattr(b, "conv2", None),
    "no weight": lambda b: setattr(b.conv1, "weight", None),
    "shared statistic": both,
    "shared norm": lambda b: b.downsample.__setitem__(1, b.bn2),
    "longer shortcut": lambda b: b.downsample.append(nn.Identity()),
    "a function for a shortcut": function_for_a_shortcut,
    "a function beside a module": put("", "relu", F.relu),
    "name of the class": turn("", NoDownsample),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*backward hook.*")
def test_what_is_not_plain_is_left_alone(name: str) -> None:
    block = make()
    CHANGES[name](block)
    before = [b.clone() for b in block.buffers()]
    with dispatch.recording() as events:
        assert at_once(block, X) is None
    assert not events
    assert all(map(torch.equal, block.buffers(), before))


def dual() -> AbstractContextManager[Any]:
    return forward_ad.dual_level()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Mode,
    "function mode": Function,
    "forward AD": dual,
    "backend": lambda: rf.use_backend("reference"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_goes_on_around_it(name: str) -> None:
    block = make().eval()
    assert at_once(block, X) is not None
    with CONTEXTS[name]():
        assert at_once(block, X) is None


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules(kind: str) -> None:
    handle = getattr(nn_module, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        assert at_once(make(), X) is None
    finally:
        handle.remove()


PATCHES: dict[str, tuple[Any, str]] = {
    "F.conv2d": (F, "conv2d"),
    "F.batch_norm": (F, "batch_norm"),
    "Conv2d.forward": (nn.Conv2d, "forward"),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward"),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward"),
    "BatchNorm2d._check_input_dim": (nn.BatchNorm2d, "_check_input_dim"),
    "Module._call_impl": (nn.Module, "_call_impl"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute = PATCHES[name]
    original = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *args: original(*args))
    assert at_once(make(), X) is None


def test_inputs() -> None:
    block = make()
    for x in (X[0], X.as_subclass(Logged), X[:0]):
        assert at_once(block, x) is None
    assert at_once(block, X[:1]) is not None
    seen: list[Any] = []
    torch.func.vmap(lambda x: seen.append(at_once(block, x[None])) or x)(X)
    assert seen == [None]


# ---- what turns out in the middle ----------------------------------------------------------------
def test_a_shortcut_that_is_broadcast() -> None:
    block, plain = make("basic_down"), make("basic_down")
    for m in (block, plain):
        m.downsample[0].stride = (6, 6)
        m.get_submodule("conv1").stride = (2, 2)
    with dispatch.recording() as events:
        y = at_once(block, X)
    assert y is not None
    why = "the shortcut has another shape than the branch"
    assert ("batch_norm_act", "reference", why) in events
    torch.testing.assert_close(y, plain._plain_forward(X), rtol=1e-9, atol=1e-9)
    assert_same(dict(block.named_buffers()), dict(plain.named_buffers()))


def test_a_norm_of_another_size_names_the_argument_and_keeps_its_statistics() -> None:
    block = make()
    block.bn2 = nn.BatchNorm2d(5).double()
    before = {name: b.clone() for name, b in block.bn2.named_buffers()}
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        block(X)
    for name, buffer in block.bn2.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_own_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors from which one of convolution.py may be faster go to it."""
    asked: list[Any] = []

    def conv2d(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
        asked.append(weight)
        return F.conv2d(x, weight, None, *arguments)

    monkeypatch.setattr(convolution, "FROM_NUMEL", X.numel())
    monkeypatch.setattr(convolution, "conv2d", conv2d)
    monkeypatch.setattr(convolution, "conv2d_and_input", lambda x, *rest: (conv2d(x, *rest), x))
    block = make().eval()
    block(X)
    assert len(asked) == 2
    assert asked[0] is block.conv1.weight
    assert asked[1] is block.downsample[0].weight
    # Float32 in NCHW, for which there is no kernel, does not ask.
    block.float()(X.float())
    assert len(asked) == 2
    block(X.float().contiguous(memory_format=torch.channels_last))
    assert len(asked) == 4
