# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA module where there is no GPU: it loads, registers, and is passed over with a reason."""

from __future__ import annotations

import emulated
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fast as rf
from resnet_fast import dispatch, env, functional

pytestmark = pytest.mark.skipif(not rf.is_available("cuda"), reason=str(rf.why_unavailable("cuda")))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.mark.parametrize("name", emulated.NAMES)
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"resnet_fast::{name}", "CUDA")
    assert has(f"resnet_fast::{name}", "CPU")


@no_gpu
def test_a_cuda_tensor_without_a_device_runs_the_reference() -> None:
    """As when a model for GPUs is traced with fake tensors on a machine that has none."""
    assert env.why_not_card(0) == "PyTorch finds no CUDA device"
    with FakeTensorMode(), dispatch.recording() as events:
        x = torch.empty(2, 3, 4, 5, device="cuda")
        y = functional.add_relu(x, x)
    assert (y.device.type, y.shape) == ("cuda", x.shape)
    assert events == [dispatch.Event("add_relu", "reference", "PyTorch finds no CUDA device")]


def test_cuda_tensors_are_served_where_the_card_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "why_not_card", lambda index: "")
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, device="cuda")
        stats = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        with dispatch.recording() as events, rf.use_backend("cuda"):
            functional.add_relu(x, x)
            y = functional.batch_norm_act(x, None, None, *stats, training=True, residual=x)
        with dispatch.recording() as others, rf.use_backend("cpu"):
            functional.add_relu(x, x)
    assert y.device.type == "cuda"
    assert [e.impl for e in events] == ["cuda", "cuda"]
    assert others == [
        dispatch.Event("add_relu", "reference", "use_backend('cpu'), and x is on cuda")
    ]


def test_a_card_without_code_in_this_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "why_not_card", lambda index: f"card {index} is too old")
    with FakeTensorMode(), dispatch.recording() as events:
        x = torch.empty(2, 3, device="cuda")
        functional.add_relu(x, x)
    assert events == [dispatch.Event("add_relu", "reference", "card 0 is too old")]


def test_a_module_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_why_no_cuda", "no nvcc at installation")
    assert (rf.is_available("cuda"), rf.is_available()) == (False, True)
    with FakeTensorMode(), dispatch.recording() as events:
        x = torch.empty(2, 3, device="cuda")
        functional.add_relu(x, x)
    assert events == [dispatch.Event("add_relu", "reference", "no nvcc at installation")]


def test_a_compiler_takes_the_card_as_a_constant() -> None:
    """No graph break: the probe goes through ctypes, which a compiler cannot trace."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if env.why_not_card(0) else x - 1

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), call(torch.zeros(2)))


@pytest.mark.parametrize("device", ["gpu", "", None])
def test_unknown_devices_are_refused(device: object) -> None:
    with pytest.raises(ValueError, match='device must be "cpu" or "cuda"; got'):
        rf.why_unavailable(device)  # type: ignore[arg-type]
