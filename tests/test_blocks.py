# SPDX-License-Identifier: BSD-3-Clause
"""Fused blocks against untouched twins: states of the norms, and other modules in their places.

Each case does the same thing to a torchvision block and to its accelerated twin (twins.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision_blocks import KINDS, Change, X, check, make, run_twins
from twins import Log, assert_same, image, randomise, reasons, step, twin

import resnet_fast as rf
from resnet_fast import blocks, dispatch
from resnet_fast.convert import accelerate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_fused_block_is_the_plain_block(kind: str, training: bool, steps: int) -> None:
    check(kind, lambda m, _: m.train(training) and None, None, steps)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_backend(backend: str) -> None:
    with rf.use_backend(backend):
        fell_back = run_twins("bottleneck_down", lambda *_: None)
    if backend == "reference":
        assert fell_back == 4 * [("batch_norm_act", "use_backend('reference')")]


# ---- other modules in the places of ours ---------------------------------------------------------
class GuidedReLU(nn.Module):
    """Springenberg et al. 2015: only positive gradients pass."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.clamp(min=0) * (ctx.saved_tensors[0] > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x)


class MyNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class LowRank(nn.Module):
    """A convolution with a trained low-rank addition, as LoRA has it."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain
        self.down, self.up = conv(8, 2), conv(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.up(self.down(x))


def replace(name: str, build: Callable[[nn.Module], Any]) -> Change:
    def change(m: Any, _: Log) -> None:
        torch.manual_seed(6)
        at, _, child = name.rpartition(".")
        parent = m.get_submodule(at)
        setattr(parent, child, build(m.get_submodule(name)))

    return change


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False, dtype=torch.float64)


def resnet_d(old: Any) -> Any:
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv(8, 8), old[1])


REPLACED: dict[str, tuple[str, Callable[[Any], Any], str | None]] = {
    "guided_relu": ("relu", lambda _: GuidedReLU(), "relu is a GuidedReLU, not exactly nn.ReLU"),
    "leaky_relu": ("relu", lambda _: nn.LeakyReLU(0.1, True), "relu is a LeakyReLU"),
    "relu_not_in_place": ("relu", lambda _: nn.ReLU(), None),
    "group_norm": ("bn1", lambda _: nn.GroupNorm(2, 8).double(), "bn1 is a GroupNorm"),
    "own_norm": ("bn2", lambda _: MyNorm(8).double(), "bn2 is a MyNorm, not exactly nn.Batch"),
    "identity_norm": ("bn2", lambda _: nn.Identity(), "bn2 is a Identity"),
    "identity_conv": ("conv2", lambda _: nn.Identity(), None),
    "lora": ("conv2", LowRank, None),
    "tucker": ("conv2", lambda _: nn.Sequential(conv(8, 3), conv(3, 8)), None),
    "shortcut_without_norm": ("downsample", lambda _: conv(8, 8, 2), None),
    "shortcut_ending_in_conv": ("downsample", lambda old: nn.Sequential(old[0]), None),
    "resnet_d_shortcut": ("downsample", resnet_d, None),
    "shortcut_of_own_class": (
        "downsample",
        lambda old: type("Own", (nn.Sequential,), {})(*old),
        "downsample is a Own, not exactly nn.Sequential",
    ),
    "own_norm_in_shortcut": (
        "downsample.1",
        lambda _: MyNorm(8).double(),
        "the end of downsample is a MyNorm",
    ),
    "pooled_shortcut": (
        "downsample",
        lambda _: nn.AdaptiveAvgPool2d(1),
        "the shortcut has another shape",
    ),
}


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_modules(case: str) -> None:
    name, build, why = REPLACED[case]
    check("basic_down", replace(name, build), why, steps=2)


def test_deleted_modules_give_the_error_of_the_plain_block() -> None:
    for change, error in (
        (lambda m: setattr(m, "bn1", None), TypeError),
        (lambda m: delattr(m, "bn2"), AttributeError),
        (lambda m: delattr(m, "relu"), AttributeError),
        (lambda m: delattr(m, "downsample"), AttributeError),
    ):
        block = make("basic")
        change(block)
        with pytest.raises(error) as theirs:
            block(X)
        with dispatch.recording() as events, pytest.raises(error) as ours:
            accelerate(block)(X)
        assert str(ours.value) == str(theirs.value)
        said = {event.reason for event in events if event.op == "BasicBlock"}
        assert all(reason.endswith(" is None or missing") for reason in said)


def test_module_replaced_by_a_function() -> None:
    def change(m: Any, _: Log) -> None:
        del m.relu
        m.relu = F.gelu

    check("basic", change, "relu is a builtin_function_or_method")


def test_forward_replaced_on_the_object() -> None:
    for name in ("bn1", "bn2", "relu"):

        def change(m: Any, log: Log, name: str = name) -> None:
            part = m.get_submodule(name)
            plain = part.forward

            def forward(x: Tensor) -> Tensor:
                log.add(name, x)
                return plain(x) * 3

            part.forward = forward

        check("basic", change, f"{name} has a forward of its own")


def test_a_submodule_compiled_by_itself() -> None:
    block = accelerate(make("basic"))
    block.bn1.compile(backend="eager")
    with torch.no_grad():
        assert reasons(lambda: block(X)) == [("BasicBlock", "bn1 was compiled by itself")]


def test_parametrized_and_pruned_norms() -> None:
    class Positive(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return F.softplus(w)

    def parametrized(m: Any, _: Log) -> None:
        nn.utils.parametrize.register_parametrization(m.bn1, "weight", Positive())

    def pruned(m: Any, _: Log) -> None:
        torch.manual_seed(0)
        prune.random_unstructured(m.bn2, "weight", 0.5)

    def pruned_conv(m: Any, _: Log) -> None:
        prune.l1_unstructured(m.conv2, "weight", 0.5)
        nn.utils.parametrizations.weight_norm(m.conv1)

    check("basic", parametrized, None, steps=2)
    check("basic", pruned, None, steps=2)
    check("basic", pruned_conv, None, steps=2)


def test_sync_batch_norm_is_fused() -> None:
    """In one process it is a BatchNorm2d; over several: tests/uses/test_u29_many_processes.py."""
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(make("basic"))
    assert type(plain.bn1) is nn.SyncBatchNorm
    block = accelerate(twin(plain))
    assert not reasons(lambda: assert_same(step(block, X), step(plain, X)))


# ---- shared modules ------------------------------------------------------------------------------
def share_branch(m: Any, _: Log) -> None:
    m.bn2 = m.bn1


def share_shortcut(m: Any, _: Log) -> None:
    m.downsample[1] = m.bn2


def share_buffers(m: Any, _: Log) -> None:
    for name in ("running_mean", "running_var"):
        setattr(m.downsample[1], name, getattr(m.bn2, name))


def share_deep(m: Any, _: Log) -> None:
    m.downsample = nn.Sequential(nn.Sequential(m.downsample[0], m.bn2), nn.BatchNorm2d(8).double())


def share_whole(m: Any, _: Log) -> None:
    m.conv1.stride, m.downsample = (1, 1), m.bn2


SHARED_WHY = "downsample holds the statistics of the block's last norm"


@pytest.mark.parametrize(
    ("share", "why"),
    [
        (share_branch, None),
        (share_shortcut, SHARED_WHY),
        (share_buffers, SHARED_WHY),
        (share_deep, SHARED_WHY),
        (share_whole, SHARED_WHY),
    ],
)
def test_one_norm_in_two_places(share: Change, why: str | None) -> None:
    check("basic_down", share, why, steps=3)


# ---- states of a batch norm ----------------------------------------------------------------------
def all_norms(change: Callable[[Any], Any]) -> Change:
    def apply(m: Any, _: Log) -> None:
        for norm in [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]:
            change(norm)

    return apply


def rebuilt(m: Any, **kwargs: Any) -> None:
    for name in ("bn1", "bn2", "downsample.1"):
        at, _, child = name.rpartition(".")
        norm = randomise(nn.BatchNorm2d(8, **kwargs), seed=len(name))
        setattr(m.get_submodule(at), child, norm)


def freeze(norm: Any) -> None:
    norm.eval().requires_grad_(False)


def frozen_with_gradients(norm: Any) -> None:
    norm.eval()


def drop_statistics(norm: Any) -> None:
    norm.running_mean = norm.running_var = None


def untrack(norm: Any) -> None:
    norm.track_running_stats = False


def untrack_eval(norm: Any) -> None:
    norm.eval().track_running_stats = False


STATES: dict[str, Change] = {
    "frozen": all_norms(freeze),
    "frozen_with_gradients": all_norms(frozen_with_gradients),
    "momentum_none": all_norms(lambda n: setattr(n, "momentum", None)),
    "momentum_0": all_norms(lambda n: setattr(n, "momentum", 0.0)),
    "momentum_1": all_norms(lambda n: setattr(n, "momentum", 1)),
    "other_eps": all_norms(lambda n: setattr(n, "eps", 0.1)),
    "no_statistics": lambda m, _: rebuilt(m, track_running_stats=False),
    "no_statistics_eval": lambda m, _: rebuilt(m, track_running_stats=False) or (m.eval() and None),
    "no_affine": lambda m, _: rebuilt(m, affine=False),
    "tracking_turned_off": all_norms(untrack),
    "tracking_turned_off_eval": all_norms(untrack_eval),
    "statistics_dropped": all_norms(drop_statistics),
    "counter_dropped": all_norms(lambda n: setattr(n, "num_batches_tracked", None)),
    "counter_dropped_momentum_none": all_norms(
        lambda n: (setattr(n, "num_batches_tracked", None), setattr(n, "momentum", None))
    ),
    "bias_dropped": all_norms(lambda n: n.register_parameter("bias", None)),
    "train_inside_eval": lambda m, _: m.eval().bn1.train() and None,
    "eval_inside_train": lambda m, _: m.bn2.eval() and None,
    "weight_in_front_of_the_parameter": all_norms(
        lambda n: n.__dict__.update(weight=torch.full((8,), 0.3).double())
    ),
    "statistics_in_front_of_the_buffers": all_norms(
        lambda n: n.__dict__.update(running_mean=torch.full((8,), 0.3).double())
    ),
    "weight_as_plain_tensor": all_norms(
        lambda n: (delattr(n, "weight"), setattr(n, "weight", torch.full((8,), 0.7).double()))
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_the_norms(state: str) -> None:
    check("basic_down", STATES[state], None, steps=3)


def test_one_statistic_without_the_other_is_left_to_pytorch() -> None:
    def change(m: Any, _: Log) -> None:
        m.bn1.running_var = None

    theirs = make("basic")
    ours = accelerate(twin(theirs))
    messages = []
    for m in (theirs, ours):
        change(m, Log())
        m.eval()
        with dispatch.recording() as events, pytest.raises(RuntimeError) as info:
            m(X)
        messages.append(str(info.value))
    assert messages[0] == messages[1]
    why = "the norm has one of running_mean and running_var without the other"
    assert events == [("batch_norm_act", "reference", why)]


def test_a_failed_call_leaves_the_statistics_alone() -> None:
    ours = accelerate(make("basic"))
    before = {k: b.clone() for k, b in ours.named_buffers()}
    for x in (X[:1, :, :1, :1], X[0], X[:, :3]):
        with pytest.raises((ValueError, RuntimeError)):
            ours(x)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 4, 4), (2, 3, 4, 4)])
def test_errors_are_pytorchs(shape: tuple[int, ...]) -> None:
    theirs = make("basic")
    ours = accelerate(twin(theirs))
    with pytest.raises((ValueError, RuntimeError)) as want:
        theirs(torch.randn(shape).double())
    with pytest.raises(want.type) as got:
        ours(torch.randn(shape).double())
    assert str(got.value) == str(want.value)


# ---- bn_act --------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("residual", [True, False])
def test_bn_act(activation: str | None, residual: bool) -> None:
    fused, plain = (randomise(nn.BatchNorm2d(8)) for _ in range(2))
    other = image(*X.shape, seed=9) if residual else None
    seen: list[Tensor] = []
    hooked = copy.deepcopy(plain)
    hooked.register_forward_hook(lambda _, __, out: seen.append(out))
    for _ in range(2):
        want = plain(X)
        want = want if other is None else want + other
        want = F.relu(want) if activation else want
        for norm in (fused, hooked):
            got = blocks.bn_act(norm, X, residual=other, activation=activation)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for norm in (fused, hooked):
        torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    assert len(seen) == 2
    assert reasons(lambda: blocks.bn_act(hooked, X)) == [
        ("batch_norm_act", "the norm has a forward hook")
    ]


def test_bn_act_refuses_other_activations() -> None:
    with pytest.raises(ValueError, match="activation must be \"relu\" or None; got 'gelu'"):
        blocks.bn_act(nn.BatchNorm2d(8), X, activation="gelu")
