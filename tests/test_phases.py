# SPDX-License-Identifier: BSD-3-Clause
"""The phase operators put together on one process are batch_norm_act, value for value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import lay
from torch import Tensor

from resnet_fast import _phases, _plain
from resnet_fast.layout import accumulate_dtype

OPS = torch.ops.resnet_fast
SHAPE = (4, 6, 5, 3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(dtype: torch.dtype, layout: str, seed: int, offset: float = 0.0) -> Tensor:
    torch.manual_seed(seed)
    return lay((torch.randn(SHAPE, dtype=torch.float64) + offset).to(dtype), layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype: torch.dtype, layout: str) -> None:
    """Against float64 about the true mean, for a channel far from zero too."""
    x = draw(dtype, layout, 0, offset=30.0)
    mean, m2 = OPS.batch_norm_statistics(x)
    assert mean.dtype == m2.dtype == torch.float64
    values = x.double().transpose(0, 1).flatten(1)
    want = values.mean(1)
    eps = torch.finfo(accumulate_dtype(dtype)).eps
    torch.testing.assert_close(mean, want, rtol=4 * eps, atol=0)
    deviation = (values - want[:, None]).square().sum(1)
    torch.testing.assert_close(m2, deviation, rtol=200 * eps, atol=0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_phases_are_the_whole(
    dtype: torch.dtype, layout: str, residual: bool, relu: bool
) -> None:
    x, grad = draw(dtype, layout, 1), draw(dtype, "contiguous", 2)
    acc = accumulate_dtype(dtype)
    weight, bias = torch.rand(6, dtype=acc) + 0.5, torch.randn(6, dtype=acc)
    r = draw(dtype, layout, 3) if residual else None
    save = relu and residual
    y, mean, invstd, mask = OPS.batch_norm_act_forward(
        x, weight, bias, r, None, None, True, 0.1, 1e-5, relu, save
    )
    m, m2 = OPS.batch_norm_statistics(x)
    var = m2 / (x.numel() // 6)
    again = OPS.batch_norm_act_forward(
        x, weight, bias, r, m.to(acc), var.to(acc), False, 0.0, 1e-5, relu, save
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again[0], y, rtol=4 * eps, atol=4 * eps)
    kept = mask if save else None
    args = (grad, x, mean, invstd, weight, bias, kept)
    dx, dresidual, dweight, dbias = OPS.batch_norm_act_backward(*args, True, relu, [True] * 4)
    masked, total, dot = OPS.batch_norm_act_backward_reduce(*args, relu)
    assert masked.numel() == (x.numel() if relu else 0)
    g = masked if relu else grad
    if relu:
        assert torch.equal(masked, dresidual)
    close: Any = {"rtol": 16 * torch.finfo(acc).eps, "atol": 16 * torch.finfo(acc).eps}
    torch.testing.assert_close(total.to(acc), dbias, **close)
    torch.testing.assert_close((dot * invstd).to(acc), dweight, **close)
    got = OPS.batch_norm_act_backward_apply(g, x, mean, invstd, weight, total, dot, x.numel() / 6)
    assert torch.equal(got, dx)
    assert got.stride() == dx.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_and_compiled_agree(dtype: torch.dtype) -> None:
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
        ours, plain = getattr(OPS, name)(*args), getattr(_phases, name)(*args)
        torch.testing.assert_close(ours, plain, rtol=100 * eps, atol=100 * eps)
        torch.library.opcheck(
            getattr(OPS, name).default,
            args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_bad_input() -> None:
    x = draw(torch.float32, "contiguous", 6)
    c = torch.ones(6)
    with pytest.raises(RuntimeError, match="2 or more dimensions"):
        OPS.batch_norm_statistics(x[0, 0, 0])
    with pytest.raises(RuntimeError, match="grad must have x's shape"):
        OPS.batch_norm_act_backward_reduce(x[:2], x, c, c, None, None, None, True)
    with pytest.raises(RuntimeError, match="mean must have shape"):
        OPS.batch_norm_act_backward_apply(x, x, c[:2], c, None, c, c, 1.0)
    bad = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mask must be"):
        OPS.batch_norm_act_backward_reduce(x, x, c, c, None, None, bad, True)


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
