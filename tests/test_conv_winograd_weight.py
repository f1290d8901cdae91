# SPDX-License-Identifier: BSD-3-Clause
"""conv_winograd_pack and conv_winograd_weight, which training adds to test_conv_ops.py's."""

from __future__ import annotations

import itertools
from typing import Any

import layouts
import oracle
import pytest
import torch
import winograd
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv

OPS = torch.ops.resnet_fast
# (N, C_in, C_out, H, W, padding): tiles that hang over, half panels, several blocks of tiles
SHAPES = [
    (2, 48, 80, 13, 9, (1, 1)),
    (1, 16, 16, 5, 6, (0, 2)),
    (5, 80, 48, 4, 3, (2, 1)),
    (1, 16, 48, 1, 2, (1, 1)),
    (3, 16, 16, 3, 3, (0, 0)),
    (24, 64, 48, 15, 17, (1, 0)),
]
FILTERS = [(16, 16), (48, 80), (80, 48), (16, 3), (32, 37)]  # columns, rows
WEIGHT_LAYOUTS = ("contiguous", "channels_last", "sliced", "channel_slice", "expanded", "permuted")

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


def make(shape: tuple[Any, ...]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(grad, x, padding), of means other than 0, so that sums grow."""
    n, c_in, c_out, height, width, padding = shape
    size = [s + 2 * p - 2 for s, p in zip((height, width), padding, strict=True)]
    x, grad = torch.randn(n, c_in, height, width) + 0.5, torch.randn(n, c_out, *size) + 0.25
    return layouts.channels_last(grad), layouts.channels_last(x), padding


def plain(grad: Tensor, x: Tensor, padding: tuple[int, int]) -> Tensor:
    return torch.nn.grad.conv2d_weight(
        x, (grad.size(1), x.size(1), 3, 3), grad, stride=1, padding=padding
    )


def check_weight(grad: Tensor, x: Tensor, padding: tuple[int, int], tile: int) -> Tensor:
    ours: Tensor = OPS.conv_winograd_weight(grad, x, padding, tile)
    eager, exact = plain(grad, x, padding), plain(grad.double(), x.double(), padding)
    terms = winograd.weight_gradient(grad, x, tile, padding, magnitude=True)
    oracle.check("dw", ours, eager, exact, magnitude=terms, channel=0)
    c_out, c_in = ours.shape[:2]
    assert ours.stride() == (9 * c_in, 1, 3 * c_in, c_in), c_out
    return ours


# ---- the weight's gradient -----------------------------------------------------------------------
@pytest.mark.parametrize("tile", [2, 4])
def test_the_textbook(tile: int) -> None:
    """The tests' own formula, whose magnitudes are the floor, is the gradient."""
    for shape in SHAPES[:4]:
        grad, x, padding = (t.double() if isinstance(t, Tensor) else t for t in make(shape))
        ours = winograd.weight_gradient(grad, x, tile, padding)
        torch.testing.assert_close(ours, plain(grad, x, padding))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight(instruction_set: str, shape: tuple[Any, ...], tile: int) -> None:
    check_weight(*make(shape), tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [*itertools.product((16, 48, 80), repeat=2)], ids=str)
@pytest.mark.parametrize("padding", [*itertools.product((0, 1, 2), repeat=2)], ids=str)
def test_weight_sweep(
    instruction_set: str, channels: tuple[int, int], padding: tuple[int, int], tile: int
) -> None:
    for n, height, width in itertools.product((1, 9), (3, 4, 7, 12), (3, 5, 10)):
        check_weight(*make((n, *channels, height, width, padding)), tile)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_weight_of_any_layout(layout: str) -> None:
    grad, x, padding = make(SHAPES[0])
    for tile in (2, 4):
        check_weight(layouts.lay(grad, layout), x, padding, tile)
        check_weight(grad, layouts.lay(x, layout), padding, tile)


def test_of_a_sum() -> None:
    """sum()'s gradient: one value with strides 0."""
    grad, x, padding = make(SHAPES[0])
    for tile in (2, 4):
        check_weight(torch.ones(()).expand(grad.shape), x, padding, tile)


def test_threads_and_layouts_do_not_change_a_bit(two_threads: None) -> None:
    for shape, tile in itertools.product(SHAPES, (2, 4)):
        grad, x, padding = make(shape)
        two = OPS.conv_winograd_weight(grad, x, padding, tile)
        assert torch.equal(OPS.conv_winograd_weight(grad, x, padding, tile), two)
        torch.set_num_threads(1)
        assert torch.equal(OPS.conv_winograd_weight(grad, x, padding, tile), two)
        other = OPS.conv_winograd_weight(grad.contiguous(), x.contiguous(), padding, tile)
        assert torch.equal(other, two)
        torch.set_num_threads(2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tile", [2, 4])
def test_what_is_not_finite_arrives(bad: float, tile: int) -> None:
    """Wherever PyTorch's gradient is not finite ours is not, and no other channel is touched."""
    shape = (2, 16, 32, 6, 5, (1, 1))
    for in_grad, place in itertools.product((True, False), itertools.product((0, 3, 5), (0, 2, 4))):
        grad, x, padding = make(shape)
        spoilt = grad if in_grad else x
        spoilt[1, 3, place[0], place[1]] = bad
        ours = OPS.conv_winograd_weight(grad, x, padding, tile)
        eager = plain(grad, x, padding)
        assert not eager.isfinite().all()
        assert not ours[~eager.isfinite()].isfinite().any()
        others = torch.arange(32 if in_grad else 16) != 3
        assert ours[others].isfinite().all() if in_grad else ours[:, others].isfinite().all()


def test_empty_batch() -> None:
    dw = OPS.conv_winograd_weight(torch.empty(0, 32, 5, 5), torch.empty(0, 16, 5, 5), [1, 1], 4)
    assert dw.shape == (32, 16, 3, 3)
    assert torch.equal(dw, torch.zeros(32, 16, 3, 3))


def test_plain_weight() -> None:
    """What runs where the extension was not built."""
    grad, x, padding = make(SHAPES[0])
    ours = _conv.conv_winograd_weight(grad, x, list(padding), 4)
    torch.testing.assert_close(ours, plain(grad, x, padding))
    assert ours.stride() == OPS.conv_winograd_weight(grad, x, padding, 4).stride()


# ---- packing -------------------------------------------------------------------------------------
def check_pack(weight: Tensor, tile: int, transposed: bool) -> Tensor:
    """Rounded once from float64: the values are those of the formula to half a unit."""
    packed: Tensor = OPS.conv_winograd_pack(weight, tile, transposed)
    filters = weight.double()
    filters = filters.transpose(0, 1).flip(2, 3) if transposed else filters
    columns, rows = filters.shape[:2]
    _, g, _ = winograd.matrices(tile)
    points = torch.einsum("ai,krij,bj->abrk", g, filters, g).flatten(0, 1)
    terms = torch.einsum("ai,krij,bj->abrk", g.abs(), filters.abs(), g.abs()).flatten(0, 1)
    panels = packed.double().transpose(1, 2).flatten(2)
    assert packed.shape == ((tile + 2) ** 2, -(-columns // _conv.PANEL), rows, _conv.PANEL)
    assert packed.is_contiguous()
    assert not panels[..., columns:].any()
    allowed = torch.finfo(torch.float32).eps / 2 * points.abs() + 1e-15 * terms
    assert ((panels[..., :columns] - points).abs() <= allowed).all()
    return packed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", FILTERS, ids=str)
def test_pack(instruction_set: str, size: tuple[int, int], tile: int, transposed: bool) -> None:
    shape = tuple(reversed(size)) if transposed else size
    check_pack(torch.randn(*shape, 3, 3), tile, transposed)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_pack_of_any_layout(layout: str) -> None:
    for tile, transposed in itertools.product((2, 4), (False, True)):
        weight = layouts.lay(torch.randn(48, 80, 3, 3), layout)
        packed = check_pack(weight, tile, transposed)
        assert torch.equal(OPS.conv_winograd_pack(weight.contiguous(), tile, transposed), packed)
        for part in (weight[16:], weight[:, 16:64]):
            check_pack(part, tile, transposed)
    for expanded in (torch.randn(16, 1, 3, 3), torch.randn(16, 16, 1, 1), torch.randn(1, 1, 3, 1)):
        check_pack(expanded.expand(16, 16, 3, 3), 4, False)
    turned = torch.randn(16, 16, 3, 3).transpose(2, 3)
    check_pack(turned, 4, True)


def test_pack_threads_do_not_change_a_bit(two_threads: None) -> None:
    weight = torch.randn(80, 48, 3, 3)
    for tile, transposed in itertools.product((2, 4), (False, True)):
        two = OPS.conv_winograd_pack(weight, tile, transposed)
        torch.set_num_threads(1)
        assert torch.equal(OPS.conv_winograd_pack(weight, tile, transposed), two)
        torch.set_num_threads(2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pack_keeps_what_is_not_finite(bad: float) -> None:
    """Some point of every tap holds it, and no other channel does."""
    for tile, transposed, tap in itertools.product((2, 4), (False, True), range(9)):
        weight = torch.randn(32, 16, 3, 3)
        weight[20, 5, tap // 3, tap % 3] = bad
        packed = OPS.conv_winograd_pack(weight, tile, transposed)
        at = packed[:, 0, 20, 5] if transposed else packed[:, 0, 5, 20]
        assert not at.isfinite().all()
        at.zero_()
        assert packed.isfinite().all()


def test_plain_pack() -> None:
    weight = torch.randn(48, 80, 3, 3)
    for tile, transposed in itertools.product((2, 4), (False, True)):
        ours = _conv.conv_winograd_pack(weight, tile, transposed)
        torch.testing.assert_close(ours, OPS.conv_winograd_pack(weight, tile, transposed))


# ---- both ----------------------------------------------------------------------------------------
def test_outputs_are_no_views() -> None:
    """A view could not be changed in place where autograd has given it out."""
    grad, x, padding = make(SHAPES[1])
    packed = OPS.conv_winograd_pack(torch.randn(16, 16, 3, 3), 4, False)
    assert not OPS.conv_winograd(x, packed, torch.zeros(16), None, padding, 4, False)._is_view()
    assert not OPS.conv_winograd_weight(grad, x, padding, 4)._is_view()


def test_opcheck() -> None:
    for tile, transposed in itertools.product((2, 4), (False, True)):
        weight = torch.randn(48, 16, 3, 3)
        torch.library.opcheck(OPS.conv_winograd_pack.default, (weight, tile, transposed))
    for shape in (SHAPES[1], SHAPES[3]):
        grad, x, padding = make(shape)
        for given in (grad, grad.contiguous()):
            torch.library.opcheck(OPS.conv_winograd_weight.default, (given, x, padding, 2))


GRAD, X, PADDING = torch.zeros(2, 32, 5, 6), torch.zeros(2, 16, 5, 6), [1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((GRAD.double(), X, PADDING, 4), "grad must be float32"),
        ((GRAD, X.bfloat16(), PADDING, 4), "x must be float32"),
        ((GRAD[0], X, PADDING, 4), "grad must be float32 of 4 dimensions"),
        ((GRAD, X[0], PADDING, 4), "x must be float32 of 4 dimensions"),
        ((GRAD[..., 1:], X, PADDING, 4), r"grad must be float32 of shape \(2, 32, 5, 6\)"),
        ((GRAD[1:], X, PADDING, 4), r"grad must be float32 of shape \(2, 32, 5, 6\)"),
        ((GRAD[:, 1:], X, PADDING, 4), "multiple of 16 channels; got 16 and 31"),
        ((GRAD, X[:, :8], PADDING, 4), "multiple of 16 channels; got 8 and 32"),
        ((GRAD, X, [1, -1], 4), "padding not negative"),
        ((GRAD, X[:, :, :2], [0, 1], 4), "x of .* is smaller than the kernel"),
        ((GRAD, X, PADDING, 3), "tile must be 2 or 4; got 3"),
        ((GRAD.to("meta"), X, PADDING, 4), "grad must be on x's device"),
        ((GRAD, X.to("meta"), PADDING, 4), "grad must be on x's device"),
        ((GRAD.to("meta"), X.to("meta"), PADDING, 3), "tile must be 2 or 4; got 3"),
    ],
    ids=range(14),
)
def test_bad_weight_input(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_winograd_weight(*given)


WEIGHT = torch.zeros(16, 48, 3, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((WEIGHT.half(), 4, False), "weight must be float32"),
        ((WEIGHT[0], 4, False), "weight must be float32 of shape"),
        ((WEIGHT[..., 1:], 4, False), r"weight must be float32 of shape \(C_out, C_in, 3, 3\)"),
        ((WEIGHT[1:], 4, False), "weight must have a multiple of 16 channels in dimension 0"),
        ((WEIGHT[:, 1:], 4, True), "weight must have a multiple of 16 channels in dimension 1"),
        ((WEIGHT[:0], 4, False), "weight must have a multiple of 16 channels"),
        ((WEIGHT, 3, True), "tile must be 2 or 4; got 3"),
        ((WEIGHT.to("meta")[..., 1:], 4, False), "weight must be float32 of shape"),
        ((WEIGHT.to("meta"), 3, False), "tile must be 2 or 4; got 3"),
    ],
    ids=range(9),
)
def test_bad_weight_to_pack(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_winograd_pack(*given)
