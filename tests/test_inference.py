# SPDX-License-Identifier: BSD-3-Clause
"""optimize_for_inference on the CPU agrees with float64 eager: models, shapes and dtypes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import shims
import torch
from inference_cases import Net, agrees, eager, image, lively, seeded, table
from torch import nn

import resnet_fast as rf
from resnet_fast import _conv
from resnet_fast.inference import batches, cpu, direct

torchvision: Any = shims.torchvision_or_skip()
from torchvision import models as tv  # noqa: E402

X = image(2, 3, 64, 64)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return lively(seeded(lambda: tv.resnet18(num_classes=10))).eval()


@pytest.fixture(scope="module")
def fast18(resnet18: nn.Module) -> nn.Module:
    return rf.optimize_for_inference(resnet18, X)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision bottleneck": lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7),
    "resnext": lambda: tv.ResNet(
        tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, groups=8, width_per_group=4
    ),
    "dilated": lambda: tv.ResNet(
        tv.resnet.Bottleneck,
        [1, 1, 2, 2],
        num_classes=7,
        replace_stride_with_dilation=[False, True, True],
    ),
    "ours": lambda: rf.models.resnet18(num_classes=7),
    "ours, cifar": lambda: rf.models.resnet20(),
    "ours, preact": lambda: rf.models.preact_resnet18(),
    "accelerated": lambda: rf.accelerate(tv.resnet18(num_classes=7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees(name: str) -> None:
    model = lively(MODELS[name]())
    fast = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    steps = [step for step, how in table(fast).values() if how in cpu.FAST]
    assert any("bn" in step for step in steps)
    assert any("add" in step and "relu" in step for step in steps) or "preact" in name


def test_float64(resnet18: nn.Module) -> None:
    """Eager in float64 is itself the oracle here: only rounding may differ."""
    fast = rf.optimize_for_inference(resnet18, X, dtype=torch.float64)
    ours, right = fast(X), eager(resnet18, X, torch.float64)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(resnet18: nn.Module, dtype: torch.dtype) -> None:
    fast = rf.optimize_for_inference(resnet18, X, dtype=dtype)
    agrees(fast, resnet18, X, dtype)
    assert fast(X.to(dtype)).dtype is dtype


def test_bfloat16_instructions(resnet18: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has them: oneDNN's bfloat16 convs, here in emulation."""
    monkeypatch.setattr(cpu, "has_instructions", lambda dtype: True)
    fast = rf.optimize_for_inference(resnet18, X, dtype=torch.bfloat16)
    assert fast.compute is torch.bfloat16
    assert table(fast)["layer1.0.conv2"][1] == cpu.PACKED
    agrees(fast, resnet18, X, torch.bfloat16)


def test_bfloat16_without_instructions_is_said(
    resnet18: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_instructions", lambda dtype: False)
    fast = rf.optimize_for_inference(resnet18, X, dtype=torch.bfloat16)
    assert "no bfloat16 instructions" in str(rf.explain(fast))


@pytest.mark.parametrize("size", [(33, 33), (64, 47), (97, 65), (224, 224)])
def test_picture_sizes(resnet18: nn.Module, fast18: nn.Module, size: tuple[int, int]) -> None:
    agrees(fast18, resnet18, image(1, 3, *size))


@pytest.mark.parametrize("channels", [1, 4])
def test_channels(channels: int) -> None:
    model = lively(tv.resnet18(num_classes=5))
    model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3)
    x = image(3, channels, 40, 40)
    agrees(rf.optimize_for_inference(model, x), model, x)


def test_layouts_of_the_input(resnet18: nn.Module, fast18: nn.Module) -> None:
    for x in (
        X.to(memory_format=torch.channels_last),
        X.transpose(2, 3),
        X[:, :, ::2],
        X[:, :, 1:],
    ):
        agrees(fast18, resnet18, x)


def test_same_from_call_to_call(fast18: nn.Module) -> None:
    first = fast18(X)
    kept = first.clone()
    fast18(image(2, 3, 64, 64, seed=9))
    assert torch.equal(first, kept), "a later call wrote into an earlier result"
    assert torch.equal(fast18(X), kept)


def test_input_is_not_written(fast18: nn.Module) -> None:
    x = X.to(memory_format=torch.channels_last)
    fast18(x)
    assert torch.equal(x, X)


def conv(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1)


def cases(c: int) -> dict[str, tuple[Net, bool]]:
    """(network with convs of c channels, whether it can be traced)"""
    return {
        "residual read again later": (
            Net(
                lambda m, x: (lambda y: torch.relu(m.b(y) + y) + y)(torch.relu(m.a(x))),
                a=conv(3, c),
                b=conv(c, c),
            ),
            True,
        ),
        "residual is an output": (
            Net(lambda m, x: (lambda y: [y, m.b(y) + y])(m.a(x)), a=conv(3, c), b=conv(c, c)),
            True,
        ),
        "residual is the input": (Net(lambda m, x: torch.relu(m.a(x) + x), a=conv(3, 3)), True),
        "residual has a view": (
            Net(
                lambda m, x: (lambda y: (lambda v: m.b(y) + y + v)(y.view(y.shape)))(m.a(x)),
                a=conv(3, c),
                b=conv(c, c),
            ),
            True,
        ),
        "residual is broadcast": (
            Net(
                lambda m, x: m.b(x) + m.a(x).mean((2, 3), keepdim=True),
                a=conv(3, c),
                b=conv(3, c),
            ),
            True,
        ),
        "two users of a conv": (
            Net(lambda m, x: (lambda y: m.n(y) + y)(m.a(x)), a=conv(3, c), n=nn.BatchNorm2d(c)),
            True,
        ),
        "conv added to itself": (Net(lambda m, x: (lambda y: y + y)(m.a(x)), a=conv(3, c)), True),
        "relu before add": (
            Net(lambda m, x: torch.relu(m.a(x)) + torch.relu(m.b(x)), a=conv(3, c), b=conv(3, c)),
            True,
        ),
        "alpha": (
            Net(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), a=conv(3, c), b=conv(3, c)),
            True,
        ),
        "norm after the sum": (
            Net(lambda m, x: m.n(m.a(x) + m.b(x)), a=conv(3, c), b=conv(3, c), n=nn.BatchNorm2d(c)),
            True,
        ),
        "two norms": (
            Net(
                lambda m, x: m.m(m.n(m.a(x))),
                a=conv(3, c),
                n=nn.BatchNorm2d(c),
                m=nn.BatchNorm2d(c),
            ),
            True,
        ),
        "norm shared by two convs": (
            Net(
                lambda m, x: m.n(m.a(x)) + m.n(m.b(x)),
                a=conv(3, c),
                b=conv(3, c),
                n=nn.BatchNorm2d(c),
            ),
            True,
        ),
        "batch statistics": (
            Net(
                lambda m, x: m.n(m.a(x)),
                a=conv(3, c),
                n=nn.BatchNorm2d(c, track_running_stats=False),
            ),
            True,
        ),
        "no affine": (
            Net(lambda m, x: m.n(m.a(x)), a=conv(3, c), n=nn.BatchNorm2d(c, affine=False)),
            True,
        ),
        "padding by name": (
            Net(
                lambda m, x: m.n(m.a(x)), a=nn.Conv2d(3, c, 3, padding="same"), n=nn.BatchNorm2d(c)
            ),
            True,
        ),
        "in place on a view": (
            Net(lambda m, x: (lambda y: y + y[:, :2].relu_().sum())(m.a(x)), a=conv(3, c)),
            True,
        ),
        "in place on the input": (Net(lambda m, x: m.a(x.clone().mul_(2)), a=conv(3, c)), True),
        "mean over the batch": (
            Net(lambda m, x: m.a(x) - m.a(x).mean(0, keepdim=True), a=conv(3, c)),
            True,
        ),
        "size in the values": (
            Net(lambda m, x: m.a(x) * x.shape[0] / x.shape[2], a=conv(3, c)),
            True,
        ),
        "conv without padding, dropout": (
            Net(lambda m, x: m.d(m.a(x)).flatten(1), a=nn.Conv2d(3, c, 3), d=nn.Dropout(0.5)),
            True,
        ),
        "functional weight": (
            Net(lambda m, x: nn.functional.conv2d(x, m.a.weight * 2, m.a.bias), a=conv(3, c)),
            True,
        ),
        "weight from the input": (
            Net(lambda m, x: nn.functional.conv2d(x, m.a.weight * x.mean()), a=conv(3, c)),
            True,
        ),
        "dictionary": (Net(lambda m, x: {"out": m.a(x), "in": x}, a=conv(3, c)), True),
        "branch on a value": (
            Net(lambda m, x: m.a(x) if x.sum() > 0 else -m.a(x), a=conv(3, c)),
            False,
        ),
    }


# By oneDNN, and by our own kernels.
CASES = {c: seeded(lambda c=c: cases(c)) for c in (8, 16)}


@pytest.mark.parametrize("name", CASES[8])
@pytest.mark.parametrize("limit", [batches.PIECE_BYTES, 1])
@pytest.mark.parametrize("channels", CASES)
def test_cases(name: str, limit: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE_BYTES", limit)
    net, traced = CASES[channels][name]
    lively(net)
    fast = rf.optimize_for_inference(net, X)
    for x in (X, image(5, 3, 16, 20, seed=4), image(5, 3, 16, 20, seed=5).mul(-1)):
        agrees(fast, net, x)
    assert (fast.trace is not None) == traced


def test_threads(resnet18: nn.Module, fast18: nn.Module) -> None:
    """Several threads in one module, each with its own sizes, get what they get alone."""
    inputs = [image(n, 3, s, s, seed=n) for n, s in ((1, 64), (2, 48), (3, 40), (1, 33))]
    alone = [fast18(x) for x in inputs]
    fast = rf.optimize_for_inference(resnet18, X)
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(6):
            which = (number + turn) % len(inputs)
            y = fast(inputs[which])
            if not torch.allclose(y, alone[which], rtol=1e-4, atol=1e-4):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_private_operators(resnet18: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not_packed", lambda dtype: "this PyTorch has no such operator")
    fast = rf.optimize_for_inference(resnet18, X)
    agrees(fast, resnet18, X)
    convs = {how for step, how in table(fast).values() if step.startswith("conv")}
    assert convs == {cpu.POOLED_STEM, cpu.WINOGRAD, cpu.DIRECT}, "ours, which need none of them"
    monkeypatch.setattr(direct, "suits", lambda spec, weight: False)
    fast = rf.optimize_for_inference(resnet18, X)
    agrees(fast, resnet18, X)
    assert "no such operator" in str(rf.explain(fast))
    assert {row.implementation for row in rf.explain(fast).rows} == {cpu.PLAIN, "PyTorch"}


def test_tiles_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps, small maps and single pixels take another way each, and all agree."""
    chosen = {size: _conv.choose_tile(size, [1, 1]) for size in CONV_SIZES}
    assert chosen == CONV_SIZES
    asked = []
    choose = _conv.choose_tile
    monkeypatch.setattr(
        _conv, "choose_tile", lambda *args: asked.append(choose(*args)) or asked[-1]
    )
    model = lively(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()))
    fast = rf.optimize_for_inference(model, image(1, 64, 8, 8))
    for size in (56, 6, 1):
        agrees(fast, model, image(1, 64, size, size))
    assert asked == [4, 2, 0]


CONV_SIZES = {
    (1, 64, 56, 56): 4,
    (16, 512, 7, 7): 4,
    (1, 256, 14, 14): 2,
    (1, 512, 7, 7): 2,
    (1, 64, 6, 6): 2,
    (1, 512, 2, 2): 0,
    (1, 64, 1, 1): 0,
}


def test_the_stem_is_pooled_line_by_line(resnet18: nn.Module, fast18: nn.Module) -> None:
    """And not where the pooling is another one, or somebody else reads the stem."""
    assert table(fast18)["conv1"] == ("conv + bn + relu + max-pool", cpu.POOLED_STEM)
    model = copy.deepcopy(resnet18)
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    fast = rf.optimize_for_inference(model, X)
    assert cpu.POOLED_STEM not in {how for _, how in table(fast).values()}
    agrees(fast, model, X)
    net = Net(lambda m, x: (m.p(y := m.a(x)), y), a=conv(3, 16), p=nn.MaxPool2d(3, 2, 1))
    fast = rf.optimize_for_inference(net, image(2, 3, 16, 16))
    agrees(fast, net, image(2, 3, 16, 16))


def test_sizes_that_the_graph_depends_on() -> None:
    net = Net(
        lambda m, x: m.a(x).flatten(1) @ m.w.weight, a=conv(3, 8), w=nn.Linear(4, 8 * 16 * 16)
    )
    fast = rf.optimize_for_inference(net, image(2, 3, 16, 16))
    agrees(fast, net, image(3, 3, 16, 16))
    with pytest.raises((ValueError, RuntimeError)):
        fast(image(2, 3, 17, 16))


def test_the_model_is_untouched() -> None:
    model = lively(tv.resnet18(num_classes=4)).train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    versions = [p._version for p in [*model.parameters(), *model.buffers()]]
    fast = rf.optimize_for_inference(model, X)
    fast(X)
    assert modes == [m.training for m in model.modules()]
    assert versions == [p._version for p in [*model.parameters(), *model.buffers()]]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["fcn", pytest.param("deeplab", marks=pytest.mark.slow), "fpn"])
def test_models_with_a_resnet_inside(name: str) -> None:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if name == "fpn":
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        model = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    elif name == "fcn":
        model = tv.segmentation.fcn_resnet50(num_classes=3, **options)
    else:
        model = tv.segmentation.deeplabv3_resnet50(num_classes=3, **options)
    lively(model)
    # At 64 pixels a map of the pyramid has a size of 1, which torch.export takes as a constant.
    fast = rf.optimize_for_inference(model, image(1, 3, 128, 128))
    assert fast.trace is not None, str(rf.explain(fast))
    convs = [row for row in rf.explain(fast).rows if "conv" in row.step]
    assert all(row.implementation in cpu.FAST for row in convs)
    agrees(fast, model, image(2, 3, 129, 160, seed=8))


def test_top1_of_photographs() -> None:
    """The demo's photographs get the same class as in eager."""
    pytest.importorskip("skimage")
    from resnet_fast.demo import images

    model = lively(tv.resnet50(num_classes=100))
    x = torch.stack([images.preprocess(photo, 224) for _, photo in images.shipped_photos()])
    fast = rf.optimize_for_inference(model, x)
    ours, right = fast(x), eager(model, x, torch.float32)
    assert torch.equal(ours.argmax(1), right.argmax(1))


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (("resnet50", X), {}, TypeError, "model"),
    ((nn.Conv2d(3, 4, 3), [1, 2]), {}, TypeError, "example_input"),
    ((nn.Conv2d(3, 4, 3), X.long()), {}, TypeError, "example_input"),
    ((nn.Conv2d(3, 4, 3), X), {"dtype": torch.int32}, ValueError, "dtype"),
    ((nn.Conv2d(3, 4, 3), X), {"dtype": "float"}, ValueError, "dtype"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[3]}")
def test_bad_arguments(case: Any) -> None:
    args, kwargs, error, named = case
    with pytest.raises(error, match=named):
        rf.optimize_for_inference(*args, **kwargs)


def test_bad_inputs(fast18: Any) -> None:
    with pytest.raises(TypeError, match="float"):
        fast18(X.long())
    with pytest.raises(ValueError, match="dimension 1 must be 3"):
        fast18(X[:, :2])
    with pytest.raises(ValueError, match="dimensions"):
        fast18(X[0])
    with pytest.raises(TypeError, match="inputs"):
        fast18(X, X)
    with pytest.raises(TypeError, match="tensors"):
        fast18("picture")
    with pytest.raises(TypeError, match="optimized already"):
        rf.optimize_for_inference(fast18, X)


def test_what_it_is_not(fast18: Any) -> None:
    assert fast18.eval() is fast18
    with pytest.raises(ValueError, match="no training mode"):
        fast18.train()
    with pytest.raises(TypeError, match="dtype"):
        fast18.half()
    with pytest.raises(TypeError, match="optimize again"):
        copy.deepcopy(fast18)
