# SPDX-License-Identifier: BSD-3-Clause
"""conv_bn_act: F.conv2d, then what test_batch_norm_act.py tests; gradients go through both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cases
import layouts
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import Case, Inputs, Results, word
from oracle import check, exact_batch_norm_act
from torch import Tensor

from resnet_fast import dispatch, functional


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution of 8 to 12 channels; the fields are F.conv2d's."""

    kernel: int = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    size: tuple[int, int] = (9, 11)

    def __str__(self) -> str:
        return "-".join(word(v) for v in vars(self).values())

    def arguments(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k not in ("kernel", "size")}


CONVS = (
    Conv(),
    Conv(kernel=1, padding=0),
    Conv(kernel=1, padding=0, stride=2),
    Conv(kernel=7, stride=2, padding=3),
    Conv(stride=2, size=(7, 7)),
    Conv(padding="same", dilation=2),
    Conv(padding=(0, 2), stride=(2, 1), dilation=(1, 2)),
    Conv(groups=4),
    Conv(kernel=3, padding=0, size=(3, 3)),  # one pixel comes out
)
IN, OUT, BATCH = 8, 12, 3


@dataclass
class Tensors:
    """Inputs of the convolution and, as `rest`, of what follows; rest.x is the exact output."""

    x: Tensor
    conv_weight: Tensor
    rest: Inputs


def make(conv: Conv, case: Case) -> Tensors:
    rng = torch.Generator().manual_seed(case.seed)
    x = torch.randn(BATCH, IN, *conv.size, generator=rng).to(case.dtype)
    shape = (OUT, IN // conv.groups, conv.kernel, conv.kernel)
    conv_weight = (torch.randn(shape, generator=rng) / 6).to(case.dtype)
    exact = F.conv2d(x.double(), conv_weight.double(), **conv.arguments())
    case = replace(case, shape=tuple(exact.shape))
    rest = cases.make(case)
    rest.x = exact
    rounded = F.conv2d(x, conv_weight, **conv.arguments()).double()
    z, moved = (
        cases.preactivation(Inputs(**vars(rest) | {"x": t}), case) for t in (exact, rounded)
    )
    # The kink, and the elements that the convolution's own rounding may take across it.
    near = cases.kink(rest, case) | (z.abs() <= 4 * (z - moved).abs().max())
    if case.activation == "relu":
        rest.grad = rest.grad.masked_fill(near, 0.0)
    if case.layout == "channels_last":
        x, conv_weight = layouts.channels_last(x), layouts.channels_last(conv_weight)
    return Tensors(x, conv_weight, rest)


def run(op: Callable[..., Tensor], t: Tensors, conv: Conv, case: Case) -> Results:
    leaves = {"x": t.x, "conv_weight": t.conv_weight}
    leaves |= {n: getattr(t.rest, n) for n in ("weight", "bias", "residual")}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    stats = t.rest.running_mean.clone(), t.rest.running_var.clone()
    y = op(
        leaves["x"],
        leaves["conv_weight"],
        leaves["weight"],
        leaves["bias"],
        *stats,
        residual=leaves.get("residual"),
        training=case.training,
        activation=case.activation,
        **conv.arguments(),
    )
    grads = torch.autograd.grad(y, list(leaves.values()), t.rest.grad)
    results = {"y": y.detach(), "running_mean": stats[0], "running_var": stats[1]}
    return results | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def composed(then: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """F.conv2d, then `then`, with conv_bn_act's signature."""

    def op(x, conv_weight, *parameters, residual, training, activation, **conv) -> Tensor:
        z = F.conv2d(x, conv_weight, **conv)
        return then(z, *parameters, residual=residual, training=training, activation=activation)

    return op


def magnitudes(t: Tensors, conv: Conv, case: Case) -> Results:
    """Those of batch_norm_act, and the convolution's gradients with absolute terms."""
    sizes = cases.magnitudes(t.rest, case)
    x, w = (v.double().abs().requires_grad_() for v in (t.x, t.conv_weight))
    z = F.conv2d(x, w, **conv.arguments())
    sizes["dconv_x"], sizes["dconv_weight"] = torch.autograd.grad(z, (x, w), sizes["dx"])
    return sizes | {"dx": sizes["dconv_x"]}


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", ["none", "tensor"])
def test_equals_eager(impl, conv: Conv, layout: str, residual: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for training, activation in ((True, "relu"), (True, None), (False, "relu")):
            case = Case(
                dtype=dtype,
                layout=layout,
                residual=residual,
                training=training,
                activation=activation,
            )
            t = make(conv, case)
            ours = run(impl.conv_bn_act, t, conv, case)
            eager = run(composed(oracle.eager_batch_norm_act), t, conv, case)
            wide = Tensors(t.x.double(), t.conv_weight.double(), t.rest.to(torch.float64))
            exact = run(composed(exact_batch_norm_act), wide, conv, case)
            sizes = magnitudes(t, conv, case)
            for name, result in ours.items():
                check(
                    name,
                    result,
                    eager[name],
                    exact[name],
                    magnitude=sizes[name],
                    accumulated=cases.accumulate_dtype(dtype),
                    channel=1 if name in ("y", "dresidual") else None,
                    context=(str(conv), str(case)),
                )


def test_is_the_convolution_then_batch_norm_act(impl) -> None:
    """Bitwise: the convolution is PyTorch's own, the rest is the op."""
    conv, case = Conv(), Case(residual="tensor")
    t = make(conv, case)
    ours = run(impl.conv_bn_act, t, conv, case)
    parts = run(composed(impl.batch_norm_act), t, conv, case)
    for name, result in ours.items():
        assert torch.equal(result, parts[name]), name


def test_channels_last_goes_through(impl) -> None:
    t = make(Conv(), Case(layout="channels_last"))
    with torch.no_grad():
        y = impl.conv_bn_act(t.x, t.conv_weight, None, None, None, None, padding=1, training=True)
    assert layouts.is_channels_last(y)


@pytest.mark.implementations("reference", "plain", "cpu", "emulated")  # autocast of the CPU
def test_under_autocast_the_convolution_runs_in_half(impl) -> None:
    t = make(Conv(), Case())
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.recording() as events:
        y = functional.conv_bn_act(
            t.x,
            t.conv_weight,
            t.rest.weight,
            t.rest.bias,
            t.rest.running_mean,
            t.rest.running_var,
            padding=1,
            training=True,
        )
    assert y.dtype == torch.bfloat16
    assert [e.impl for e in events] == [impl.ran]
