# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, CUDA graphs, several devices, whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf
from resnet_fast import functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def tensors(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    rng = torch.Generator(device).manual_seed(0)

    def random(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=kind)

    image = {n: random(8, 64, 14, 14, kind=dtype) for n in ("x", "residual", "grad")}
    image = {n: t.to(memory_format=torch.channels_last) for n, t in image.items()}
    return image | {n: random(64, kind=torch.float32) for n in ("weight", "bias")}


def step(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Output and gradients of one batch norm with residual."""
    leaves = [t[n].detach().requires_grad_() for n in ("x", "residual", "weight", "bias")]
    x, residual, weight, bias = leaves
    y = functional.batch_norm_act(x, weight, bias, None, None, residual=residual, training=True)
    return (y.detach(), *torch.autograd.grad(y, leaves, t["grad"]))


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_the_kernels_are_there() -> None:
    """No skip: on a machine with a GPU they must have been built for it."""
    assert rf.why_unavailable("cuda") is None
    assert rf.env.why_not_card(torch.cuda.current_device()) == ""


def test_launches_go_to_the_current_stream() -> None:
    t = tensors()
    expected = step({**t, "x": -t["x"]})
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what another stream runs now still finds the old x
        t["x"].neg_()
        got = step(t)
    stream.synchronize()
    assert_equal(got, expected)


def test_forward_and_backward_in_a_cuda_graph() -> None:
    t = tensors()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(t)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(t)
    for n in ("x", "residual", "grad"):
        t[n].mul_(-0.5)
    expected = step(t)
    graph.replay()
    assert_equal(captured, expected)


def test_nothing_waits_for_the_gpu() -> None:
    t = tensors()
    half = {n: v.half() for n, v in t.items()}  # parameters, too: converted on the GPU
    step(t), step(half)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(t), step(half)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    assert_equal(
        tuple(v.cpu() for v in step(tensors("cuda:1"))), tuple(v.cpu() for v in step(tensors()))
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_model_runs_the_cuda_kernels_and_gives_eagers_numbers(training: bool) -> None:
    torch.manual_seed(0)
    plain = rf.models.resnet18(num_classes=10).cuda().double().train(training)
    ours = copy.deepcopy(plain)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float64)
    table = rf.explain(ours, x)
    assert {row.implementation for row in table.rows} == {"cuda"}
    results: list[list[Tensor]] = []
    settings: Any = ((plain, "reference"), (ours, "cuda"))
    for model, backend in settings:
        with rf.use_backend(backend):
            y = model(x)
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def backward_arguments(t: dict[str, Tensor]) -> tuple[Any, ...]:
    """grad, x, statistics and parameters of a forward in training mode."""
    _, mean, invstd, _ = torch.ops.resnet_fast.batch_norm_act_forward(
        t["x"], t["weight"], t["bias"], None, None, None, True, 0.1, 1e-5, True, False
    )
    return t["grad"], t["x"], mean, invstd, t["weight"], t["bias"], None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dx_over_the_gradient(dtype: torch.dtype) -> None:
    ops = torch.ops.resnet_fast
    grad, *rest = backward_arguments(tensors(dtype=dtype))
    wanted = True, True, [True, False, True, True]
    expected = ops.batch_norm_act_backward(grad, *rest, *wanted)
    over = grad.clone(memory_format=torch.preserve_format)
    got = ops.batch_norm_act_backward_(over, *rest, *wanted)
    assert_equal((over, *got[2:]), (expected[0], *expected[2:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_phases_are_the_whole(dtype: torch.dtype) -> None:
    ops = torch.ops.resnet_fast
    args = backward_arguments(tensors(dtype=dtype))
    _, x, mean, invstd, weight, *_ = args
    count = x.numel() / x.size(1)
    batch_mean, m2 = ops.batch_norm_statistics(x)
    torch.testing.assert_close(batch_mean.to(mean.dtype), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((m2 / count + 1e-5).rsqrt().to(mean.dtype), invstd)
    masked, total, dot = ops.batch_norm_act_backward_reduce(*args, True)
    dx = ops.batch_norm_act_backward_apply(masked, x, mean, invstd, weight, total, dot, count)
    whole = ops.batch_norm_act_backward(*args, True, True, [True] * 4)
    assert_equal((dx, masked, total.to(whole[3].dtype)), (whole[0], whole[1], whole[3]))


def test_under_autocast() -> None:
    t = tensors(dtype=torch.float32)
    conv = torch.randn(64, 64, 1, 1, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = functional.conv_bn_act(t["x"], conv, t["weight"], t["bias"], None, None, training=True)
        z = F.conv2d(t["x"], conv)
        eager = F.relu(F.batch_norm(z, None, None, t["weight"], t["bias"], training=True))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, eager, rtol=0.02, atol=0.02)
