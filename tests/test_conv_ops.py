# SPDX-License-Identifier: BSD-3-Clause
"""conv_winograd and conv_stem: against float64, bitwise over threads and layouts, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import winograd
from packed_convs import OPS, check, check_bits, check_refusals, rows
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv

# (N, C_in, C_out, H, W): tiles that hang over, half panels, more tiles than one block, one pixel
SHAPES = [
    (2, 64, 64, 14, 14),
    (1, 16, 48, 9, 11),
    (3, 80, 32, 7, 5),
    (1, 16, 16, 1, 2),
    (2, 16, 16, 56, 57),
    (1, 256, 96, 6, 6),
]
STEMS = [
    # (N, C_in, C_out, H, W, kernel, stride, padding)
    (2, 3, 64, 37, 41, 7, 2, 3),
    (1, 1, 48, 9, 12, 3, 1, 1),
    (3, 4, 32, 8, 8, 5, 2, 0),
    (2, 8, 16, 3, 5, 3, 2, 1),
    (1, 3, 16, 4, 33, 1, 1, 0),
]

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


def check_winograd(
    shape: tuple[int, ...], tile: int, padding: int, how: tuple[bool, bool], ops: Any = OPS
) -> None:
    n, inner, out, height, width = shape
    with_residual, relu = how
    x, weight, bias = rows(n, inner, height, width), torch.randn(out, inner, 3, 3), torch.randn(out)
    size = (n, out, height + 2 * padding - 2, width + 2 * padding - 2)
    residual = rows(*size) if with_residual else None
    packed = _conv.pack_winograd(weight, tile)
    args = (x, packed, bias, residual, [padding, padding], tile, relu)
    ours = ops.conv_winograd(*args)

    def conv(dtype: torch.dtype) -> Tensor:
        return F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=padding)

    magnitude = winograd.convolve(x, weight, tile, padding, magnitude=True)
    magnitude = magnitude + bias.abs().double().view(-1, 1, 1)
    check(ours, conv, magnitude, residual, relu)
    if residual is not None:
        onto = residual.clone(memory_format=torch.preserve_format)
        ops.conv_winograd_(onto, x, packed, bias, True, [padding, padding], tile, relu)
        assert torch.equal(onto, ours)


@pytest.mark.parametrize("tile", [2, 4])
def test_filter_transform(tile: int) -> None:
    """Ours is the textbook's, and the textbook's is a convolution."""
    _, g, _ = winograd.matrices(tile)
    torch.testing.assert_close(_conv.filter_transform(tile), g, rtol=1e-15, atol=0)
    x, weight = torch.randn(2, 3, 9, 7).double(), torch.randn(4, 3, 3, 3).double()
    for padding in (0, 1, 2):
        ours = winograd.convolve(x, weight, tile, padding)
        torch.testing.assert_close(ours, F.conv2d(x, weight, padding=padding))


@pytest.mark.parametrize("how", [*itertools.product([False, True], repeat=2)], ids=str)
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_winograd(shape: tuple[int, ...], tile: int, padding: int, how: tuple[bool, bool]) -> None:
    check_winograd(shape, tile, padding, how)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_without_padding(tile: int) -> None:
    check_winograd((2, 32, 32, 8, 9), tile, 0, (True, True))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_winograd_instruction_sets(
    instruction_set: str,
    shape: tuple[int, ...],
    tile: int,
) -> None:
    check_winograd(shape, tile, 1, (True, True))


def stem(shape: tuple[int, ...], relu: bool, max_pool: bool) -> tuple[Any, ...]:
    n, inner, out, height, width, kernel, stride, padding = shape
    weight, bias = torch.randn(out, inner, kernel, kernel), torch.randn(out)
    x = rows(n, inner, height, width)
    settings = ([kernel] * 2, [stride] * 2, [padding] * 2, relu, max_pool)
    return weight, (x, _conv.pack(weight), bias, *settings)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", STEMS, ids=str)
def test_stem(instruction_set: str, shape: tuple[int, ...], relu: bool) -> None:
    weight, args = stem(shape, relu, False)
    x, _, bias, _, stride, padding, *_ = args
    ours = OPS.conv_stem(*args)

    def conv(dtype: torch.dtype) -> Tensor:
        return F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), stride, padding)

    terms = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding)
    check(ours, conv, terms, None, relu)
    pooled = OPS.conv_stem(*args[:-1], True)
    assert torch.equal(pooled, F.max_pool2d(ours, 3, 2, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_stem_pools_what_is_not_finite(bad: float) -> None:
    """As torch's max-pooling does, wherever the value stands in a window."""
    _, args = stem((1, 1, 16, 7, 7, 1, 1, 0), False, True)
    for position in range(49):
        x = args[0].clone()
        x.view(-1)[position] = bad
        y = OPS.conv_stem(x, *args[1:-1], False)
        pooled = OPS.conv_stem(x, *args[1:])
        torch.testing.assert_close(pooled, F.max_pool2d(y, 3, 2, 1), rtol=0, atol=0, equal_nan=True)


def test_threads_and_layouts_do_not_change_a_bit(two_threads: None) -> None:
    _, args = stem(STEMS[0], True, True)
    weight, bias = torch.randn(64, 64, 3, 3), torch.randn(64)
    calls: list[tuple[Any, tuple[Any, ...]]] = [(OPS.conv_stem, args)]
    for tile, size in itertools.product((2, 4), (7, 30)):
        x, residual = rows(2, 64, size, size), rows(2, 64, size, size)
        packed = _conv.pack_winograd(weight, tile)
        calls.append((OPS.conv_winograd, (x, packed, bias, residual, [1, 1], tile, True)))
    for op, args in calls:
        check_bits(op, *args)


def test_residual_of_another_layout() -> None:
    x, weight, bias = rows(2, 16, 6, 6), torch.randn(16, 16, 3, 3), torch.randn(16)
    residual = torch.randn(2, 16, 6, 6)
    packed = _conv.pack_winograd(weight, 2)
    right = OPS.conv_winograd(x, packed, bias, residual, [1, 1], 2, False)
    OPS.conv_winograd_(residual, x, packed, bias, True, [1, 1], 2, False)
    assert torch.equal(residual, right)
    assert residual.is_contiguous()


def test_empty_batch() -> None:
    packed, bias = _conv.pack_winograd(torch.randn(16, 16, 3, 3), 4), torch.randn(16)
    y = OPS.conv_winograd(rows(0, 16, 5, 5), packed, bias, None, [1, 1], 4, True)
    assert y.shape == (0, 16, 5, 5)
    _, args = stem((0, 3, 16, 8, 8, 3, 1, 1), True, True)
    assert OPS.conv_stem(*args).shape == (0, 16, 4, 4)


def test_opcheck() -> None:
    packed, bias = _conv.pack_winograd(torch.randn(32, 16, 3, 3), 4), torch.randn(32)
    x, residual = rows(2, 16, 5, 6), rows(2, 32, 5, 6)
    for given in (residual, None):
        torch.library.opcheck(OPS.conv_winograd.default, (x, packed, bias, given, [1, 1], 4, True))
    torch.library.opcheck(
        OPS.conv_winograd_.default, (residual, x, packed, bias, True, [1, 1], 4, True)
    )
    for pool in (False, True):
        torch.library.opcheck(OPS.conv_stem.default, stem(STEMS[1], True, pool)[1])


@pytest.mark.parametrize("tile", [2, 4])
def test_plain_winograd(tile: int) -> None:
    """What runs where the extension was not built."""
    check_winograd(SHAPES[1], tile, 1, (True, True), _conv)


def test_plain_stem() -> None:
    for pool in (False, True):
        _, given = stem(STEMS[0], True, pool)
        torch.testing.assert_close(_conv.conv_stem(*given), OPS.conv_stem(*given))


def test_bad_input() -> None:
    x, bias = rows(1, 16, 5, 5), torch.randn(16)
    packed = _conv.pack_winograd(torch.randn(16, 16, 3, 3), 2)
    good: dict[str, Any] = {
        "x": x,
        "weight": packed,
        "bias": bias,
        "residual": None,
        "padding": [1, 1],
        "tile": 2,
        "relu": True,
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": x.double()}, "float32"),
        ({"x": x[0]}, "4 dimensions"),
        ({"x": rows(1, 8, 5, 5)}, "multiple of 16 channels; got 8"),
        ({"x": rows(1, 16, 1, 5), "padding": [0, 0]}, "smaller than the kernel"),
        ({"weight": packed[1:]}, "weight must be packed"),
        ({"bias": bias[:10]}, "multiple of 16 channels"),
        ({"residual": rows(1, 16, 5, 4)}, r"residual must be float32 of shape \(1, 16, 5, 5\)"),
        ({"padding": [-1, 1]}, "padding not negative"),
        ({"tile": 3}, "tile must be 2 or 4; got 3"),
    ]
    check_refusals(OPS.conv_winograd, good, wrong)
