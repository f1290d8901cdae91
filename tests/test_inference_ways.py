# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels run which conv on the CPU: ours, or oneDNN's for groups and odd C_out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inference_cases import Net, agrees, image, lively, table
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.inference import cpu, direct

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


def summed(**options: Any) -> Net:
    """conv + bn, + relu, and two convs onto it: one over its memory, one beside it."""
    cin, cout = options.pop("channels")

    def run(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.n(m.a(x)))
        z = torch.relu(m.b(x) + y)  # nobody reads y again
        return m.c(x) + z, z

    names = ("a", "b", "c")
    convs = {name: nn.Conv2d(cin, cout, **options) for name in names}
    return lively(Net(run, **convs, n=nn.BatchNorm2d(cout)))


WAYS: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 1, "channels": (24, 48)}, cpu.DIRECT),
    ({"kernel_size": 1, "stride": 2, "channels": (16, 32)}, cpu.DIRECT),
    ({"kernel_size": 3, "stride": 2, "padding": 1, "channels": (16, 16)}, cpu.DIRECT),
    ({"kernel_size": 3, "padding": 1, "channels": (17, 16)}, cpu.DIRECT),
    ({"kernel_size": 3, "padding": 2, "dilation": 2, "channels": (16, 80)}, cpu.DIRECT),
    ({"kernel_size": (1, 5), "padding": (0, 2), "bias": False, "channels": (9, 16)}, cpu.DIRECT),
    ({"kernel_size": 3, "padding": 1, "channels": (16, 16)}, cpu.WINOGRAD),
    ({"kernel_size": 3, "padding": 1, "channels": (16, 20)}, cpu.PACKED),
    ({"kernel_size": 1, "stride": 2, "channels": (16, 20)}, cpu.PACKED),
    ({"kernel_size": 3, "padding": 1, "groups": 2, "channels": (16, 32)}, cpu.PACKED),
    ({"kernel_size": 3, "stride": 2, "groups": 16, "channels": (16, 32)}, cpu.PACKED),
]


def check(options: dict[str, Any], way: str) -> None:
    net = summed(**options)
    channels = options["channels"][0]
    fast = rf.optimize_for_inference(net, image(2, channels, 13, 12))
    found = table(fast)
    assert {found[name][1] for name in "abc"} == {way}
    assert {found[name][0] for name in "abc"} == {
        "conv + bn + relu",
        "conv + add (in place) + relu",
        "conv + add",
    }
    for n, *size in ((2, 13, 12), (1, 5, 30), (3, 13, 12)):
        agrees(fast, net, image(n, channels, *size, seed=6))


@pytest.mark.parametrize(("options", "way"), WAYS, ids=str)
def test_ways(options: dict[str, Any], way: str) -> None:
    """With sums in place and not, and at sizes never seen before."""
    check(options, way)


def test_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension was not built."""
    monkeypatch.setattr(direct, "suits", lambda spec, weight: False)
    for options, _ in WAYS[::3]:
        check(options, cpu.PACKED)


def test_pooled_convs_that_are_no_stem() -> None:
    """The max-pooling runs by itself behind a dilated conv, one of many channels, or of groups."""
    for way, options in (
        (cpu.DIRECT, {"in_channels": 3, "dilation": 2}),
        (cpu.DIRECT, {"in_channels": 20, "stride": 2}),
        (cpu.PACKED, {"in_channels": 4, "groups": 2}),
        (cpu.POOLED_STEM, {"in_channels": 3, "stride": 2}),
    ):
        a = nn.Conv2d(out_channels=16, kernel_size=3, padding=2, **options)
        net = Net(lambda m, x: m.p(torch.relu(m.a(x))), a=a, p=nn.MaxPool2d(3, 2, 1))
        x = image(2, options["in_channels"], 15, 17)
        fast = rf.optimize_for_inference(net, x)
        assert table(fast)["a"] == ("conv + relu + max-pool", way)
        agrees(fast, net, x)
