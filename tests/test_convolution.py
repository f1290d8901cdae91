# SPDX-License-Identifier: BSD-3-Clause
"""convolution.conv2d: output and both gradients against float64, by every way it can take.

Its errors, what transforms calls, and its table too; test_convolution_autograd.py has the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import layouts
import pytest
import torch
from convolutions import (
    CONVS,
    HALVES,
    ONE,
    SMALLER,
    STRIDED,
    WINOGRAD,
    Conv,
    Pair,
    check,
    eager,
    run,
    way_of,
)
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv_kernels, _conv_ways, convolution, dispatch, functional

pytestmark = [
    pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable())),
    pytest.mark.usefixtures("every_convolution"),
]


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("conv", "expected"), CONVS, ids=str)
def test_float32(conv: Conv, expected: tuple[int, int, int]) -> None:
    x, weight, grad = conv.make()
    way = way_of(conv, x, weight)
    assert (way[4:7] if way else (0, 0, 0)) == expected
    check(x, weight, grad, conv)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("conv", "expected"), CONVS, ids=str)
def test_halves(conv: Conv, expected: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, grad = conv.make(dtype)
    way = way_of(conv, x, weight)
    assert way is not None
    assert way.in_float32
    assert way[4:7] == expected
    check(x, weight, grad, conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_layouts(conv: Conv, dtype: torch.dtype) -> None:
    """x channels-last or not, weight in both orders, grad in any."""
    x, weight, grad = conv.make(dtype)
    weights = (weight, layouts.channels_last(weight))
    for w in weights:
        for layout in ("contiguous", "sliced", "expanded"):
            check(layouts.lay(x, layout), w, grad, conv)
    for layout in layouts.LAYOUTS:
        check(x, weights[1], layouts.lay(grad, layout), conv)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("padding", [0, 1, 2, (1, 0)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sweep(kernel: int, padding: int | Pair, n: int) -> None:
    for stride in (1, 2, (1, 2)):
        for channels in ((16, 16), (48, 80), (7, 16)):
            conv = Conv(
                kernel=kernel, stride=stride, padding=padding, channels=channels, n=n, size=(17, 12)
            )
            for dtype in (torch.float32, *HALVES):
                check(*conv.make(dtype), conv)


def test_columns_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More windows than are gathered at once."""
    monkeypatch.setattr(_conv_kernels, "COLUMN_BYTES", 1)
    conv = Conv(stride=2, n=5)
    check(*conv.make(), conv)


def test_what_pytorch_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, small convolutions, and 16 bits where the processor has them."""
    monkeypatch.setattr(_conv_ways, "has_instructions", lambda dtype: True)
    for dtype in (torch.float64, *HALVES):
        x, weight, grad = WINOGRAD.make(dtype)
        assert way_of(WINOGRAD, x, weight) is None
        ours, theirs = (run(f, x, weight, grad, WINOGRAD) for f in (convolution.conv2d, eager))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    monkeypatch.undo()
    x, weight, _ = ONE.make()
    assert _conv_ways.FROM_MACS[torch.float32] > x.size(0) * weight.numel() * 14 * 13
    assert way_of(ONE, x, weight) is None


@pytest.fixture
def products_in_bfloat16() -> Iterator[None]:
    """As torch.set_float32_matmul_precision("medium") has them."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    yield
    settings.fp32_precision = before


@pytest.mark.parametrize("conv", [STRIDED, ONE, SMALLER], ids=str)
def test_products_in_fewer_bits(conv: Conv, products_in_bfloat16: None) -> None:
    """That is no word about convolutions: no product stands for one then."""
    x, weight, grad = conv.make()
    assert way_of(conv, x, weight) is not None
    with dispatch.recording() as events:
        ours = run(convolution.conv2d, x, weight, grad, conv)
    assert not events
    theirs = run(eager, x, weight, grad, conv)
    for name, result in ours.items():
        assert torch.equal(result, theirs[name])


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [
        {"channels": (48, 48)},
        {"groups": 3},
        {"groups": 0},
        {"groups": -1},
        {"stride": 0},
        {"stride": (1, 0)},
        {"stride": -1},
        {"padding": -1},
        {"padding": (0, -2)},
        {"dilation": 0},
        {"stride": 1.5},
        {"stride": (1, 2, 3)},
        {"padding": "sane"},
        {"size": (1, 13), "padding": 0},
        {"size": (1, 1), "padding": 0, "stride": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_errors_are_pytorchs(kernel: int, dtype: torch.dtype, given: dict[str, Any]) -> None:
    c_in, c_out = given.get("channels", (32, 48))
    x = layouts.channels_last(torch.randn(2, 32, *given.get("size", (14, 13)))).to(dtype)
    weight = torch.randn(c_out, c_in, kernel, kernel).to(dtype)
    names = ("stride", "padding", "dilation", "groups")
    arguments = [given.get(n, d) for n, d in zip(names, (1, 1, 1, 1), strict=True)]
    if kernel == 1 and "padding" not in given:
        arguments[1] = 0

    def outcome(conv2d: Callable[..., Tensor]) -> tuple[str, str]:
        try:
            y = conv2d(x, weight, *arguments)
        except Exception as error:
            return type(error).__name__, str(error)
        return "", str(y.shape)

    assert outcome(convolution.conv2d) == outcome(eager)


def test_other_shapes_are_pytorchs() -> None:
    x, weight, _ = WINOGRAD.make()
    y = convolution.conv2d(x[0], weight, *WINOGRAD.arguments())
    assert torch.equal(y, eager(x[0], weight, *WINOGRAD.arguments()))
    y = convolution.conv2d(x[:0], weight, *WINOGRAD.arguments())
    assert y.shape == (0, 48, 28, 28)
    for padding in ("same", [1, 1], (1,)):
        assert convolution.conv2d(x, weight, 1, padding, 1, 1).shape == (8, 48, 28, 28)
    with pytest.raises(RuntimeError) as ours:
        convolution.conv2d(x, weight[0], *WINOGRAD.arguments())
    with pytest.raises(RuntimeError) as theirs:
        eager(x, weight[0], *WINOGRAD.arguments())
    assert str(ours.value) == str(theirs.value)


# ---- what transforms calls -----------------------------------------------------------------------
class Module(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return convolution.conv2d(x, weight, *WINOGRAD.arguments())


def same_without_kernels(call: Callable[[Callable[..., Any]], Any]) -> None:
    """call(conv2d) gives what it gives with PyTorch's, and no kernel of ours ran."""
    with dispatch.recording() as events:
        ours = call(lambda x, w: convolution.conv2d(x, w, *WINOGRAD.arguments()))
    assert not events
    theirs = call(lambda x, w: eager(x, w, *WINOGRAD.arguments()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_reference_and_functorch() -> None:
    x, weight, _ = WINOGRAD.make()
    with rf.use_backend("reference"):
        same_without_kernels(lambda conv2d: conv2d(x, weight))
    same_without_kernels(
        lambda conv2d: torch.func.grad(lambda w: conv2d(x, w).square().sum())(weight)
    )
    many = torch.stack([x, -x])
    same_without_kernels(lambda conv2d: torch.vmap(conv2d, (0, None))(many, weight))
    same_without_kernels(
        lambda conv2d: torch.func.jvp(lambda w: conv2d(x, w), (weight,), (weight,))
    )

    def forward_mode(conv2d: Callable[..., Tensor]) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = conv2d(torch.autograd.forward_ad.make_dual(x, x), weight)
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    same_without_kernels(forward_mode)


def test_compilers_see_the_standard_operator() -> None:
    x, weight, _ = WINOGRAD.make()
    right = eager(x, weight, *WINOGRAD.arguments())
    program = torch.export.export(Module(), (x, weight))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if "resnet_fast" in t] == []
    assert any("conv2d" in t for t in targets)
    traced = torch.jit.trace(Module(), (x, weight))
    assert "resnet_fast::" not in str(traced.graph)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    for y in (program.module()(x, weight), traced(x, weight), compiled(x, weight)):
        torch.testing.assert_close(y, right)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = convolution.conv2d(
            mode.from_tensor(x), mode.from_tensor(weight), *WINOGRAD.arguments()
        )
    assert fake.shape == right.shape
    meta = convolution.conv2d(x.to("meta"), weight.to("meta"), *WINOGRAD.arguments())
    assert meta.device.type == "meta"


# ---- the table of ways ---------------------------------------------------------------------------
def test_table_is_bounded_and_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv_ways, "MAX_WAYS", 4)
    weight = torch.randn(8, 4, 1, 1)
    failed: list[str] = []

    def work(seed: int) -> None:
        for i in range(60):
            x = torch.ones(1, 4, 2 + (i * seed) % 11, 3).contiguous(
                memory_format=torch.channels_last
            )
            y = convolution.conv2d(x, weight, 1, 0, 1, 1)
            if not torch.allclose(y, weight.sum(1).view(1, 8, 1, 1).expand_as(y), atol=1e-5):
                failed.append(str(x.shape))
            if len(_conv_ways._ways) > 4:
                failed.append(f"{len(_conv_ways._ways)} ways")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert _conv_ways._ways


def test_conv_bn_act() -> None:
    x, weight, _ = WINOGRAD.make()
    scale, bias = torch.rand(48), torch.rand(48)
    arguments = {"training": True, "residual": None}
    with dispatch.recording() as events:
        y = functional.conv_bn_act(x, weight, scale, bias, None, None, padding=1, **arguments)
    assert [e.op for e in events] == ["conv2d", "batch_norm_act"]
    z = convolution.conv2d(x, weight, *WINOGRAD.arguments())
    right = functional.batch_norm_act(z, scale, bias, None, None, **arguments)
    assert torch.equal(y, right)
