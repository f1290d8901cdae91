# SPDX-License-Identifier: BSD-3-Clause
"""Values in kept memory: which lie there, that no two collide, and that no result ever does."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import shims
import torch
from inference_cases import Net, eager, image, lively
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import resnet_fast as rf
from resnet_fast.inference import batches
from resnet_fast.inference.fuse import fused_conv
from resnet_fast.inference.memory import Layout, Place
from resnet_fast.inference.schedule import Block, Schedule

X = image(3, 3, 32, 32)

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2)


def resnet(name: str = "resnet18") -> nn.Module:
    models = shims.torchvision_or_skip().models
    return lively(getattr(models, name)(num_classes=10)).eval()


def block(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.b(torch.relu(m.a(x))) + x)


def pyramid(m: Any, x: Tensor) -> list[Tensor]:
    """Maps of several sizes, of which one is a conv's own and read by another."""
    first = torch.relu(m.a(torch.relu(m.s(x))))
    second = torch.relu(m.b(first))
    third = torch.relu(m.c(second))
    top = m.p(third)
    below = m.q(second) + nn.functional.interpolate(top, scale_factor=2.0, mode="nearest")
    return [first, m.r(below), top]


# Each with what of memory could be handed out by mistake.
NETS: dict[str, Callable[[], Net]] = {
    "a conv's own": lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 16), b=conv(16, 16)),
    "one conv": lambda: Net(lambda m, x: m.a(x), a=conv(3, 16)),
    "a sum in place": lambda: Net(
        lambda m, x: block(m, m.q(m.s(x))),
        s=conv(3, 64), q=conv(64, 16), a=conv(16, 16), b=conv(16, 16),
    ),
    "sums in place": lambda: Net(
        lambda m, x: block(m, block(m, m.q(m.s(x)))),
        s=conv(3, 64), q=conv(64, 16), a=conv(16, 16), b=conv(16, 16),
    ),
    "a sum's view": lambda: Net(
        lambda m, x: block(m, m.q(m.s(x))).flatten(1),
        s=conv(3, 64), q=conv(64, 16), a=conv(16, 16), b=conv(16, 16),
    ),
    "a view": lambda: Net(lambda m, x: m.b(m.a(x)).flatten(1), a=conv(3, 16), b=conv(16, 16)),
    "a view on the way": lambda: Net(
        lambda m, x: (lambda y: [y.flatten(1), m.b(y)])(m.a(x)), a=conv(3, 16), b=conv(16, 16)
    ),
    "a part": lambda: Net(lambda m, x: m.b(m.a(x))[:, 3:7], a=conv(3, 16), b=conv(16, 16)),
    "the input": lambda: Net(lambda m, x: [x, m.a(x)], a=conv(3, 16)),
    "a view of the input": lambda: Net(lambda m, x: [x[:, :2], m.a(x)], a=conv(3, 16)),
    "a residual": lambda: Net(
        lambda m, x: (lambda y: [y, torch.relu(m.b(m.c(y)) + y)])(m.a(x)),
        a=conv(3, 16), b=conv(16, 16), c=conv(16, 16),
    ),
    "both branches": lambda: Net(
        lambda m, x: (lambda y: (m.b(y), torch.relu(m.c(y)), m.d(m.b(y))))(m.a(x)),
        a=conv(3, 32), b=conv(32, 16), c=conv(32, 16), d=conv(16, 16),
    ),
    "pyramid": lambda: Net(
        pyramid,
        s=conv(3, 16), a=conv(16, 32), b=conv(32, 32, 3, 2), c=conv(32, 48, 3, 2),
        p=conv(48, 16, 1), q=conv(32, 16, 1), r=conv(16, 16),
    ),
    "pooled": lambda: Net(
        lambda m, x: m.f(m.p(block(m, m.m(torch.relu(m.s(x))))).flatten(1)),
        s=conv(3, 16, 7, 2), m=nn.MaxPool2d(3, 2, 1), a=conv(16, 16), b=conv(16, 16),
        p=nn.AdaptiveAvgPool2d(1), f=nn.Linear(16, 5),
    ),
    "oneDNN between": lambda: Net(
        lambda m, x: m.c(torch.relu(m.b(m.a(x)))), a=conv(3, 16), b=conv(16, 24), c=conv(24, 16)
    ),
    "its residual by oneDNN": lambda: Net(
        lambda m, x: torch.relu(m.b(y := m.a(x)) + m.c(y)),
        a=conv(3, 16), b=nn.Conv2d(16, 16, 3, padding=1, groups=2), c=conv(16, 16),
    ),
}  # fmt: skip
LIMITS = (batches.PIECE_BYTES, 1 << 19, 1 << 17, 1)


def net(name: str) -> nn.Module:
    return lively(NETS[name]()).eval()


def random_net(seed: int) -> Net:
    """Convs, sums, ReLUs and concatenations of whatever was computed before."""
    choose = random.Random(seed)
    modules: dict[str, nn.Module] = {"first": conv(3, 16)}
    steps: list[tuple[Any, ...]] = []
    channels = [16]
    for number in range(choose.randint(4, 10)):
        at = choose.randrange(max(0, len(channels) - 3), len(channels))
        same = [i for i, c in enumerate(channels) if c == channels[at]]
        kind = choose.choice(["conv", "conv", "sum", "sum", "relu", "cat"])
        out = channels[at]
        if kind == "cat" and sum(channels[-2:]) < 100:
            steps.append(("cat", -1, len(channels) - max(2, len(channels)) % 2 - 1))
            out = channels[-1] + channels[steps[-1][2]]
        elif kind == "relu":
            steps.append(("relu", at))
        else:
            out = out if kind == "sum" else choose.choice([16, 24, 32])
            modules[f"c{number}"] = conv(channels[at], out, choose.choice([1, 3]))
            onto = choose.choice(same) if kind == "sum" else None
            steps.append(("conv", at, f"c{number}", onto, choose.random() < 0.6))
        channels.append(out)
    outputs = choose.sample(range(len(channels)), choose.choice([1, 1, 2]))

    def forward(m: Any, x: Tensor) -> Any:
        values = [torch.relu(m.first(x))]
        for kind, at, *rest in steps:
            if kind == "cat":
                values.append(torch.cat([values[at], values[rest[0]]], 1))
            elif kind == "relu":
                values.append(torch.relu(values[at]))
            else:
                name, onto, relu = rest
                y = getattr(m, name)(values[at])
                y = y if onto is None else y + values[onto]
                values.append(torch.relu(y) if relu else y)
        return [values[-1], *(values[i] for i in outputs)]

    return Net(forward, **modules)


# ---- what of an optimized module the tests look at -----------------------------------------------
def schedules(fast: Any) -> list[Schedule]:
    return [*fast._run._seen.values()]


def blocks(fast: Any) -> list[Block]:
    found: list[Block] = fast._run._program._blocks
    return found


def spoil(fast: Any) -> None:
    """Nothing that a call left in kept memory may matter to the next."""
    for kept in blocks(fast):
        kept._memory.fill_(float("nan"))


def tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def copies(result: Any) -> list[Tensor]:
    return [t.clone() for t in tensors(result)]


def same(ours: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def storages(values: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in values}


def in_memory_of_their_own(fast: Any, x: Tensor) -> list[Tensor]:
    """What the same functions give where nothing is kept and nothing is a sequence."""
    with torch.no_grad():
        return tensors(fast._run._program(fast._run._ready(x)))


def owners(nodes: Sequence[fx.Node], found: Layout, convs: Sequence[fx.Node]) -> dict[Any, Place]:
    """Where each value lies: a sum in place lies where its residual does."""
    places: dict[Any, Place] = {}
    for node in nodes:
        if node.target is not fused_conv:
            continue
        residual, spec = node.args[1], node.args[2]
        if residual is not None and spec.inplace:  # type: ignore[union-attr]
            if residual in places:
                places[node] = places[residual]
        elif node in convs and convs.index(node) in found.places:
            places[node] = found.places[convs.index(node)]
    return places


def check_layouts(fast: Any) -> int:
    """No two values alive at once overlap, in any level; returns how many lie in kept memory."""
    program, count = fast._run._program, 0
    convs = list(program._convs)
    for schedule in schedules(fast):
        for (at, _), found in schedule.layouts.items():
            level = schedule.levels[at]
            inside = program._segments[level.first : level.last]
            nodes = [node for segment in inside for node in segment.nodes]
            places = owners(nodes, found, convs)
            order = {node: number for number, node in enumerate(nodes)}
            last = {n: max((order.get(u, len(nodes)) for u in n.users), default=0) for n in places}
            for number, node in enumerate(nodes):
                alive = {places[n] for n in places if order[n] <= number <= last[n]}
                for one, two in itertools.combinations(sorted(alive, key=lambda p: p.offset), 2):
                    assert one.offset + numel(one) <= two.offset, f"{node}: {one} and {two}"
            for place in found.places.values():
                assert 0 <= place.offset <= found.floats - numel(place)
            for node in places:
                assert all(user.op == "call_function" for user in node.users), f"{node} is a result"
            count += len(places)
            assert schedule.behind + found.floats <= schedule.floats
        fronts = [place for place in schedule.boundaries if place is not None]
        for one, two in itertools.pairwise(sorted(fronts, key=lambda p: p.offset)):
            assert one.offset + numel(one) <= two.offset
        assert all(place.offset + numel(place) <= schedule.behind for place in fronts)
    return count


def numel(place: Place) -> int:
    n, c, h, w = place.shape
    return n * c * h * w


def agrees(fast: Any, model: nn.Module, x: Tensor) -> None:
    """But for rounding, with which test_inference.py is strict: no value is another one's."""
    for ours, right in zip(tensors(fast(x)), tensors(eager(model, x, torch.float64)), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-3, atol=1e-4)


def check_results(fast: Any, x: Tensor) -> None:
    """Held results stay, share nothing with kept memory, and owe nothing to what lay there."""
    held = fast(x)
    first = copies(held)
    other = fast(torch.randn_like(x))
    assert same(tensors(held), first), "a later call wrote into a result"
    kept = {b._memory.untyped_storage().data_ptr() for b in blocks(fast) if b._memory.numel()}
    assert kept.isdisjoint(storages([*tensors(held), *tensors(other)]))
    spoil(fast)
    assert same(tensors(held), first), "a result lies in kept memory"
    assert same(tensors(fast(x)), first), "a value of the call before was read"


# ---- layouts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", LIMITS[:3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_layouts_of_resnets(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE_BYTES", limit)
    fast: Any = rf.optimize_for_inference(resnet(name), image(2, 3, 64, 64))
    for batch, size in ((1, 64), (3, 64), (5, 33)):
        fast(image(batch, 3, size, size))
    assert check_layouts(fast) > 15
    check_results(fast, image(5, 3, 33, 33))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NETS)
def test_nets(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to hand out kept memory, whole and in pieces."""
    monkeypatch.setattr(batches, "PIECE_BYTES", limit)
    model = net(name)
    fast: Any = rf.optimize_for_inference(model, X)
    for batch in (1, 4, 7):
        x = image(batch, 3, 32, 32, seed=batch)
        agrees(fast, model, x)
        check_results(fast, x)
    check_layouts(fast)


@pytest.mark.parametrize("seed", range(12))
def test_random_nets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(random_net(seed)).eval()
    x = image(4, 3, 16, 20)
    fast: Any = rf.optimize_for_inference(model, x)
    assert same(tensors(fast(x)), in_memory_of_their_own(fast, x)), "other bits"
    agrees(fast, model, x)
    for limit in LIMITS[1:]:
        monkeypatch.setattr(batches, "PIECE_BYTES", limit)
        fast.refresh(model)
        agrees(fast, model, x)
        check_results(fast, x)
        check_layouts(fast)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_bits_of_memory_of_their_own(name: str) -> None:
    fast: Any = rf.optimize_for_inference(resnet(name), X)
    for x in (X, X[:1]):
        assert same([fast(x)], in_memory_of_their_own(fast, x))
        assert len(schedules(fast)[0].levels) == 1


def test_a_value_that_a_hook_sees_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one in whose memory a value comes to lie that it sees."""
    model = net("sums in place")
    seen: list[Tensor] = []
    for name in ("q", "b", ""):
        model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y))
    for limit in LIMITS:
        monkeypatch.setattr(batches, "PIECE_BYTES", limit)
        fast: Any = rf.optimize_for_inference(model, X)
        seen.clear()
        fast(X)
        held, first = [*seen], copies(seen)
        assert held
        fast(torch.randn_like(X))
        spoil(fast)
        assert same(held, first)


def test_the_last_level_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last values are several, or large: the pieces that remain have places as well."""
    monkeypatch.setattr(batches, "PIECE_BYTES", 1 << 19)
    model = net("a residual")
    fast: Any = rf.optimize_for_inference(model, X)
    for batch in range(1, 18):
        agrees(fast, model, image(batch, 3, 32, 32))
    pieces = [level.piece for level in schedules(fast)[-1].levels]
    assert 1 < pieces[-1] < 17
    check_layouts(fast)


# ---- inputs --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a conv's own", "pooled"])
def test_inputs_with_gaps(name: str) -> None:
    """Channels-last by their strides, but not dense."""
    model = net(name)
    fast = rf.optimize_for_inference(model, X)
    wide = image(3, 5, 40, 40).to(memory_format=torch.channels_last)
    for x in (
        wide[:, :3],
        wide[:, 1:4, ::2],
        wide[:, 2:, 3:],
        wide[:, :3, :, 1:33],
        wide[::2, :3],
        wide[:1, :3].expand(4, -1, -1, -1),
        wide[:, :3].flip(3),
    ):
        kept = x.clone()
        agrees(fast, model, x)
        assert torch.equal(x, kept)


def test_inputs_are_not_written_and_keep_their_version() -> None:
    fast = rf.optimize_for_inference(net("a conv's own"), X)
    x = X.to(memory_format=torch.channels_last, copy=True)
    version = x._version
    right = fast(x)
    assert torch.equal(x, X)
    assert x._version == version
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for given in (leaf, leaf * 1, (leaf * 1).view_as(leaf)):
        y = fast(given)
        assert torch.equal(y, right)
        assert not y.requires_grad


def test_inference_mode_and_no_grad_in_turn() -> None:
    """Memory made in one is written in the other, and inputs of either are taken."""
    for first in (torch.inference_mode, torch.no_grad):
        fast: Any = rf.optimize_for_inference(resnet(), X)
        with first():
            right = fast(X)
        modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
        for inside, outside in itertools.product(modes, repeat=2):
            with inside():
                x = X.to(memory_format=torch.channels_last, copy=True)
                y = fast(x)
            with outside():
                again = fast(x)
            assert torch.equal(y, right)
            assert torch.equal(again, right)
        assert not blocks(fast)[0]._memory.is_inference()


# ---- blocks --------------------------------------------------------------------------------------
def test_sizes_up_and_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Block, as large as the largest; every size gives what it gave the first time."""
    model = resnet()
    for limit in (LIMITS[0], 1 << 18):
        monkeypatch.setattr(batches, "PIECE_BYTES", limit)
        fast: Any = rf.optimize_for_inference(model, image(2, 3, 64, 64))
        shapes = [(1, 40), (2, 64), (1, 33), (5, 32), (2, 48), (1, 64)]
        inputs = [image(n, 3, size, size) for n, size in shapes]
        first = [fast(x).clone() for x in inputs]
        for turn in (1, -1, 1):
            for x, right in list(zip(inputs, first, strict=True))[::turn]:
                spoil(fast)
                assert torch.equal(fast(x), right)
        assert len(blocks(fast)) == 1
        assert blocks(fast)[0]._memory.numel() == max(s.floats for s in schedules(fast))
        check_layouts(fast)


@pytest.mark.parametrize("batch", range(1, 18))
def test_pieces(batch: int, fast_in_pieces: tuple[Any, nn.Module]) -> None:
    fast, model = fast_in_pieces
    x = image(batch, 3, 32, 32, seed=batch)
    agrees(fast, model, x)
    check_results(fast, x)
    check_layouts(fast)
    levels = schedules(fast)[-1].levels
    assert levels[0].piece < batch or batch < 9


@pytest.fixture(params=["resnet18", "sums in place"])
def fast_in_pieces(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, nn.Module]:
    monkeypatch.setattr(batches, "PIECE_BYTES", 1 << 18)
    model = resnet() if request.param == "resnet18" else net(request.param)
    return rf.optimize_for_inference(model, X), model


def test_threads_have_blocks_of_their_own() -> None:
    """As many as calls that run at once, met in a hook; later calls make no more."""
    model = lively(rf.models.resnet20()).eval()
    barrier = threading.Barrier(3, timeout=60)
    meet = [True]

    def hook(m: Any, args: Any, y: Tensor) -> None:
        if meet[0]:
            barrier.wait()

    model.get_submodule("layer2").register_forward_hook(hook)
    fast: Any = rf.optimize_for_inference(model, X)
    inputs = [image(n, 3, 32, 32, seed=n) for n in (1, 2, 3)]
    meet[0] = False
    right = [fast(x).clone() for x in inputs]
    meet[0] = True
    found: dict[tuple[int, int], Tensor] = {}

    def work(number: int) -> None:
        for turn in range(4):
            found[number, turn] = fast(inputs[(number + turn) % 3])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for (number, turn), y in found.items():
        assert torch.equal(y, right[(number + turn) % 3])
    assert len(blocks(fast)) == 3
    assert len({b._memory.data_ptr() for b in blocks(fast)}) == 3


def test_a_call_within_a_call() -> None:
    """A hook that calls the module again has other memory."""
    model = lively(rf.models.resnet20()).eval()
    inner: list[Tensor] = []
    depth = [1]  # none of the calls so far

    def again(m: Any, args: Any, y: Tensor) -> None:
        if depth[0] == 0:
            depth[0] = 1
            inner.append(fast(X + 1))

    model.get_submodule("layer2").register_forward_hook(again)
    fast: Any = rf.optimize_for_inference(model, X)
    right, other = fast(X).clone(), fast(X + 1).clone()
    depth[0] = 0
    assert torch.equal(fast(X), right)
    assert torch.equal(inner[0], other)
    assert len(blocks(fast)) == 2


def test_a_call_that_raises_gives_its_block_back() -> None:
    model = lively(rf.models.resnet20()).eval()
    fail = [False]

    def hook(m: Any, args: Any, y: Tensor) -> None:
        if fail[0]:
            raise KeyError("on purpose")

    model.get_submodule("layer3.0").register_forward_hook(hook)
    fast: Any = rf.optimize_for_inference(model, X)
    right = fast(X).clone()
    (only,) = blocks(fast)
    for _ in range(3):
        fail[0] = True
        with pytest.raises(KeyError, match="on purpose"):
            fast(X)
        fail[0] = False
        assert blocks(fast) == [only]
        assert torch.equal(fast(X), right)


def test_refresh_while_results_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in LIMITS[:3]:
        monkeypatch.setattr(batches, "PIECE_BYTES", limit)
        model = net("pyramid")
        fast: Any = rf.optimize_for_inference(model, X)
        held = fast(X)
        first = copies(held)
        with torch.no_grad():
            model.get_submodule("a").weight.mul_(-1)
        fast.refresh(model)
        agrees(fast, model, X)
        check_results(fast, X)
        assert same(tensors(held), first)
        assert not same(tensors(fast(X)), first)


# ---- sequences -----------------------------------------------------------------------------------
def recipes(fast: Any) -> int:
    """How many of the calls are sequences."""
    calls = [c for s in schedules(fast) for found in s.calls.values() for c in found]
    return sum(not isinstance(call, int) for call in calls)


def test_a_model_without_a_recipe() -> None:
    """Its result lies where a value in the middle of the run did, which so has no place."""
    model = net("sums in place")
    fast: Any = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    assert recipes(fast) == 0
    check_results(fast, X)


def test_without_recipes_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.inference import schedule

    for name in ("resnet18", "pooled", "oneDNN between"):
        model = resnet() if name == "resnet18" else net(name)
        for limit in LIMITS[:3]:
            monkeypatch.setattr(batches, "PIECE_BYTES", limit)
            x = image(6, 3, 32, 32)
            fast: Any = rf.optimize_for_inference(model, x)
            right = copies(fast(x))
            assert recipes(fast) > 0
            with monkeypatch.context() as patch:
                patch.setattr(schedule, "recipe", lambda *args: None)
                plain: Any = rf.optimize_for_inference(model, x)
                assert same(tensors(plain(x)), right)
                assert recipes(plain) == 0
                check_results(plain, x)
