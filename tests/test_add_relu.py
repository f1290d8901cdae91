# SPDX-License-Identifier: BSD-3-Clause
"""add_relu: bitwise what PyTorch's + and relu give, forward and backward, in every layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import word
from layouts import LAYOUTS, assert_layout, lay
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (4, 7, 5, 3),
    (1, 1, 1, 1),
    (2, 16, 7, 7),
    (3, 65, 1, 1),
    (1, 3, 9, 11),
    (2, 1000),
    (5,),
    (3, 4, 129),
    (2, 3, 4, 5, 6),
    (0, 3, 4, 4),
)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 6e-8, -6e-8)
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def assert_same_bits(ours: Tensor, eager: Tensor, context: object = "") -> None:
    """Equal to the last bit, signs of zero included, and NaN in the same places."""
    assert ours.shape == eager.shape
    assert ours.dtype == eager.dtype
    ours, eager = (t.detach().cpu().contiguous() for t in (ours, eager))
    bits = [t.view(_INTEGER[t.element_size()]) for t in (ours, eager)]
    off = (bits[0] != bits[1]) & ~(ours.isnan() & eager.isnan())
    where = off.nonzero()[:5].tolist()
    assert not where, f"{context}: at {where} ours {ours[off][:5]}, eager {eager[off][:5]}"


def forward_backward(op, x: Tensor, residual: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    same = residual is x
    x = x.detach().requires_grad_()
    residual = x if same else residual.detach().requires_grad_()
    y = op(x, residual)
    return y, *torch.autograd.grad(y, [x] if same else [x, residual], grad)


def eager(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def assert_same_as_eager(impl, x: Tensor, residual: Tensor, grad: Tensor) -> None:
    ours = forward_backward(impl.add_relu, x, residual, grad)
    theirs = forward_backward(eager, x, residual, grad)
    if impl.fast:
        assert_layout(ours[0], x)
    for name, a, b in zip(("y", "dx", "dresidual"), ours, theirs, strict=False):
        assert_same_bits(a, b, f"{name}, x {x.stride()}, residual {residual.stride()}")
    with torch.no_grad():
        assert_same_bits(impl.add_relu(x, residual), theirs[0], "without gradient")


@pytest.mark.slow_for("plain", "reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s and len(s) > 1], ids=word)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_eager(impl, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, residual, grad = (lay(torch.randn(shape).to(dtype), layout) for _ in range(3))
    assert_same_as_eager(impl, x, residual, grad)


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 3, 4, 3, 2)], ids=word)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "scalar"])
def test_mixed_layouts(impl, shape: tuple[int, ...], grad_layout: str) -> None:
    for x_layout, residual_layout in product(LAYOUTS, LAYOUTS):
        x, residual = lay(torch.randn(shape), x_layout), lay(torch.randn(shape), residual_layout)
        if grad_layout == "scalar":
            grad = torch.tensor(0.7).expand(shape)
        else:
            grad = lay(torch.randn(shape), grad_layout)
        assert_same_as_eager(impl, x, residual, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("repeat", [1, 7])
def test_special_values(impl, dtype: torch.dtype, repeat: int) -> None:
    """Every pair of -0.0, NaN, infinities, ones and tiny numbers, with special gradients too."""
    pairs = list(product(SPECIAL, SPECIAL))
    x = torch.tensor([a for a, _ in pairs]).to(dtype).repeat(repeat).view(repeat, -1)
    residual = torch.tensor([b for _, b in pairs]).to(dtype).repeat(repeat).view(repeat, -1)
    for value in SPECIAL:
        assert_same_as_eager(impl, x, residual, torch.full_like(x, value))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_is_x_itself(impl, layout: str) -> None:
    x, grad = lay(torch.randn(2, 7, 5, 3), layout), torch.randn(2, 7, 5, 3)
    assert_same_as_eager(impl, x, x, grad)


@pytest.mark.parametrize("needs", ["x", "residual"])
def test_only_one_needs_a_gradient(impl, needs: str) -> None:
    x, residual, grad = torch.randn(3, 2, 7, 5, 3).unbind()
    x.requires_grad_(needs == "x")
    residual.requires_grad_(needs == "residual")
    impl.add_relu(x, residual).backward(grad)
    needed, other = (x, residual) if needs == "x" else (residual, x)
    assert_same_bits(needed.grad, torch.where(x + residual > 0, grad, 0.0))
    assert other.grad is None


def test_no_graph_when_nothing_needs_a_gradient(impl) -> None:
    x, residual = torch.randn(2, 2, 7, 5, 3).unbind()
    assert not impl.add_relu(x, residual).requires_grad
    with torch.no_grad():
        assert not impl.add_relu(x.requires_grad_(), residual).requires_grad


@pytest.mark.implementations("plain", "cpu", "emulated")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=word)
def test_mask_is_one_bit_an_element_in_memory_order(
    impl, shape: tuple[int, ...], layout: str
) -> None:
    if layout == "sliced" and len(shape) < 2:
        layout = "contiguous"
    x, residual = lay(torch.randn(shape), layout), torch.randn(shape)
    y, mask = impl.raw.add_relu_forward(x, residual, True)
    assert mask.shape == (2 * -(-x.numel() // 16),)
    assert mask.dtype == torch.uint8
    assert_layout(y, x)
    moved = y if y.is_contiguous() else y.movedim(1, -1)
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = ((mask.view(-1, 1) >> shifts) & 1).view(-1).bool()
    assert torch.equal(bits[: y.numel()], moved.reshape(-1) > 0)
    assert not bits[y.numel() :].any(), "padding bits are not 0"
    assert impl.raw.add_relu_forward(x, residual, False)[1].shape == (0,)


@pytest.mark.implementations("plain", "cpu", "emulated")
def test_only_the_mask_is_saved(impl) -> None:
    x, residual = torch.randn(2, 3, 7, 5, 3, requires_grad=True).unbind()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        impl.add_relu(x, residual)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 2 * -(-x.numel() // 16))]


def test_inputs_are_not_written_and_not_aliased(impl) -> None:
    x, residual = torch.randn(2, 2, 7, 5, 3).abs().unbind()
    before = x.clone(), residual.clone()
    y = impl.add_relu(x, residual)
    y.zero_()
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_large(impl, dtype: torch.dtype) -> None:
    """Large enough for several threads, with a length that no vector divides."""
    x, residual, grad = torch.randn(3, 3, 17, 101, 103).to(dtype).unbind()
    assert_same_as_eager(impl, x, residual, grad)
    assert_same_as_eager(impl, lay(x, "channels_last"), lay(residual, "channels_last"), grad)
