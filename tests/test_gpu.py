# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, CUDA graphs, several devices, whole models."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inference_cases import agrees, eager, image, lively
from torch import Tensor

import resnet_fast as rf
from resnet_fast import functional
from resnet_fast.inference import Plan, capture, cuda

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


# ---- optimize_for_inference ----------------------------------------------------------------------
def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return lively(rf.models.resnet18(num_classes=10)).eval().cuda()


def pictures(batch: int = 2, seed: int = 1) -> Tensor:
    return image(batch, 3, 64, 64, seed=seed).cuda()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_inference_agrees(dtype: torch.dtype, cuda_graph: bool) -> None:
    """Twice: a shape's first call measures or records, the second runs what was found."""
    model = network()
    fast = rf.optimize_for_inference(model, pictures(), dtype=dtype, cuda_graph=cuda_graph)
    for batch, seed in ((2, 1), (2, 2), (1, 3), (5, 4)):
        x = pictures(batch, seed)
        if dtype is torch.float64:
            assert_close = torch.testing.assert_close
            assert_close(fast(x), eager(model, x, dtype), rtol=1e-10, atol=1e-10)
        else:
            agrees(fast, model, x, dtype)
    assert "no CUDA graph" not in str(rf.explain(fast))
    half = dtype in (torch.bfloat16, torch.float16)
    assert {key.layout for key in fast.plan.entries()} == {
        "channels_last" if half else "contiguous"  # the tests run without TF32
    }


def test_inference_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the switch: other entries of the plan, and errors of TF32's size in eager as in ours."""
    model, x = network(), pictures()
    fast = rf.optimize_for_inference(model, x)
    fast(x)
    entries = len(fast.plan)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    agrees(fast, model, x)
    assert {key.settings for key in fast.plan.entries()} == {"", "tf32"}
    assert len(fast.plan) == 2 * entries


def test_inference_measures_once_and_a_saved_plan_not_at_all(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(), pictures()
    fast = rf.optimize_for_inference(model, x, dtype=torch.bfloat16)
    fast(x)
    measured = [entry for entry in fast.plan.entries().values() if entry.seconds]
    assert measured, "nothing stood against F.conv2d"
    for entry in measured:
        assert entry.chosen == min(entry.seconds, key=entry.seconds.__getitem__)
    path = fast.plan.save(tmp_path / "plan.json")

    def seconds(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(cuda.Cuda, "seconds", seconds)
    loaded = Plan.load(path, measure=False)
    again = rf.optimize_for_inference(model, x, dtype=torch.bfloat16, plan=loaded)
    agrees(again, model, x, torch.bfloat16)
    assert str(rf.explain(again)) == str(rf.explain(fast))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_inference_does_not_wait_for_the_gpu(cuda_graph: bool) -> None:
    model, x = network(), pictures()
    fast = rf.optimize_for_inference(model, x, dtype=torch.half, cuda_graph=cuda_graph)
    fast(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agrees(fast, model, x, torch.half)


def test_graphs_of_several_shapes_streams_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_GRAPHS", 2)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the same bits each time
    fast = rf.optimize_for_inference(network(), pictures(), dtype=torch.half, cuda_graph=True)
    inputs = [pictures(batch, seed) for batch in (1, 2, 3) for seed in (5, 6)]
    expected = [fast(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(20):
                    which = (number + turn) % len(inputs)
                    if not torch.equal(fast(inputs[which]), expected[which]):
                        wrong.append(which)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "no CUDA graph" not in str(rf.explain(fast))


def test_graphs_follow_refreshed_weights() -> None:
    model, x = network(), pictures()
    fast = rf.optimize_for_inference(model, x, cuda_graph=True)
    agrees(fast, model, x)
    with torch.no_grad():
        model.conv1.weight.mul_(-1.5)
    with pytest.raises(RuntimeError, match="refresh"):
        fast(x)
    fast.refresh(model)
    agrees(fast, model, x)


def test_what_cannot_be_recorded_leaves_the_streams_as_they_were() -> None:
    def waits(x: Tensor) -> list[Any]:
        torch.cuda.synchronize() if torch.cuda.is_current_stream_capturing() else None
        return [x * 2]

    before = torch.cuda.current_stream()
    run = capture.GraphCache(waits, lambda x: x, cuda.CudaGraphs(torch.device("cuda:0")))
    x = pictures()
    assert torch.equal(run([x])[0], x * 2)
    assert len(run.reasons()) == 1
    assert torch.cuda.current_stream() == before
    assert torch.equal((x + 1).cpu(), x.cpu() + 1)


def test_inference_inputs_must_be_on_the_models_device() -> None:
    with pytest.raises(ValueError, match="example_input must be on the model's device"):
        rf.optimize_for_inference(network(), pictures().cpu())
    fast = rf.optimize_for_inference(network(), pictures())
    with pytest.raises(ValueError, match="input is on cpu"):
        fast(pictures().cpu())
