# SPDX-License-Identifier: BSD-3-Clause
"""add_relu with a scale: y, dx and dresidual have PyTorch's bits, dscale keeps the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from cases import accumulate_dtype, word
from layouts import LAYOUTS, assert_layout, lay
from test_add_relu import DTYPES, SPECIAL, assert_same_bits
from test_opcheck import opcheck
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from resnet_fast import _scale, dispatch, functional, scaled

SHAPES = (
    (4, 7, 5, 3),
    (1, 1, 1, 1),
    (2, 16, 7, 7),
    (3, 65, 1, 1),
    (1, 3, 9, 11),
    (2, 64, 9, 7),
    (3, 5, 33, 17),
    (2, 1000),
    (3, 4, 129),
    (2, 3, 4, 5, 6),
)
KINDS = ("number", "flat", "gate", "strided")
OPS = torch.ops.resnet_fast
FORWARD, BACKWARD = "scaled_add_relu_forward", "scaled_add_relu_backward"
pytestmark = pytest.mark.implementations("reference", "plain", "cpu")


@pytest.fixture
def op(impl: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The public op under each implementation."""
    if impl.name == "plain":
        monkeypatch.setattr(scaled, "_forward", getattr(_scale, FORWARD))
        monkeypatch.setattr(scaled, "_backward", getattr(_scale, BACKWARD))
    call: Callable[..., Tensor] = impl.add_relu
    return call


def make_scale(kind: str, x: Tensor) -> Tensor | float:
    if kind == "number":
        return -0.17
    values = torch.randn(x.shape[:2]).to(x.dtype)
    ones = [1] * (x.dim() - 2)
    if kind == "gate":
        return values.reshape(*values.shape, *ones)
    if kind == "strided":
        return values[:1].clone().expand(values.shape).reshape(*values.shape, *ones)
    return values


def eager(x: Tensor, residual: Tensor, *, scale: Tensor | float) -> Tensor:
    if isinstance(scale, Tensor):
        scale = scale.view(*x.shape[:2], *[1] * (x.dim() - 2))
    return torch.relu(x * scale + residual)


def run(f: Any, x: Tensor, residual: Tensor, scale: Any, grad: Tensor) -> dict[str, Tensor]:
    leaves = {"dx": x.detach().requires_grad_(), "dresidual": residual.detach().requires_grad_()}
    if isinstance(scale, Tensor):
        leaves["dscale"] = scale = scale.detach().requires_grad_()
    y = f(leaves["dx"], leaves["dresidual"], scale=scale)
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(f: Any, x: Tensor, residual: Tensor, scale: Any, grad: Tensor) -> dict[str, Tensor]:
    """Hold f to eager's bits, and the sum that dscale is to the rule."""
    got, want = run(f, x, residual, scale, grad), run(eager, x, residual, scale, grad)
    for name in ("y", "dx", "dresidual"):
        assert_same_bits(got[name], want[name], f"{name}, x {x.stride()}")
    with torch.no_grad():
        assert_same_bits(f(x, residual, scale=scale), want["y"], "without gradient")
    if isinstance(scale, Tensor):
        assert got["dscale"].shape == scale.shape
        # The mask is that of the dtype's own output: rounding of y is not what is judged here.
        terms = torch.where(want["y"] <= 0, 0.0, grad.double()) * x.double()
        terms = terms.reshape(*x.shape[:2], -1)
        pixels = terms.size(2)
        oracle.check(
            "dscale",
            got["dscale"].reshape(x.shape[:2]),
            want["dscale"].reshape(x.shape[:2]),
            terms.sum(2),
            magnitude=terms.abs().sum(2) * max(1.0, math.log2(pixels)),
            accumulated=accumulate_dtype(x.dtype),
            channel=1,
            context=(x.stride(), pixels),
        )
    return got


def draw(shape: tuple[int, ...], dtype: torch.dtype, *layouts: str) -> list[Tensor]:
    return [lay(torch.randn(shape).to(dtype), layout) for layout in layouts]


@pytest.mark.slow_for("plain", "reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_eager(impl, op, shape, layout: str, dtype, kind: str) -> None:
    x, residual, grad = draw(shape, dtype, layout, layout, layout)
    got = compare(op, x, residual, make_scale(kind, x), grad)
    if impl.fast:
        assert_layout(got["y"], x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["number", "flat"])
def test_mixed_layouts(op, layout: str, kind: str) -> None:
    for other, of_grad in product(("contiguous", "channels_last"), LAYOUTS):
        x, residual, grad = draw((2, 7, 5, 3), torch.float32, layout, other, of_grad)
        compare(op, x, residual, make_scale(kind, x), grad)
    x, residual = draw((2, 7, 5, 3), torch.float32, layout, layout)
    compare(op, x, residual, make_scale(kind, x), torch.tensor(0.7).expand(x.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_special_values(op, dtype: torch.dtype) -> None:
    """-0.0, NaN, infinities and tiny numbers in x, residual, scale and gradient."""
    rows = list(product(SPECIAL, SPECIAL))
    x = torch.tensor([a for a, _ in rows]).to(dtype).view(9, 9, 1).repeat(1, 1, 3)
    residual = torch.tensor([b for _, b in rows]).to(dtype).view(9, 9, 1).repeat(1, 1, 3)
    for factor, value in product(SPECIAL, (1.0, -0.0, float("nan"), float("inf"))):
        scale = torch.full((9, 9), factor).to(dtype)
        grad = torch.full_like(x, value)
        for given in (scale, factor):
            got, want = run(op, x, residual, given, grad), run(eager, x, residual, given, grad)
            for name in ("y", "dx", "dresidual"):
                assert_same_bits(got[name], want[name], (name, factor, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (3, 5, 9, 7), (2, 3, 3, 3)], ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.implementations("cpu")
def test_every_instruction_set(op, instruction_set: str, shape, layout: str, dtype) -> None:
    x, residual, grad = draw(shape, dtype, layout, layout, layout)
    compare(op, x, residual, make_scale("flat", x), grad)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", [(3, 17, 101, 103), (1, 64, 97, 59), (5, 512, 7, 7)], ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large(op, shape, layout: str, dtype: torch.dtype) -> None:
    """For several threads, more than a block of pixels, images cut into chunks."""
    x, residual, grad = draw(shape, dtype, layout, layout, layout)
    for kind in ("number", "flat"):
        compare(op, x, residual, make_scale(kind, x), grad)


@pytest.mark.implementations("cpu")
@pytest.mark.parametrize("shape", [(1, 64, 97, 59), (3, 33, 65, 31)], ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_from_any_number_of_threads(op, shape, layout: str) -> None:
    x, residual, grad = draw(shape, torch.float32, layout, layout, layout)
    scale, results = make_scale("flat", x), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(op, x, residual, scale, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_and_second_order(op, kind: str, layout: str) -> None:
    """Against finite differences, which step 1e-6, well away from the kink."""
    x, residual = draw((2, 3, 2, 2), torch.float64, layout, layout)
    scale = make_scale(kind, x)
    z = x * (scale if kind == "number" else scale.view(2, 3, 1, 1)) + residual
    residual = lay(torch.where(z.abs() < 0.05, residual + 0.2, residual).contiguous(), layout)
    tensors = [x.requires_grad_(), residual.requires_grad_()]
    if isinstance(scale, Tensor):
        tensors.append(scale.clone().requires_grad_())

    def f(x: Tensor, residual: Tensor, scale: Any = scale) -> Tensor:
        return op(x, residual, scale=scale)

    assert gradcheck(f, tensors, check_undefined_grad=True)
    assert gradgradcheck(f, tensors)


@pytest.mark.parametrize("wanted", [w for w in product((True, False), repeat=3) if any(w)])
def test_only_what_needs_a_gradient_gets_one(op, wanted: tuple[bool, ...]) -> None:
    x, residual, grad = torch.randn(3, 2, 7, 5, 3).unbind()
    leaves = [x, residual, torch.randn(2, 7)]
    for t, want in zip(leaves, wanted, strict=True):
        t.requires_grad_(want)
    op(x, residual, scale=leaves[2]).backward(grad)
    full = run(eager, x, residual, leaves[2], grad)
    for t, want, name in zip(leaves, wanted, ("dx", "dresidual", "dscale"), strict=True):
        if want:
            torch.testing.assert_close(t.grad, full[name])
        else:
            assert t.grad is None


@pytest.mark.implementations("plain", "cpu")
@pytest.mark.parametrize("kind", ["number", "frozen", "gate"])
def test_what_is_saved(op, kind: str) -> None:
    """The mask; with a gate the gate; x only for the gradient of the gate."""
    x, residual = torch.randn(2, 3, 7, 5, 3, requires_grad=True).unbind()
    scale = 0.5 if kind == "number" else torch.rand(3, 7, requires_grad=kind == "gate")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x, residual, scale=scale)
    sizes = {"number": [], "frozen": [21], "gate": [x.numel(), 21]}[kind]
    assert [t.numel() for t in saved] == [*sizes, 2 * -(-x.numel() // 16)]


# ---- what runs -----------------------------------------------------------------------------------
@pytest.mark.implementations("plain")
def test_the_reference_where_there_is_no_kernel(impl, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = torch.randn(2, 2, 3, 4, 4).unbind()
    scale = torch.rand(2, 3)
    want = eager(x, residual, scale=scale)

    def reason(*args: Tensor, scale: Any) -> str:
        with dispatch.recording() as events:
            y = functional.add_relu(*args, scale=scale)
        torch.testing.assert_close(y, torch.relu(args[0] * scale.view(2, 3, 1, 1) + args[1]))
        assert [(e.op, e.impl) for e in events] == [("scaled_add_relu", "reference")]
        return events[0].reason

    assert reason(x.bfloat16(), residual.bfloat16(), scale=scale) == "scale and x differ in dtype"
    assert "differs from x" in reason(x, residual[:1], scale=scale)
    monkeypatch.setitem(dispatch._fast, "cpu", "cuda")
    assert reason(x, residual, scale=scale) == "no cuda kernel for scaled_add_relu yet"
    assert torch.equal(functional.add_relu(x, residual, scale=scale), want)


def test_an_empty_batch(op) -> None:
    x = torch.randn(0, 3, 4, 4)
    with dispatch.recording() as events:
        assert functional.add_relu(x, x, scale=torch.rand(0, 3)).shape == x.shape
    assert events[0].impl == "reference"


X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        ("0.5", TypeError, ("scale must be a tensor, a float or None", "got str")),
        (True, TypeError, ("scale", "got bool")),
        (torch.ones(3), ValueError, ("scale must have shape (2, 3)", "got (3,)")),
        (torch.ones(3, 2), ValueError, ("scale must have shape (2, 3)", "got (3, 2)")),
        (torch.ones(2, 3, 4, 4), ValueError, ("scale", "got (2, 3, 4, 4)")),
        (torch.ones(2, 3, 1), ValueError, ("scale", "got (2, 3, 1)")),
        (torch.tensor(0.5), ValueError, ("scale", "got ()")),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, ("scale", "int64")),
        (torch.ones(2, 3, device="meta"), ValueError, ("scale", "cpu", "got meta")),
    ],
)
def test_bad_scales(op, scale: Any, error: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        op(X, X, scale=scale)
    assert all(word in str(raised.value) for word in words), raised.value


def test_bad_tensors(op) -> None:
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        op([1.0], X, scale=torch.ones(2, 3))
    with pytest.raises(TypeError, match="residual must be a tensor; got float"):
        op(X, 1.0, scale=0.5)
    with pytest.raises(ValueError, match="residual must have, or broadcast"):
        op(X, torch.randn(5, 3, 4, 4), scale=0.5)


# ---- the raw operators ---------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.implementations("cpu")
def test_opcheck(impl, layout: str, dtype: torch.dtype) -> None:
    traced = (layout, dtype) in (("contiguous", torch.float32), ("channels_last", torch.bfloat16))
    x, residual, grad = draw((2, 3, 4, 5), dtype, layout, layout, layout)
    for scale in (None, torch.rand(2, 3).to(dtype)):
        for save_mask in (True, False):
            args = (x, residual, scale, 0.5, save_mask)
            opcheck(OPS.scaled_add_relu_forward, args, traced=traced)
        _, mask = OPS.scaled_add_relu_forward(x, residual, scale, 0.5, True)
        last = layout == "channels_last"
        for wanted in ([True, True, scale is not None], [False, False, False]):
            opcheck(
                OPS.scaled_add_relu_backward,
                (grad, x, scale, 0.5, mask, last, wanted),
                traced=traced,
            )


@pytest.mark.parametrize("backend", [_scale, OPS], ids=["plain", "registered"])
@pytest.mark.implementations("cpu")
def test_raw_operators_refuse(impl, backend: Any) -> None:
    forward, backward = getattr(backend, FORWARD), getattr(backend, BACKWARD)
    scale, mask = torch.rand(2, 3), torch.zeros(12, dtype=torch.uint8)
    bad: list[tuple[Any, tuple[Any, ...], str]] = [
        (forward, (X, X[:1], scale, 1.0, True), "residual must have x's shape"),
        (forward, (X, X, scale[:1], 1.0, True), "scale must have shape"),
        (forward, (X, X, scale.double(), 1.0, True), "scale must have shape"),
        (forward, (X[0, 0, 0], X[0, 0, 0], scale, 1.0, True), "x must have 2 or more dimensions"),
        (backward, (X, X, scale, 1.0, mask[1:], False, [True] * 3), "mask must be a 1-D uint8"),
        (backward, (X, X, scale.T, 1.0, mask, False, [True] * 3), "scale must have shape"),
    ]
    for f, args, sentence in bad:
        with pytest.raises(RuntimeError, match=sentence):
            f(*args)


@pytest.mark.implementations("cpu")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(impl, backend: str) -> None:
    """A squeeze-and-excitation join behind a convolution, forward and backward, in one graph."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
    leaves = [torch.randn(2, 3, 9, 7), torch.randn(2, 8, 9, 7)]
    leaves = [lay(t, "channels_last").requires_grad_() for t in leaves]

    def f(x: Tensor, residual: Tensor) -> Tensor:
        z = conv(x)
        return functional.add_relu(z, residual, scale=z.mean((2, 3), keepdim=True).sigmoid())

    grad = torch.randn(2, 8, 9, 7)
    want = torch.autograd.grad(f(*leaves), leaves, grad)
    torch._dynamo.reset()
    got = torch.autograd.grad(
        torch.compile(f, fullgraph=True, backend=backend)(*leaves), leaves, grad
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
