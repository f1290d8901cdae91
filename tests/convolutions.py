# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions for the tests of convolution.py, and one of them by ours, eager and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import layouts
import oracle
import torch
import torch.nn.functional as F
import winograd
from cases import word
from torch import Tensor

from resnet_fast import _conv_ways, convolution, dispatch

HALVES = (torch.bfloat16, torch.float16)
PLAIN, POINTWISE, COLUMNS = _conv_ways.PLAIN, _conv_ways.POINTWISE, _conv_ways.COLUMNS
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Conv:
    kernel: int | Pair = 3
    stride: int | Pair = 1
    padding: int | Pair = 1
    dilation: int | Pair = 1
    groups: int = 1
    channels: Pair = (32, 48)
    n: int = 2
    size: Pair = (14, 13)

    def __str__(self) -> str:
        return "-".join(word(v) for v in vars(self).values())

    def arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """(x channels-last, weight, grad)."""
        c_in, c_out = self.channels
        kernel = pair(self.kernel)
        x = layouts.channels_last(torch.randn(self.n, c_in, *self.size) + 0.25).to(dtype)
        weight = (torch.randn(c_out, c_in // self.groups, *kernel) / 8).to(dtype)
        y = F.conv2d(x.float(), weight.float(), None, *self.arguments())
        return x, weight, torch.randn_like(y).to(dtype)


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


# A convolution, and the kernels of its forward, its input's and its weight's gradient when x is
# channels-last: Winograd's tile, or PLAIN, POINTWISE, COLUMNS.
CONVS = [
    (Conv(size=(28, 28), n=8), (4, 4, 4)),
    (Conv(size=(7, 7), n=24, channels=(16, 80)), (2, 2, 2)),
    (Conv(size=(20, 22), n=16, padding=0), (4, 4, 4)),
    (Conv(size=(20, 22), n=16, padding=(2, 1)), (4, 4, 4)),
    (Conv(size=(18, 18), n=1, padding=0, channels=(64, 64)), (PLAIN, 2, PLAIN)),
    (Conv(padding=3), (0, 0, 0)),
    (Conv(channels=(31, 48), n=8), (0, 0, 0)),
    (Conv(channels=(32, 40), n=8), (0, 0, 0)),
    (Conv(stride=2), (PLAIN, PLAIN, COLUMNS)),
    (Conv(stride=(1, 2), padding=0, n=1, channels=(3, 5)), (PLAIN, PLAIN, COLUMNS)),
    (Conv(stride=(3, 1), padding=(2, 3), channels=(17, 16)), (PLAIN, PLAIN, COLUMNS)),
    (Conv(kernel=1, padding=0), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, channels=(3, 7), n=1), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, channels=(5, 1)), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=2), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=(1, 2), n=1), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=14), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=1), (0, 0, 0)),
    (Conv(kernel=5, padding=2), (0, 0, 0)),
    (Conv(kernel=7, padding=3, stride=2, channels=(3, 16)), (0, 0, 0)),
    (Conv(kernel=(1, 3), padding=(0, 1)), (0, 0, 0)),
    (Conv(groups=4), (0, 0, 0)),
    (Conv(kernel=1, padding=0, groups=2), (0, 0, 0)),
    (Conv(dilation=2, padding=2), (0, 0, 0)),
    (Conv(stride=2, dilation=(1, 2)), (0, 0, 0)),
]
WINOGRAD, STRIDED, ONE, SMALLER = (CONVS[i][0] for i in (0, 8, 11, 14))


def run(
    conv2d: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor, conv: Conv
) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = conv2d(x, weight, *conv.arguments())
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    return {"y": y.detach(), "dx": dx, "dw": dw}


def eager(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return F.conv2d(x, weight, None, *arguments)


def way_of(conv: Conv, x: Tensor, weight: Tensor) -> _conv_ways.Way | None:
    return _conv_ways._choose(x, weight, None, *conv.arguments())


def magnitudes(
    x: Tensor, weight: Tensor, grad: Tensor, conv: Conv, way: _conv_ways.Way | None
) -> dict[str, Tensor]:
    """The sums of absolute terms of each result, by the kernel that makes it."""
    terms = run(eager, *(t.double().abs() for t in (x, weight, grad)), conv)
    if way is None:
        return terms
    padding = way.padding
    back = (2 - padding[0], 2 - padding[1])
    if way.forward in (2, 4):
        terms["y"] = winograd.convolve(x, weight, way.forward, padding, magnitude=True)
    if way.dgrad in (2, 4):
        turned = weight.transpose(0, 1).flip(2, 3)
        terms["dx"] = winograd.convolve(grad, turned, way.dgrad, back, magnitude=True)
    if way.wgrad in (2, 4):
        terms["dw"] = winograd.weight_gradient(grad, x, way.wgrad, padding, magnitude=True)
    return terms


def check(x: Tensor, weight: Tensor, grad: Tensor, conv: Conv) -> None:
    way = way_of(conv, x, weight)
    with dispatch.recording() as events:
        ours = run(convolution.conv2d, x, weight, grad, conv)
    assert [e.op for e in events] == (["conv2d"] if way else [])
    theirs = run(eager, x, weight, grad, conv)
    exact = run(eager, x.double(), weight.double(), grad.double(), conv)
    terms = magnitudes(x, weight, grad, conv, way)
    same = (x.float(), weight.float()) if way and way.in_float32 else (x, weight)
    assert ours["y"].stride() == eager(*same, *conv.arguments()).stride()
    for name, result in ours.items():
        channel = 0 if name == "dw" else 1
        oracle.check(
            name,
            result,
            theirs[name],
            exact[name],
            magnitude=terms[name],
            accumulated=torch.float32,
            channel=channel,
            context=conv,
        )
