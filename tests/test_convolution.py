# SPDX-License-Identifier: BSD-3-Clause
"""convolution.conv2d: output and both gradients against float64, by every way it can take.

Its kernels start at sizes that would make a slow suite: `every_size` lowers that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import layouts
import oracle
import pytest
import torch
import torch.nn.functional as F
import winograd
from cases import word
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast as rf
from resnet_fast import convolution, dispatch, functional

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))

HALVES = (torch.bfloat16, torch.float16)
PLAIN, POINTWISE, COLUMNS = convolution.PLAIN, convolution.POINTWISE, convolution.COLUMNS
Pair = tuple[int, int]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own kernels from one multiplication on, and no processor that multiplies in 16 bits."""
    for dtype in convolution.FROM_MACS:
        monkeypatch.setitem(convolution.FROM_MACS, dtype, 1)
    monkeypatch.setattr(convolution, "_ways", {})
    monkeypatch.setattr(convolution, "has_instructions", lambda dtype: False)


@dataclass(frozen=True, kw_only=True)
class Conv:
    kernel: int | Pair = 3
    stride: int | Pair = 1
    padding: int | Pair = 1
    dilation: int | Pair = 1
    groups: int = 1
    channels: Pair = (32, 48)
    n: int = 2
    size: Pair = (14, 13)

    def __str__(self) -> str:
        return "-".join(word(v) for v in vars(self).values())

    def arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """(x channels-last, weight, grad)."""
        c_in, c_out = self.channels
        kernel = _pair(self.kernel)
        x = layouts.channels_last(torch.randn(self.n, c_in, *self.size) + 0.25).to(dtype)
        weight = (torch.randn(c_out, c_in // self.groups, *kernel) / 8).to(dtype)
        y = F.conv2d(x.float(), weight.float(), None, *self.arguments())
        return x, weight, torch.randn_like(y).to(dtype)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


# A convolution, and the kernels of its forward, its input's and its weight's gradient when x is
# channels-last: Winograd's tile, or PLAIN, POINTWISE, COLUMNS.
CONVS = [
    (Conv(size=(28, 28), n=8), (4, 4, 4)),
    (Conv(size=(7, 7), n=24, channels=(16, 80)), (2, 2, 2)),
    (Conv(size=(20, 22), n=16, padding=0), (4, 4, 4)),
    (Conv(size=(20, 22), n=16, padding=(2, 1)), (4, 4, 4)),
    (Conv(size=(18, 18), n=1, padding=0, channels=(64, 64)), (PLAIN, 2, PLAIN)),
    (Conv(padding=3), (0, 0, 0)),
    (Conv(channels=(31, 48), n=8), (0, 0, 0)),
    (Conv(channels=(32, 40), n=8), (0, 0, 0)),
    (Conv(stride=2), (PLAIN, PLAIN, COLUMNS)),
    (Conv(stride=(1, 2), padding=0, n=1, channels=(3, 5)), (PLAIN, PLAIN, COLUMNS)),
    (Conv(stride=(3, 1), padding=(2, 3), channels=(17, 16)), (PLAIN, PLAIN, COLUMNS)),
    (Conv(kernel=1, padding=0), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, channels=(3, 7), n=1), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, channels=(5, 1)), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=2), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=(1, 2), n=1), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=0, stride=14), (POINTWISE, POINTWISE, POINTWISE)),
    (Conv(kernel=1, padding=1), (0, 0, 0)),
    (Conv(kernel=5, padding=2), (0, 0, 0)),
    (Conv(kernel=7, padding=3, stride=2, channels=(3, 16)), (0, 0, 0)),
    (Conv(kernel=(1, 3), padding=(0, 1)), (0, 0, 0)),
    (Conv(groups=4), (0, 0, 0)),
    (Conv(kernel=1, padding=0, groups=2), (0, 0, 0)),
    (Conv(dilation=2, padding=2), (0, 0, 0)),
    (Conv(stride=2, dilation=(1, 2)), (0, 0, 0)),
]
WINOGRAD, STRIDED, ONE, SMALLER = (CONVS[i][0] for i in (0, 8, 11, 14))


def run(
    conv2d: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor, conv: Conv
) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = conv2d(x, weight, *conv.arguments())
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    return {"y": y.detach(), "dx": dx, "dw": dw}


def eager(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return F.conv2d(x, weight, None, *arguments)


def way_of(conv: Conv, x: Tensor, weight: Tensor) -> convolution.Way | None:
    return convolution._choose(x, weight, None, *conv.arguments())


def magnitudes(
    x: Tensor, weight: Tensor, grad: Tensor, conv: Conv, way: convolution.Way | None
) -> dict[str, Tensor]:
    """The sums of absolute terms of each result, by the kernel that makes it."""
    terms = run(eager, *(t.double().abs() for t in (x, weight, grad)), conv)
    if way is None:
        return terms
    padding = way.padding
    back = (2 - padding[0], 2 - padding[1])
    if way.forward in (2, 4):
        terms["y"] = winograd.convolve(x, weight, way.forward, padding, magnitude=True)
    if way.dgrad in (2, 4):
        turned = weight.transpose(0, 1).flip(2, 3)
        terms["dx"] = winograd.convolve(grad, turned, way.dgrad, back, magnitude=True)
    if way.wgrad in (2, 4):
        terms["dw"] = winograd.weight_gradient(grad, x, way.wgrad, padding, magnitude=True)
    return terms


def check(x: Tensor, weight: Tensor, grad: Tensor, conv: Conv) -> None:
    way = way_of(conv, x, weight)
    with dispatch.recording() as events:
        ours = run(convolution.conv2d, x, weight, grad, conv)
    assert [e.op for e in events] == (["conv2d"] if way else [])
    theirs = run(eager, x, weight, grad, conv)
    exact = run(eager, x.double(), weight.double(), grad.double(), conv)
    terms = magnitudes(x, weight, grad, conv, way)
    same = (x.float(), weight.float()) if way and way.in_float32 else (x, weight)
    assert ours["y"].stride() == eager(*same, *conv.arguments()).stride()
    for name, result in ours.items():
        channel = 0 if name == "dw" else 1
        oracle.check(
            name,
            result,
            theirs[name],
            exact[name],
            magnitude=terms[name],
            accumulated=torch.float32,
            channel=channel,
            context=conv,
        )


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
    monkeypatch.setattr(convolution, "COLUMN_BYTES", 1)
    conv = Conv(stride=2, n=5)
    check(*conv.make(), conv)


def test_what_pytorch_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, small convolutions, and 16 bits where the processor has them."""
    monkeypatch.setattr(convolution, "has_instructions", lambda dtype: True)
    for dtype in (torch.float64, *HALVES):
        x, weight, grad = WINOGRAD.make(dtype)
        assert way_of(WINOGRAD, x, weight) is None
        ours, theirs = (run(f, x, weight, grad, WINOGRAD) for f in (convolution.conv2d, eager))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    monkeypatch.undo()
    x, weight, _ = ONE.make()
    assert convolution.FROM_MACS[torch.float32] > x.size(0) * weight.numel() * 14 * 13
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


# ---- autograd ------------------------------------------------------------------------------------
class Seen(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_only_what_is_wanted() -> None:
    kernels = {"conv_winograd", "conv_winograd_weight"}
    for x_wants, weight_wants in ((True, True), (True, False), (False, True)):
        x, weight, grad = WINOGRAD.make()
        y = convolution.conv2d(
            x.requires_grad_(x_wants), weight.requires_grad_(weight_wants), *WINOGRAD.arguments()
        )
        with Seen() as seen:
            y.backward(grad)
        wanted = [x_wants, weight_wants]
        assert kernels & set(seen.names) == {
            name for name, want in zip(sorted(kernels), wanted, strict=True) if want
        }
        assert [x.grad is not None, weight.grad is not None] == wanted
    for conv in (ONE, STRIDED):
        x, weight, grad = conv.make()
        y = convolution.conv2d(x.requires_grad_(), weight, *conv.arguments())
        with Seen() as seen:
            y.backward(grad)
        assert not {"addmm_", "addmm"} & set(seen.names)
        assert seen.names.count("mm") <= 1
    x, weight, _ = WINOGRAD.make()
    with torch.no_grad():
        assert convolution.conv2d(x, weight.requires_grad_(), *WINOGRAD.arguments()).is_leaf
    with torch.inference_mode():
        assert convolution.conv2d(x, weight, *WINOGRAD.arguments()).is_inference()


@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_second_order(conv: Conv) -> None:
    x, weight, grad = conv.make()
    grad.requires_grad_()
    results = []
    for conv2d in (convolution.conv2d, eager):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = conv2d(*leaves, *conv.arguments())
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, [*leaves, grad])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_outputs_change_in_place(conv: Conv, dtype: torch.dtype) -> None:
    """As those of F.conv2d do: no views of something else."""
    x, weight, grad = conv.make(dtype)
    results = []
    for conv2d in (convolution.conv2d, eager):
        w = weight.clone().requires_grad_()
        y = conv2d(x.clone().requires_grad_(), w, *conv.arguments())
        assert not y._is_view()
        y += 1
        y.mul_(2)
        y.backward(grad)
        assert w.grad is not None
        w.grad += w  # with the graph on, as a penalty might
        results.append(w.grad)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_batched_gradients(conv: Conv) -> None:
    x, weight, grad = conv.make()
    grads = torch.stack([grad, 2 * grad])
    x.requires_grad_()
    weight.requires_grad_()
    y = convolution.conv2d(x, weight, *conv.arguments())
    ours = torch.autograd.grad(y, (x, weight), grads, is_grads_batched=True)
    y = eager(x, weight, *conv.arguments())
    theirs = torch.autograd.grad(y, (x, weight), grads, is_grads_batched=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_hooks_on_tensors() -> None:
    x, weight, grad = WINOGRAD.make()
    x.requires_grad_()
    weight.requires_grad_()
    right = run(convolution.conv2d, x, weight, 2 * grad, WINOGRAD)
    seen: list[str] = []
    y = convolution.conv2d(x, weight, *WINOGRAD.arguments())
    y.retain_grad()
    y.register_hook(lambda g: seen.append("y") or 2 * g)
    x.register_hook(lambda g: seen.append("x") or -g)
    weight.register_post_accumulate_grad_hook(lambda w: seen.append("weight"))
    y.backward(grad)
    assert sorted(seen) == ["weight", "x", "y"]
    assert y.grad is not None
    assert torch.equal(y.grad, 2 * grad)
    assert torch.equal(x.grad, -right["dx"])  # type: ignore[arg-type]
    assert torch.equal(weight.grad, right["dw"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved(dtype: torch.dtype) -> None:
    for conv in (WINOGRAD, STRIDED, ONE, SMALLER):
        x, weight, _ = conv.make(dtype)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, id):
            convolution.conv2d(x, weight.requires_grad_(), *conv.arguments())
        assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]


# ---- autocast ------------------------------------------------------------------------------------
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("conv", [WINOGRAD, STRIDED, ONE, SMALLER], ids=str)
def test_autocast(conv: Conv, dtype: torch.dtype, inside: bool) -> None:
    x, weight, grad = conv.make(dtype)

    def step(conv2d: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = x.float().requires_grad_(), weight.float().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = conv2d(*leaves, *conv.arguments())
            if inside:
                y.backward(grad)
        if not inside:
            y.backward(grad)
        assert torch.is_autocast_enabled("cpu") is False
        dx, dw = (t.grad for t in leaves)
        assert dx is not None
        assert dw is not None
        assert (y.dtype, dx.dtype, dw.dtype) == (dtype, torch.float32, torch.float32)
        # Rounded to dtype on the way: back in it nothing is lost, and the rule knows its floor.
        return {"y": y.detach(), "dx": dx.to(dtype), "dw": dw.to(dtype)}

    with dispatch.recording() as events:
        ours = step(convolution.conv2d)
    assert [e.op for e in events] == ["conv2d"]
    theirs = step(eager)
    exact = run(eager, x.double(), weight.double(), grad.double(), conv)
    terms = magnitudes(x, weight, grad, conv, way_of(conv, x, weight))
    for name, result in ours.items():
        oracle.check(
            name,
            result,
            theirs[name],
            exact[name],
            magnitude=terms[name],
            channel=int(name != "dw"),
        )


def test_a_way_under_autocast_is_none_without() -> None:
    """x in 16 bits and weight in 32: cast under autocast, PyTorch's error otherwise."""
    x, weight, _ = WINOGRAD.make()
    x = x.bfloat16()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="should be the same"):
            convolution.conv2d(x, weight, *WINOGRAD.arguments())
        with torch.autocast("cpu", torch.bfloat16), dispatch.recording() as events:
            y = convolution.conv2d(x, weight, *WINOGRAD.arguments())
        assert y.dtype is torch.bfloat16
        assert [e.op for e in events] == ["conv2d"]


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
    monkeypatch.setattr(convolution, "MAX_WAYS", 4)
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
            if len(convolution._ways) > 4:
                failed.append(f"{len(convolution._ways)} ways")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert convolution._ways


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
