# SPDX-License-Identifier: BSD-3-Clause
"""conv_direct and conv_direct_: against float64, bitwise over threads and layouts, bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import layouts
import pytest
import torch
import torch.nn.functional as F
from convolutions import Conv, pair
from packed_convs import OPS, check, check_bits, check_refusals, rows
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv

ONE = Conv(kernel=1, padding=0)
# Of 512 values and more of a row the sum is made in chunks: of whole taps or, where one tap has
# more than 512, of parts of it. Rows go in blocks, of 96 or more.
CONVS = [
    ONE,
    replace(ONE, size=(45, 47), channels=(32, 80)),  # two blocks of rows
    replace(ONE, stride=2, channels=(64, 48)),
    replace(ONE, stride=(1, 3), size=(9, 11)),
    replace(ONE, stride=(14, 13), channels=(16, 208)),  # a pixel of each picture
    replace(ONE, padding=(1, 2)),
    replace(ONE, size=(1, 1), n=1, channels=(2, 16)),
    replace(ONE, channels=(512, 64)),
    replace(ONE, channels=(513, 16)),
    replace(ONE, channels=(1101, 48)),
    replace(ONE, stride=2, channels=(2048, 80), size=(5, 5)),
    Conv(),
    Conv(channels=(17, 16)),
    Conv(channels=(64, 64), size=(28, 27)),  # chunks of eight taps and of one
    Conv(channels=(96, 208), n=3, size=(9, 5)),
    Conv(channels=(257, 80), size=(6, 7)),
    Conv(channels=(513, 64), size=(7, 7)),
    Conv(channels=(1030, 16), size=(3, 4), stride=2),
    Conv(stride=2, channels=(64, 128)),
    Conv(stride=(2, 1), padding=0, channels=(33, 48), n=1),
    Conv(dilation=2, padding=2),
    Conv(dilation=(1, 3), padding=(0, 4), stride=2, channels=(80, 64)),
    Conv(padding=5, channels=(16, 64), size=(3, 2)),  # windows wholly outside the picture
    Conv(padding=4, dilation=4, size=(3, 3), channels=(48, 16)),  # taps never inside it
    Conv(kernel=3, padding=1, size=(1, 1), n=1, channels=(64, 16)),
    Conv(kernel=5, stride=3, padding=2, channels=(24, 80)),
    Conv(kernel=7, stride=2, padding=3, channels=(3, 64), size=(37, 41)),
    Conv(kernel=7, padding=3, channels=(24, 48)),  # chunks of 21, 21 and 7 taps
    Conv(kernel=15, padding=7, channels=(3, 16)),
    Conv(kernel=(3, 5), stride=(2, 1), padding=(0, 3), dilation=(2, 1), channels=(20, 48)),
    Conv(kernel=(1, 7), padding=(0, 3), channels=(40, 16)),
    Conv(kernel=(7, 1), padding=(3, 0), channels=(130, 64)),
    Conv(kernel=(2, 4), stride=(1, 3), padding=(1, 2), channels=(5, 32)),
]
# What two threads split by rows, by panels, or not at all: fewer rows than threads.
SPLIT = [
    replace(ONE, size=(28, 28), channels=(64, 64)),
    replace(ONE, channels=(1024, 64), size=(1, 1)),
    Conv(channels=(64, 208), size=(9, 8)),
    Conv(channels=(128, 512), size=(3, 3), n=1),
    Conv(padding=0, channels=(1024, 64), size=(3, 3), n=1),
    Conv(padding=0, channels=(1024, 208), size=(3, 3), n=1),
    Conv(stride=2, channels=(600, 48), size=(9, 9)),
]

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


def make(conv: Conv) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, weight, bias, residual), all but the bias channels-last."""
    x, weight, residual = conv.make()
    return x, weight, torch.randn(len(weight)), layouts.channels_last(residual)


def settings(conv: Conv, relu: bool) -> tuple[Any, ...]:
    sliding = (conv.kernel, conv.stride, conv.padding, conv.dilation)
    return *(list(pair(value)) for value in sliding), relu


def right(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, *conv.arguments())


def check_values(
    conv: Conv, given: tuple[Tensor, Tensor, Tensor, Tensor | None], relu: bool, ops: Any = OPS
) -> None:
    x, weight, bias, residual = given
    packed, rest = _conv.pack(weight), settings(conv, relu)
    ours = ops.conv_direct(x, packed, bias, residual, *rest)
    terms = 1 + weight[0].numel()
    magnitude = math.log2(terms) * right(conv, *(t.double().abs() for t in (x, weight, bias)))

    def plain(dtype: torch.dtype) -> Tensor:
        return right(conv, x.to(dtype), weight.to(dtype), bias.to(dtype))

    check(ours, plain, magnitude, residual, relu, conv)
    if residual is not None:
        onto = residual.clone(memory_format=torch.preserve_format)
        ops.conv_direct_(onto, x, packed, bias, True, *rest)
        torch.testing.assert_close(onto, ours, rtol=0, atol=0, equal_nan=True)


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_direct(instruction_set: str, conv: Conv) -> None:
    check_values(conv, make(conv), True)


@pytest.mark.parametrize("how", [*itertools.product([False, True], repeat=2)], ids=str)
@pytest.mark.parametrize("channels", [(24, 16), (24, 48), (24, 64), (24, 80), (24, 208)], ids=str)
@pytest.mark.parametrize("conv", [ONE, Conv(stride=2), Conv(dilation=2)], ids=str)
def test_with_and_without(conv: Conv, channels: tuple[int, int], how: tuple[bool, bool]) -> None:
    with_residual, relu = how
    conv = replace(conv, channels=channels)
    *given, residual = make(conv)
    check_values(conv, (*given, residual if with_residual else None), relu)


@pytest.mark.parametrize("channels", [(40, 80), (560, 48)], ids=str)
def test_every_number_of_rows(instruction_set: str, channels: tuple[int, int]) -> None:
    """Tiles of every height, in one block of rows and in several."""
    for pixels in (*range(1, 20), 95, 96, 97, 191, 193):
        for conv in (replace(ONE, padding=0), Conv(kernel=(1, 3), padding=(0, 1))):
            conv = replace(conv, channels=channels, n=1, size=(1, pixels))
            check_values(conv, make(conv), False)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [*itertools.product((1, 31, 520), (16, 112))], ids=str)
@pytest.mark.parametrize("kernel", [*itertools.product((1, 2, 3, 5), repeat=2)], ids=str)
def test_sweep(instruction_set: str, kernel: tuple[int, int], channels: tuple[int, int]) -> None:
    for stride, dilation, padding in itertools.product((1, 2, (3, 1)), (1, (2, 3)), (0, (2, 1), 6)):
        conv = Conv(
            kernel=kernel, stride=stride, dilation=dilation, padding=padding, channels=channels
        )
        check_values(conv, make(conv), True)


def test_plain_direct() -> None:
    """What runs where the extension was not built."""
    for conv in (CONVS[2], CONVS[11], CONVS[21], CONVS[29]):
        check_values(conv, make(conv), True, _conv)


def test_empty_batch() -> None:
    x, weight, bias, residual = make(replace(CONVS[18], n=1))
    rest = (_conv.pack(weight), bias), settings(CONVS[18], True)
    assert OPS.conv_direct(x[:0], *rest[0], None, *rest[1]).shape == (0, 128, 7, 7)
    assert OPS.conv_direct(x[:0], *rest[0], residual[:0], *rest[1]).shape == (0, 128, 7, 7)
    OPS.conv_direct_(residual[:0], x[:0], *rest[0], True, *rest[1])


# ---- what is not finite --------------------------------------------------------------------------
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite(instruction_set: str, bad: float, relu: bool) -> None:
    """A value reaches the windows that it lies in, and no pixel, channel or picture else."""
    for conv in (ONE, Conv(stride=2), Conv(padding=3), Conv(channels=(600, 16))):
        for which, position in itertools.product(range(4), (0, 177, -1)):
            if which == 1 and conv.padding:
                continue  # see test_weights_that_are_not_finite
            given = make(conv)
            memory = given[which].permute(0, 2, 3, 1) if which in (0, 3) else given[which]
            memory.view(-1)[min(position, memory.numel() - 1)] = bad
            check_values(conv, given, relu)


def test_a_sum_of_two_infinities() -> None:
    x, weight, bias, residual = make(Conv())
    x[0, 3, 5, 5], x[0, 4, 5, 6] = float("inf"), -float("inf")
    residual[1, 2, 3, 4], x[1, :, 3, 4] = -float("inf"), float("inf")
    for relu in (False, True):
        check_values(Conv(), (x, weight, bias, residual), relu)


@pytest.mark.filterwarnings("ignore:TF32")  # of mkldnn.flags
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(instruction_set: str, bad: float) -> None:
    """A tap outside the picture meets zeros there, as in PyTorch's own kernel; oneDNN skips it."""
    for conv in (Conv(), Conv(stride=2, padding=3), replace(ONE, padding=1)):
        x, weight, bias, residual = make(conv)
        weight[5, 7, 0, 0] = bad
        with torch.backends.mkldnn.flags(enabled=False):
            check_values(conv, (x, weight, bias, residual), False)
        y = OPS.conv_direct(x, _conv.pack(weight), bias, None, *settings(conv, False))
        assert y[:, 5, 0].isnan().all()
        assert y[:, :5].isfinite().all()
        assert y[:, 6:].isfinite().all()


# ---- the same bits -------------------------------------------------------------------------------
@pytest.mark.parametrize("conv", SPLIT, ids=str)
def test_threads_and_layouts_do_not_change_a_bit(
    two_threads: None, instruction_set: str, conv: Conv
) -> None:
    x, weight, bias, residual = make(conv)
    packed, rest = _conv.pack(weight), settings(conv, True)
    check_bits(OPS.conv_direct, x, packed, bias, residual, *rest)

    def onto(x: Tensor, packed: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        over = residual.clone(memory_format=torch.preserve_format)
        OPS.conv_direct_(over, x, packed, bias, True, *rest)
        return over

    check_bits(onto, x, packed, bias, *rest)
    assert torch.equal(
        onto(x, packed, bias, *rest), OPS.conv_direct(x, packed, bias, residual, *rest)
    )


def test_more_threads_than_rows(instruction_set: str) -> None:
    """One pixel, one panel, and enough to do for all of them."""
    conv = SPLIT[4]
    x, weight, bias, residual = make(conv)
    args = (x, _conv.pack(weight), bias, residual, *settings(conv, True))
    one = OPS.conv_direct(*args)
    torch.set_num_threads(7)
    try:
        assert torch.equal(OPS.conv_direct(*args), one)
    finally:
        torch.set_num_threads(1)
    check_values(conv, (x, weight, bias, residual), True)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts(layout: str) -> None:
    for conv in (Conv(stride=2), ONE):
        x, weight, bias, residual = make(conv)
        packed, rest = _conv.pack(weight), settings(conv, True)
        x, residual = layouts.lay(x, layout), layouts.lay(residual, layout)
        args = (packed, bias, layouts.channels_last(residual), *rest)
        want = OPS.conv_direct(layouts.channels_last(x), *args)
        assert torch.equal(OPS.conv_direct(x, *args), want)
        assert torch.equal(OPS.conv_direct(x, packed, bias, residual, *rest), want)
        if layout == "expanded":
            continue  # one value of memory for several outputs: see test_bad_input
        strides = residual.stride()
        OPS.conv_direct_(residual, x, packed, bias, True, *rest)
        assert torch.equal(residual, want)
        assert residual.stride() == strides


# ---- operators -----------------------------------------------------------------------------------
def test_opcheck() -> None:
    for conv in (ONE, CONVS[21], CONVS[29]):
        x, weight, bias, residual = make(replace(conv, size=(12, 11)))
        args, rest = (x, _conv.pack(weight), bias), settings(conv, True)
        for given in (residual, None):
            torch.library.opcheck(OPS.conv_direct.default, (*args, given, *rest))
        torch.library.opcheck(OPS.conv_direct_.default, (residual, *args, True, *rest))


X, BIAS, RESIDUAL = rows(1, 5, 6, 7), torch.randn(32), rows(1, 32, 4, 5)
PACKED = _conv.pack(torch.randn(32, 5, 3, 3))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": X.double()}, "x must be float32"),
    ({"x": X[0]}, "4 dimensions"),
    ({"x": X[:, :4]}, "weight must be packed for this convolution, 2304 values"),
    ({"x": X[:, :0]}, "x must have channels"),
    ({"x": X[:, :, :2]}, "x of 2 x 7 is smaller than the kernel"),
    ({"dilation": [3, 1]}, "smaller than the kernel"),
    ({"weight": PACKED[:, 1:]}, "weight must be packed"),
    ({"weight": PACKED.transpose(0, 1)[::2]}, "weight must be packed"),
    ({"weight": PACKED.double()}, "must be float32"),
    ({"bias": BIAS.double()}, "must be float32"),
    ({"bias": BIAS[:10]}, "multiple of 16 channels"),
    ({"bias": BIAS[:0]}, "multiple of 16 channels"),
    ({"bias": torch.randn(64)[::2]}, "bias must be dense"),
    ({"bias": torch.randn(80)}, "weight must be packed"),
    ({"residual": RESIDUAL.double()}, "residual must be float32"),
    ({"residual": RESIDUAL[..., 1:]}, r"residual must be float32 of shape \(1, 32, 4, 5\)"),
    ({"residual": RESIDUAL[:, :16]}, r"residual must be float32 of shape \(1, 32, 4, 5\)"),
    ({"kernel": [0, 3]}, "kernel, stride and dilation must be positive"),
    ({"stride": [1, 0]}, "kernel, stride and dilation must be positive"),
    ({"dilation": [-1, 1]}, "kernel, stride and dilation must be positive"),
    ({"padding": [0, -1]}, "padding not negative"),
    ({"stride": [1, 1, 1]}, "must be pairs"),
]


def good() -> dict[str, Any]:
    named = {"x": X, "weight": PACKED, "bias": BIAS, "residual": RESIDUAL.clone()}
    return named | {"kernel": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}


def test_bad_input() -> None:
    check_refusals(OPS.conv_direct, good() | {"relu": True}, WRONG)


def test_a_call_that_fails_leaves_the_residual() -> None:
    given = good()
    residual = given.pop("residual")
    named = {"y": residual} | {name: given.pop(name) for name in ("x", "weight", "bias")}
    given = named | {"add": True} | given | {"relu": True}
    before = OPS.conv_direct(*(good() | {"relu": True}).values())
    wrong = [(changes, message) for changes, message in WRONG if "residual" not in changes]
    check_refusals(OPS.conv_direct_, given, wrong)
    assert torch.equal(residual, before), "written by the good call, and by no other"
    repeated = RESIDUAL[..., :1].clone().expand(RESIDUAL.shape)
    kept = repeated.clone()
    with pytest.raises(RuntimeError, match="copy_"):
        OPS.conv_direct_(*(given | {"y": repeated}).values())
    assert torch.equal(repeated, kept)
