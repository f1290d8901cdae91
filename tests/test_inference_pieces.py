# SPDX-License-Identifier: BSD-3-Clause
"""A batch in pieces: the graph's segments, the levels of pieces, and the memory of a call."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import shims
import torch
from inference_cases import agrees, image, lively, seeded
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import batches
from resnet_fast.inference.batches import Level, Segment
from resnet_fast.inference.trace import check_shape

torchvision: Any = shims.torchvision_or_skip()
from torchvision import models as tv  # noqa: E402

X = image(2, 3, 64, 64)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return lively(seeded(lambda: tv.resnet18(num_classes=10))).eval()


@pytest.fixture(scope="module")
def fast18(resnet18: nn.Module) -> Any:
    return rf.optimize_for_inference(resnet18, X)


def planned(fast: Any, *shape: int) -> tuple[list[Segment], list[Level], dict[Any, int]]:
    sizes = check_shape(fast.trace, [torch.empty(shape, device="meta")])
    segments = batches.cut(fast.trace)
    return segments, batches.levels(segments, sizes, shape[0]), sizes


# Pieces of the sizes between in `make test-slow`.
@pytest.mark.parametrize(
    ("limit", "batch"),
    [(batches.PIECE_BYTES, n) for n in (1, 2, 3, 5, 8, 13, 33, 65)]
    + [
        pytest.param(1 << 18, n, marks=() if n in (13, 65) else pytest.mark.slow)
        for n in (1, 2, 3, 5, 8, 13, 33, 65)
    ],
)
def test_batch_sizes(
    resnet18: nn.Module, batch: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one example; with the small limit the batch runs in pieces."""
    monkeypatch.setattr(batches, "PIECE_BYTES", limit)
    fast = rf.optimize_for_inference(resnet18, X[:1])
    assert batch < 13 or limit != 1 << 18 or len(planned(fast, batch, 3, 32, 32)[1]) > 1
    agrees(fast, resnet18, image(batch, 3, 32, 32))


def test_pieces_are_powers_of_two_and_whole() -> None:
    for batch in range(40):
        for piece in (1, 2, 4, 8):
            sizes = batches.split(batch, piece)
            assert sum(sizes) == batch
            assert sizes == [batch] if batch <= piece else set(sizes) <= {1, 2, 4, piece}
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("batch", [1, 2, 13, 16, 64])
def test_a_level_is_as_large_as_its_memory_lets_it(
    fast18: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no larger than the next one, of whose pieces it makes pieces."""
    monkeypatch.setattr(batches, "PIECE_BYTES", 1 << 20)
    segments, levels, sizes = planned(fast18, batch, 3, 64, 64)
    assert [level.first for level in levels] == [0, *(level.last for level in levels[:-1])]
    assert levels[-1].last == len(segments)
    assert [level.piece for level in levels] == sorted({level.piece for level in levels})
    assert len(levels) >= (3 if batch >= 64 else 1)
    for level in levels:
        inside = segments[level.first : level.last]
        alive = max(batches.alive_bytes(s, sizes) for s in inside) / batch
        assert level.piece == 1 or level.piece * alive <= 1 << 20
        assert level.piece == batch or 2 * level.piece * alive > 1 << 20


def test_segments_meet_in_one_value(fast18: Any) -> None:
    """Cut before and after each block, and never within one."""
    segments = batches.cut(fast18.trace)
    assert [len(s.nodes) for s in segments] == [1, 2, 2, *[3, 2] * 3, 1, 1, 1, 1]
    for before, after in itertools.pairwise(segments):
        assert after.takes == [before.nodes[-1]]


class Skip(nn.Module):
    """The first value is read at the end, so nothing before that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([self.b(torch.sigmoid(y)), y], 1)


def test_a_value_that_is_read_later_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE_BYTES", 1)
    model = Skip()
    fast = rf.optimize_for_inference(model, X)
    assert [len(s.nodes) for s in batches.cut(fast.trace)] == [1, 3, 1]
    agrees(fast, model, image(3, 3, 16, 16))


def peak(call: Any, folder: Path) -> int:
    """The most bytes of tensors that were alive at once in a call, of those it made."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_call_takes_less_than_half_of_eagers_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tensors, on pictures with a quarter of the usual sides."""
    monkeypatch.setattr(batches, "PIECE_BYTES", batches.PIECE_BYTES // 16)
    model = lively(getattr(tv, name)()).eval()
    x = image(16, 3, 56, 56)
    fast = rf.optimize_for_inference(model, x)
    with torch.no_grad():
        eager = peak(lambda: model(x), tmp_path)
    allocated = peak(lambda: fast(x), tmp_path)
    assert fast.kept_bytes > 0
    assert allocated + fast.kept_bytes < 0.45 * eager


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_is_counted_is_what_is_alive(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is what the plan counts, and a call allocates a copy of its input at most."""
    monkeypatch.setattr(batches, "PIECE_BYTES", 1 << 40)
    fast: Any = rf.optimize_for_inference(lively(getattr(tv, name)(num_classes=10)), X)
    x = image(9, 3, 80, 80)
    segments, _, sizes = planned(fast, *x.shape)
    counted = max(batches.alive_bytes(segment, sizes) for segment in segments)
    copy, small = 4 * x.numel(), 1 << 16
    assert peak(lambda: fast(x), tmp_path) <= copy + small
    assert 0.9 * counted <= fast.kept_bytes <= 1.02 * counted + small
    rows = x.to(memory_format=torch.channels_last)
    last = 4 * 9 * 3 * 3 * (512 if name == "resnet18" else 2048)  # pooled, by PyTorch
    assert 0 < peak(lambda: fast(rows), tmp_path) <= last + small
