# SPDX-License-Identifier: BSD-3-Clause
"""The emulated operators: the bytes they promise to move, thread order, plans, and how they fail.

Their numbers are tested with those of every other implementation, as "emulated".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from layouts import lay
from torch import Tensor

import resnet_fast as rf
from resnet_fast import dispatch, functional

pytestmark = pytest.mark.skipif(isinstance(emulated.load(), str), reason=str(emulated.load()))
ops = emulated.operators
SHAPE = (4, 64, 28, 28)
LAYOUTS = ("contiguous", "channels_last")
HALF_MB = 4 * 64 * 28 * 28  # elements


def call(layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch norm with residual, forward and backward: every output."""
    rng = torch.Generator().manual_seed(0)
    x, residual, grad = (lay(torch.randn(SHAPE, generator=rng).to(dtype), layout) for _ in range(3))
    weight, bias = torch.rand(64, generator=rng), torch.rand(64, generator=rng)
    mean, var = torch.zeros(64), torch.ones(64)
    y, m, i, mask = ops.batch_norm_act_forward(
        x, weight, bias, residual, mean, var, True, 0.1, 1e-5, True, True
    )
    grads = ops.batch_norm_act_backward(
        grad, x, m, i, weight, bias, mask, True, True, [True, True, True, True]
    )
    names = ("dx", "dresidual", "dweight", "dbias")
    named = dict(zip(names, grads, strict=True))
    return {"y": y, "m": m, "i": i, "mask": mask, "mean": mean, "var": var, **named}


def call_phases(layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch norm from its phases: every output."""
    rng = torch.Generator().manual_seed(0)
    x, grad = (lay(torch.randn(SHAPE, generator=rng).to(dtype), layout) for _ in range(2))
    weight, bias = torch.rand(64, generator=rng), torch.rand(64, generator=rng)
    count = x.numel() / 64
    mean, m2 = ops.batch_norm_statistics(x)
    stats = mean.float(), (m2 / count).rsqrt().float()
    masked, total, dot = ops.batch_norm_act_backward_reduce(
        grad, x, *stats, weight, bias, None, True
    )
    dx = ops.batch_norm_act_backward_apply(masked, x, *stats, weight, total, dot, count)
    return {"mean": mean, "m2": m2, "masked": masked, "sum": total, "dot": dot, "dx": dx}


def moved(function: Callable[[], Any]) -> dict[str, int]:
    """Kernel -> bytes read from and written to memory by one call."""
    with emulated.options(count=True):
        controls = emulated.controls()
        controls.reset_counters()
        function()
        found = controls.counters()
        controls.reset_counters()
    return {k: c["bytes_read"] + c["bytes_written"] for k, c in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(layout: str, dtype: torch.dtype) -> None:
    """The binding hands over what the kernels' headers count: no pass more, no copy."""
    size = HALF_MB * dtype.itemsize
    bits = HALF_MB // 8
    sums = moved(lambda: call(layout, dtype))
    # x | x, residual, y, mask | grad, x, mask, dresidual | dresidual, x, dx
    expected = {
        "bn_stats": size,
        "bn_apply": 3 * size + bits,
        "bn_grad": 3 * size + bits,
        "bn_grad_apply": 3 * size,
    }
    for kernel, count in expected.items():
        # Beyond that only partial sums and per-channel arrays, a few kilobytes.
        assert count <= sums[kernel] <= 1.03 * count, (kernel, sums[kernel] / count)
    assert sums.keys() <= {*expected, "bn_stats_merge", "bn_grad_merge"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved_by_the_phases(layout: str, dtype: torch.dtype) -> None:
    size = HALF_MB * dtype.itemsize
    sums = moved(lambda: call_phases(layout, dtype))
    # x | grad, x, masked | masked, x, dx
    expected = {"bn_stats": size, "bn_grad": 3 * size, "bn_grad_apply": 3 * size}
    for kernel, count in expected.items():
        assert count <= sums[kernel] <= 1.03 * count, (kernel, sums[kernel] / count)
    assert sums.keys() <= {*expected, "bn_stats_merge", "bn_grad_merge"}


def small_map(dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    """The forward of (32, 64, 7, 7), channels-last: with or without residual, ReLU and mask."""
    rng = torch.Generator().manual_seed(0)
    x, residual = (
        lay(torch.randn(32, 64, 7, 7, generator=rng).to(dtype), "channels_last") for _ in range(2)
    )
    both = torch.rand(64, generator=rng), torch.rand(64, generator=rng)

    def forward(add: bool, relu: bool = True, mask: bool = False) -> tuple[Tensor, ...]:
        mean, var = torch.zeros(64), torch.ones(64)
        r = residual if add else None
        y = ops.batch_norm_act_forward(x, *both, r, mean, var, True, 0.1, 1e-5, relu, mask)
        return *y, mean, var

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_bytes_moved_by_one_launch(dtype: torch.dtype, add: bool) -> None:
    """A small channels-last map: x is read once, and no kernel of statistics runs."""
    forward = small_map(dtype)
    sums = moved(lambda: forward(add))
    count = (2 + add) * 32 * 64 * 49 * dtype.itemsize
    assert sums.keys() == {"bn_fused"}
    assert count <= sums["bn_fused"] <= 1.02 * count, sums["bn_fused"] / count


def test_a_mask_is_not_for_one_launch() -> None:
    """A block would write it in pieces of sectors."""
    forward = small_map(torch.bfloat16)
    assert moved(lambda: forward(True, mask=True)).keys() >= {"bn_stats", "bn_apply"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relu_at_a_join_in_one_launch(dtype: torch.dtype) -> None:
    forward = small_map(dtype)
    y, plain = forward(True)[0], forward(True, relu=False)[0]
    assert plain.min() < 0
    assert torch.equal(y, plain.relu())


def test_five_thread_orders_of_one_launch() -> None:
    forward = small_map(torch.bfloat16)
    results = []
    for seed in range(5):
        with emulated.options(seed=seed):
            results.append(forward(True))
    for again in results[1:]:
        for first, result in zip(results[0], again, strict=True):
            assert torch.equal(first, result)


@pytest.mark.parametrize(
    ("dtype", "n", "c", "inner", "blocks"),
    [
        ("bfloat16", 32, 512, 49, 32),
        ("bfloat16", 32, 2048, 49, 128),
        ("float32", 32, 512, 49, 64),
        ("float64", 8, 64, 49, 16),
        ("bfloat16", 8, 256, 196, 16),
        ("bfloat16", 32, 256, 196, 0),  # 196 KiB a slab
        ("bfloat16", 32, 520, 49, 0),
    ],
)
def test_where_the_forward_is_one_launch(
    dtype: str, n: int, c: int, inner: int, blocks: int
) -> None:
    plan = emulated.controls().launch_plan("bn_fused", dtype, n, c, inner, True)
    assert plan["blocks"] == blocks
    assert plan["slab_bytes"] <= 64 * 1024
    assert emulated.controls().launch_plan("bn_fused", dtype, n, c, inner, False)["blocks"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_moved_over_the_gradient(layout: str) -> None:
    """The kernels, and the bytes, of the form that has memory of its own for dx."""
    x = lay(torch.randn(SHAPE), layout)
    grad = lay(torch.randn(SHAPE), layout)
    rest = (x, torch.zeros(64), torch.ones(64), None, None, None, True, True, [True] * 4)
    expected = moved(lambda: ops.batch_norm_act_backward(grad, *rest))
    assert moved(lambda: ops.batch_norm_act_backward_(grad, *rest)) == expected


def test_bytes_moved_by_add_relu() -> None:
    x = torch.randn(SHAPE)
    size, bits = 4 * HALF_MB, HALF_MB // 8
    y, mask = ops.add_relu_forward(x, x + 1, True)
    assert moved(lambda: ops.add_relu_forward(x, x + 1, True)) == {"add_relu": 3 * size + bits}
    assert moved(lambda: ops.add_relu_backward(y, mask, False)) == {
        "add_relu_backward": 2 * size + bits
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [call, call_phases])
def test_five_thread_orders_give_the_same_bits(
    function: Callable[[str, torch.dtype], dict[str, Tensor]], layout: str
) -> None:
    results = []
    for seed in range(5):
        with emulated.options(seed=seed):
            results.append(function(layout, torch.bfloat16))
    for again in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, again[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_over_the_gradient_in_any_thread_order(layout: str, training: bool) -> None:
    """Whichever thread comes first, none reads what another has written over."""
    x, grad = (lay(torch.randn(SHAPE).bfloat16(), layout) for _ in range(2))
    stats = torch.randn(64), torch.rand(64) + 0.5
    rest = (x, *stats, None, None, None, training, True, [True, False, True, True])
    expected = ops.batch_norm_act_backward(grad, *rest)
    for seed in range(5):
        over = grad.clone(memory_format=torch.preserve_format)
        with emulated.options(seed=seed):
            _, _, dweight, dbias = ops.batch_norm_act_backward_(over, *rest)
        for a, b in zip((over, dweight, dbias), (expected[0], *expected[2:]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["bn_stats", "bn_grad"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_reductions_fill_the_card_and_cover_the_rows(kernel: str, channels_last: bool) -> None:
    with emulated.options(multiprocessors=132):
        plan = emulated.controls().launch_plan(kernel, "bfloat16", 256, 256, 3136, channels_last)
    blocks = plan["blocks_x"] * plan["splits"]
    assert plan["vector"] == 8
    assert 132 <= blocks <= 3 * 132
    assert plan["threads_x"] * plan["threads_y"] == 256
    assert plan["tiles"] * plan["unroll"] * plan["threads_y"] >= plan["rows"]


@pytest.mark.parametrize("kernel", ["bn_apply", "bn_grad_apply"])
def test_sweeps_are_one_wave(kernel: str) -> None:
    with emulated.options(multiprocessors=132):
        large = emulated.controls().launch_plan(kernel, "float32", 256, 256, 3136, True)
        small = emulated.controls().launch_plan(kernel, "float32", 1, 3, 5, False)
    assert large == {"blocks": 2 * 132, "channels_last": 1, "vector": 4}
    assert small["blocks"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bn_stat", "float32", 1, 2, 3, True), "kernel must be"),
        (("bn_stats", "int8", 1, 2, 3, True), "dtype must be"),
        (("bn_stats", "float32", 0, 2, 3, True), "must be positive"),
    ],
)
def test_a_plan_of_nothing_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        emulated.controls().launch_plan(*arguments)


def test_training_on_one_value_is_refused_before_any_statistic_moves() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected more than 1 value per channel"):
        ops.batch_norm_act_forward(
            torch.ones(1, 3), None, None, None, mean, var, True, 0.1, 1e-5, True, False
        )
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


@pytest.mark.parametrize("n", [0, 2])
def test_evaluation_of_an_empty_tensor(n: int) -> None:
    x = torch.empty(n, 3, 0)
    y, mean, invstd, _ = ops.batch_norm_act_forward(
        x, None, None, None, torch.ones(3), torch.full((3,), 4.0), False, 0.1, 0.0, True, False
    )
    assert y.shape == x.shape
    assert (mean.tolist(), invstd.tolist()) == ([1.0] * 3, [0.5] * 3)


@pytest.mark.implementations("emulated")
def test_explain_names_them(impl) -> None:
    model = rf.models.resnet20().eval()
    table = rf.explain(model, torch.randn(2, 3, 8, 8))
    named = {row.implementation for row in table.rows}
    assert "emulated" in named
    assert "cpu" not in named


@pytest.mark.implementations("emulated")
def test_they_are_not_what_the_backend_cpu_means_elsewhere(impl) -> None:
    with dispatch.recording() as events:
        functional.add_relu(torch.ones(3), torch.ones(3))
    assert events == [dispatch.Event("add_relu", "emulated", "")]
