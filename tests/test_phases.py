# SPDX-License-Identifier: BSD-3-Clause
"""The phase operators put together on one process are batch_norm_act, value for value."""

from __future__ import annotations

import math
from typing import Any

import emulated
import pytest
import torch
from layouts import lay
from oracle import check
from torch import Tensor

from resnet_fast import _phases, _plain, reference
from resnet_fast.layout import accumulate_dtype

OPS = torch.ops.resnet_fast
# The same suite for the registered operators and for the CUDA kernels, emulated.
COMPILED = [pytest.param(OPS, id="cpu")]
if not isinstance(emulated.load(), str):
    COMPILED += [pytest.param(emulated.operators, id="emulated")]
SHAPE = (4, 6, 5, 3)
SHAPES = (SHAPE, (2, 64, 7, 7), (9, 3), (3, 16, 33), (2, 5, 3, 4, 2), (1, 1000, 1, 2))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(
    dtype: torch.dtype,
    layout: str,
    seed: int,
    offset: float = 0.0,
    shape: tuple[int, ...] = SHAPE,
) -> Tensor:
    torch.manual_seed(seed)
    return lay((torch.randn(shape, dtype=torch.float64) + offset).to(dtype), layout)


@pytest.mark.parametrize("ops", COMPILED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(ops: Any, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """Against float64 about the true mean, for a channel far from zero too."""
    x = draw(dtype, layout, 0, offset=30.0, shape=shape)
    mean, m2 = ops.batch_norm_statistics(x)
    assert mean.dtype == m2.dtype == torch.float64
    values = x.double().transpose(0, 1).flatten(1)
    want = values.mean(1)
    eps = torch.finfo(accumulate_dtype(dtype)).eps
    torch.testing.assert_close(mean, want, rtol=4 * eps, atol=0)
    deviation = (values - want[:, None]).square().sum(1)
    torch.testing.assert_close(m2, deviation, rtol=200 * eps, atol=0)


@pytest.mark.parametrize("ops", COMPILED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_phases(
    ops: Any, dtype: torch.dtype, layout: str, relu: bool, shape: tuple[int, ...]
) -> None:
    """By the rule of oracle.py: float64 on the same values, and the plain operators in the dtype.

    The sums and count stand for those of a batch twice as large.
    """
    x, grad = draw(dtype, layout, 1, shape=shape), draw(dtype, layout, 2, shape=shape)
    channels, acc = x.size(1), accumulate_dtype(dtype)
    mean, invstd = torch.randn(channels, dtype=acc) / 4, torch.rand(channels, dtype=acc) + 0.5
    weight, bias = torch.rand(channels, dtype=acc) + 0.5, torch.randn(channels, dtype=acc)
    # Where y may round to either side of 0, nothing may depend on it: see oracle.py.
    y = reference.affine(x.double(), *(t.double() for t in (mean, invstd, weight, bias)))[2]
    grad[y.abs() < 1e-3] = 0
    args = (grad, x, mean, invstd, weight, bias)
    wide = [t.double() for t in args]
    ours = ops.batch_norm_act_backward_reduce(*args, None, relu)
    plain = _phases.batch_norm_act_backward_reduce(*args, None, relu)
    exact = _phases.batch_norm_act_backward_reduce(*wide, None, relu)
    assert torch.equal(ours[0], plain[0])
    g = ours[0] if relu else grad
    dims = [0, *range(2, x.dim())]
    shaped = [1, -1, *([1] * (x.dim() - 2))]
    terms = g.double().abs()
    products = terms * (x.double() - wide[2].view(shaped)).abs()
    for name, got, baseline, want, size in zip(
        ("sum", "dot"), ours[1:], plain[1:], exact[1:], (terms, products), strict=True
    ):
        depth = math.log2(2 * max(2, x.numel() // channels))
        magnitude = size.sum(dims) * depth
        assert got.dtype == torch.float64
        check(name, got, baseline, want, magnitude=magnitude, accumulated=acc, channel=0)
    count = 2.0 * x.numel() / channels
    sums = [2 * t for t in exact[1:]]
    dx = ops.batch_norm_act_backward_apply(g, *args[1:5], *sums, count)
    plain_dx = _phases.batch_norm_act_backward_apply(g, *args[1:5], *sums, count)
    exact_dx = _phases.batch_norm_act_backward_apply(g.double(), *wide[1:5], *sums, count)
    scale, offset, slope = (
        t.abs().view(shaped)
        for t in (wide[3] * wide[4], sums[0] / count, sums[1] * wide[3].square() / count)
    )
    centred = x.double().abs() + wide[2].view(shaped).abs()
    magnitude = scale * (terms + offset + slope * centred)
    assert dx.stride() == plain_dx.stride()
    check("dx", dx, plain_dx, exact_dx, magnitude=magnitude, accumulated=acc, channel=1)


@pytest.mark.parametrize("ops", COMPILED)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPE, (4, 6, 5, 5)], ids=str)
def test_the_phases_are_the_whole(
    ops: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, relu: bool
) -> None:
    x, grad, r = (
        draw(dtype, order, seed, shape=shape)
        for seed, order in ((1, layout), (2, "contiguous"), (3, layout))
    )
    acc = accumulate_dtype(dtype)
    weight, bias = torch.rand(6, dtype=acc) + 0.5, torch.randn(6, dtype=acc)
    r = r if residual else None
    save = relu and residual
    y, mean, invstd, mask = ops.batch_norm_act_forward(
        x, weight, bias, r, None, None, True, 0.1, 1e-5, relu, save
    )
    m, m2 = ops.batch_norm_statistics(x)
    var = m2 / (x.numel() // 6)
    again = ops.batch_norm_act_forward(
        x, weight, bias, r, m.to(acc), var.to(acc), False, 0.0, 1e-5, relu, save
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again[0], y, rtol=4 * eps, atol=4 * eps)
    kept = mask if save else None
    args = (grad, x, mean, invstd, weight, bias, kept)
    dx, dresidual, dweight, dbias = ops.batch_norm_act_backward(*args, True, relu, [True] * 4)
    masked, total, dot = ops.batch_norm_act_backward_reduce(*args, relu)
    assert masked.numel() == (x.numel() if relu else 0)
    g = masked if relu else grad
    if relu:
        assert torch.equal(masked, dresidual)
    close: Any = {"rtol": 16 * torch.finfo(acc).eps, "atol": 16 * torch.finfo(acc).eps}
    torch.testing.assert_close(total.to(acc), dbias, **close)
    torch.testing.assert_close((dot * invstd).to(acc), dweight, **close)
    got = ops.batch_norm_act_backward_apply(g, x, mean, invstd, weight, total, dot, x.numel() / 6)
    # NOTE: on the CPU the whole walks planes of under 16 pixels as columns, whose sums have another
    # order than the phases'.
    if shape == SHAPE and layout == "contiguous" and ops is OPS:
        torch.testing.assert_close(got, dx, rtol=16 * eps, atol=16 * eps)
    else:
        assert torch.equal(got, dx)
    assert got.stride() == dx.stride()


@pytest.mark.parametrize("ops", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_and_compiled_agree(ops: Any, dtype: torch.dtype) -> None:
    x, grad = draw(dtype, "channels_last", 4), draw(dtype, "channels_last", 5)
    mean, invstd = torch.randn(6, dtype=dtype) / 4, torch.rand(6, dtype=dtype) + 0.5
    weight = torch.rand(6, dtype=dtype) + 0.5
    eps = torch.finfo(dtype).eps
    for name, args in {
        "batch_norm_statistics": (x,),
        "batch_norm_act_backward_reduce": (grad, x, mean, invstd, weight, mean, None, True),
        "batch_norm_act_backward_apply": (
            *(grad, x, mean, invstd, weight),
            *(mean.double(), invstd.double(), 60.0),
        ),
    }.items():
        ours, plain = getattr(ops, name)(*args), getattr(_phases, name)(*args)
        torch.testing.assert_close(ours, plain, rtol=100 * eps, atol=100 * eps)
        torch.library.opcheck(
            getattr(OPS, name).default,
            args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("ops", COMPILED)
def test_bad_input(ops: Any) -> None:
    x = draw(torch.float32, "contiguous", 6)
    c = torch.ones(6)
    with pytest.raises(RuntimeError, match="2 or more dimensions"):
        ops.batch_norm_statistics(x[0, 0, 0])
    with pytest.raises(RuntimeError, match="grad must have x's shape"):
        ops.batch_norm_act_backward_reduce(x[:2], x, c, c, None, None, None, True)
    with pytest.raises(RuntimeError, match="mean must have shape"):
        ops.batch_norm_act_backward_apply(x, x, c[:2], c, None, c, c, 1.0)
    bad = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mask must be"):
        ops.batch_norm_act_backward_reduce(x, x, c, c, None, None, bad, True)
    with pytest.raises(RuntimeError, match="x must not be empty"):
        ops.batch_norm_statistics(x[:0])
    with pytest.raises(RuntimeError, match="masked must have x's shape"):
        ops.batch_norm_act_backward_apply(x[:2], x, c, c, None, c, c, 1.0)
    with pytest.raises(RuntimeError, match="dot must have shape"):
        ops.batch_norm_act_backward_apply(x, x, c, c, None, c, c[:2], 1.0)


@pytest.mark.parametrize("ops", COMPILED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_parts_of_a_batch_are_the_whole(ops: Any, layout: str) -> None:
    """As two processes: statistics merged by Chan's rule, sums added, each applies to its part."""
    x, grad = draw(torch.float32, layout, 7, offset=5.0), draw(torch.float32, layout, 8)
    weight, bias = torch.rand(6) + 0.5, torch.randn(6)
    _, mean, invstd, _ = ops.batch_norm_act_forward(
        x, weight, bias, None, None, None, True, 0.1, 1e-5, True, False
    )
    want = ops.batch_norm_act_backward(
        grad, x, mean, invstd, weight, bias, None, True, True, [True] * 4
    )
    xs, grads = x.split((1, 3)), grad.split((1, 3))
    counts = [t.numel() / 6 for t in xs]
    total = sum(counts)
    (m_a, m2_a), (m_b, m2_b) = (ops.batch_norm_statistics(t) for t in xs)
    merged = (counts[0] * m_a + counts[1] * m_b) / total
    m2 = m2_a + m2_b + counts[0] * counts[1] / total * (m_a - m_b).square()
    close: Any = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(merged.float(), mean, **close)
    torch.testing.assert_close((m2 / total + 1e-5).rsqrt().float(), invstd, **close)
    parts = [
        ops.batch_norm_act_backward_reduce(g, t, mean, invstd, weight, bias, None, True)
        for g, t in zip(grads, xs, strict=True)
    ]
    sums = [a + b for a, b in zip(parts[0][1:], parts[1][1:], strict=True)]
    dx = [
        ops.batch_norm_act_backward_apply(part[0], t, mean, invstd, weight, *sums, total)
        for part, t in zip(parts, xs, strict=True)
    ]
    torch.testing.assert_close(torch.cat(dx), want[0], **close)
    torch.testing.assert_close(sums[0].float(), want[3], **close)


def test_an_empty_batch_takes_part_with_zeros() -> None:
    x = torch.empty(0, 6, 5, 3)
    mean, m2 = _phases.batch_norm_statistics(x)
    assert not mean.any()
    assert not m2.any()
    one = torch.ones(6)
    masked, total, dot = _phases.batch_norm_act_backward_reduce(
        x, x, one, one, None, None, torch.empty(_plain.mask_bytes(0), dtype=torch.uint8), True
    )
    assert (masked.numel(), float(total.abs().sum()), float(dot.abs().sum())) == (0, 0.0, 0.0)
