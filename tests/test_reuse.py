# SPDX-License-Identifier: BSD-3-Clause
"""The backward that writes over its gradient: the same numbers, and only if nobody else looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _plain, _reuse, functional

ops = torch.ops.resnet_fast
GPU_KERNELS = [] if isinstance(emulated.load(), str) else [emulated.operators]
SHAPE = (4, 6, 5, 7)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reuse, "SMALL", 0)


@pytest.fixture
def overwrites(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every backward that wrote over its gradient."""
    calls: list[int] = []
    raw = functional._batch_norm_act_backward_

    def watched(*args: Any) -> Any:
        calls.append(1)
        return raw(*args)

    monkeypatch.setattr(functional, "_batch_norm_act_backward_", watched)
    return calls


def norm(x: Tensor, residual: Tensor | None = None) -> Tensor:
    weight = torch.linspace(0.5, 1.5, x.shape[1])
    return functional.batch_norm_act(
        x, weight, weight - 1, None, None, residual=residual, training=True
    )


def leaf() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "wanted", [(1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1)]
)
def test_the_same_bits(
    layout: str, dtype: torch.dtype, training: bool, relu: bool, wanted: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual, grad = (
        torch.randn(SHAPE, generator=generator).to(dtype).to(memory_format=LAYOUTS[layout])
        for _ in range(3)
    )
    weight, bias = torch.rand(6, generator=generator), torch.randn(6, generator=generator)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    with_residual = bool(wanted[1])
    forward = (x, weight, bias, residual if with_residual else None, mean, var)
    out = ops.batch_norm_act_forward(*forward, training, 0.1, 1e-5, relu, relu and with_residual)
    mask = out[3] if relu and with_residual else None
    rest = (x, out[1], out[2], weight, bias, mask, training, relu, [bool(w) for w in wanted])
    for implementation in (ops, _plain, *GPU_KERNELS):
        expected = implementation.batch_norm_act_backward(grad, *rest)
        over = grad.clone(memory_format=torch.preserve_format)
        got = list(implementation.batch_norm_act_backward_(over, *rest))
        assert got[0].numel() == 0
        if wanted[0]:
            got[0] = over
        else:
            assert torch.equal(over, grad)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ops", [ops, *GPU_KERNELS], ids=str)
def test_refuses_a_gradient_of_other_strides(ops: Any) -> None:
    x = leaf().detach()
    stat = torch.ones(6)
    grad = torch.ones(SHAPE).to(memory_format=torch.channels_last)
    before = grad.clone()
    with pytest.raises(RuntimeError, match="grad must have x's strides"):
        ops.batch_norm_act_backward_(grad, x, stat, stat, None, None, None, True, True, [True] * 4)
    assert torch.equal(grad, before)


# ---- when ----------------------------------------------------------------------------------------
def test_written_over_when_nobody_else_holds_it(overwrites: list[int]) -> None:
    x = leaf()
    (norm(x) * 2).sum().backward()
    assert len(overwrites) == 1
    y = leaf()
    (norm(y, y * 1) * 2).sum().backward()
    assert len(overwrites) == 2


def test_not_where_the_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls: list[int] = []
    raw = functional._batch_norm_act_backward_

    def watched(*args: Any) -> Any:
        calls.append(args[0].numel())
        return raw(*args)

    monkeypatch.setattr(functional, "_batch_norm_act_backward_", watched)
    for numel in (_reuse.SMALL // 2, _reuse.SMALL):
        x = torch.randn(2, 8, numel // 16).requires_grad_()
        (norm(x) * 2).sum().backward()
    assert calls == [_reuse.SMALL]


def keep_by_hook(y: Tensor) -> Any:
    kept: list[Tensor] = []
    y.register_hook(kept.append)
    return kept


def keep_detached_by_hook(y: Tensor) -> Any:
    kept: list[Tensor] = []
    y.register_hook(lambda grad: kept.append(grad.detach()))
    return kept


def keep_row_by_hook(y: Tensor) -> Any:
    kept: list[Tensor] = []
    y.register_hook(lambda grad: kept.append(grad[1]))
    return kept


def keep_array_by_hook(y: Tensor) -> Any:
    kept: list[Any] = []
    y.register_hook(lambda grad: kept.append(grad.numpy()))
    return kept


def keep_by_node_hook(y: Tensor) -> Any:
    kept: list[Tensor] = []
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    return kept


@pytest.mark.parametrize(
    "keep",
    [keep_by_hook, keep_detached_by_hook, keep_row_by_hook, keep_array_by_hook, keep_by_node_hook],
)
def test_what_a_hook_kept_stays(keep: Callable[[Tensor], Any], overwrites: list[int]) -> None:
    x = leaf()
    y = norm(x)
    kept = keep(y)
    (y * 3).sum().backward()
    assert np.all(np.asarray(kept[0]) == 3)
    assert overwrites == []


def test_a_gradient_given_by_the_caller_stays(overwrites: list[int]) -> None:
    given = torch.full(SHAPE, 3.0)
    torch.autograd.grad(norm(leaf()), [leaf()], given, allow_unused=True)
    array = np.full(SHAPE, 3.0, np.float32)
    norm(leaf()).backward(torch.from_numpy(array))
    norm(leaf()).backward(given)
    assert torch.all(given == 3)
    assert np.all(array == 3)
    assert overwrites == []


class FromArray(torch.autograd.Function):
    """Hands back a gradient that lies in an array of its own."""

    array = np.full(SHAPE, 3.0, np.float32)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(FromArray.array)


def test_a_gradient_in_memory_of_an_array_stays(overwrites: list[int]) -> None:
    FromArray.apply(norm(leaf())).sum().backward()
    assert np.all(FromArray.array == 3)
    assert overwrites == []


def test_a_gradient_asked_for_stays(overwrites: list[int]) -> None:
    x = leaf()
    y = norm(x)
    _, of_y = torch.autograd.grad((y * 3).sum(), [x, y])
    assert torch.all(of_y == 3)
    assert overwrites == []
    y = norm(x)
    y.retain_grad()
    (y * 3).sum().backward()
    assert y.grad is not None
    assert torch.all(y.grad == 3)


def test_one_gradient_for_two_norms(overwrites: list[int]) -> None:
    """A sum hands the same tensor to both its sides: the first must leave it to the second."""

    def gradients() -> list[Tensor]:
        a, b = leaf(), leaf()
        ((norm(a) + norm(b * 2)) * torch.linspace(0, 1, 7)).sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        return [a.grad, b.grad]

    got = gradients()
    assert len(overwrites) == 1
    with rf.use_backend("reference"):
        expected = gradients()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_not_in_a_graph_of_the_gradient_nor_under_vmap(overwrites: list[int]) -> None:
    x = leaf()
    torch.autograd.grad((norm(x) * 2).sum(), x, create_graph=True)
    seeds = torch.ones(2, *SHAPE)
    torch.autograd.grad(norm(x), x, seeds, is_grads_batched=True)
    assert torch.all(seeds == 1)
    assert overwrites == []


def test_a_second_backward_gives_the_same(overwrites: list[int]) -> None:
    x = leaf()
    loss = (norm(x) * 2).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    copy = first.clone()
    (second,) = torch.autograd.grad(loss, x)
    assert len(overwrites) == 2
    assert torch.equal(first, copy)
    assert torch.equal(second, copy)


def test_not_where_the_counts_are_unknown(
    overwrites: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reuse, "_alone", [None])
    (norm(leaf()) * 2).sum().backward()
    assert overwrites == []


def test_not_where_pytorch_cannot_count(
    overwrites: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts are private names: without them the backward runs, into memory of its own."""
    monkeypatch.setattr(_reuse, "_alone", [])
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    x = leaf()
    (norm(x) * 2).sum().backward()
    assert x.grad is not None
    assert overwrites == []
