# SPDX-License-Identifier: BSD-3-Clause
"""blocks.convolve: what is not a plain nn.Conv2d is called as a module; whole models' gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import shims
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast as rf
from resnet_fast import blocks, convolution, dispatch

pytestmark = [
    pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable())),
    pytest.mark.usefixtures("every_convolution"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the older weight_norm
]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that blocks.convolve made of convolution.conv2d."""
    calls: list[Any] = []
    original = convolution.conv2d

    def conv2d(*args: Any) -> Tensor:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(convolution, "conv2d", conv2d)
    return calls


def rows(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def conv(**how: Any) -> nn.Conv2d:
    return nn.Conv2d(16, 32, 3, **{"padding": 1, "bias": False, **how})


# ---- called as a module --------------------------------------------------------------------------
class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def hooked(name: str, hook: Callable[..., Any], **how: Any) -> nn.Module:
    m = conv()
    getattr(m, name)(hook, **how)
    return m


def with_attribute(name: str, value: Any) -> nn.Module:
    m = conv()
    m.__dict__[name] = value
    return m


def parametrized() -> nn.Module:
    m = conv()
    nn.utils.parametrize.register_parametrization(m, "weight", Halved())
    return m


def own_conv_forward() -> nn.Module:
    """As the patch for seamless tiling does it, on the object."""
    m = conv()
    m._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1,) * 4, "circular"), weight)
    return m


def by_itself() -> nn.Module:
    m = conv()
    m.compile(backend="eager")
    return m


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "forward hook": lambda: hooked("register_forward_hook", lambda m, x, y: 3 * y),
    "hook with kwargs": lambda: hooked(
        "register_forward_hook", lambda m, x, kw, y: 3 * y, with_kwargs=True
    ),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook", lambda m, x: (x[0] + 1,)),
    "backward hook": lambda: hooked("register_full_backward_hook", lambda m, dx, dy: None),
    "backward pre-hook": lambda: hooked("register_full_backward_pre_hook", lambda m, dy: None),
    "subclass": lambda: Doubled(16, 32, 3, bias=False),
    "bias": lambda: conv(bias=True),
    "reflect": lambda: conv(padding_mode="reflect"),
    "circular": lambda: conv(padding_mode="circular"),
    "parametrized": parametrized,
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()).eval(),
    "older weight_norm": lambda: nn.utils.weight_norm(conv()),
    "pruned": lambda: prune.random_unstructured(conv(), "weight", 0.5),
    "forward of its own": lambda: with_attribute("forward", lambda x: x[:, :1]),
    "_conv_forward of its own": own_conv_forward,
    "weight set on the object": lambda: with_attribute("weight", torch.ones(32, 16, 3, 3)),
    "compiled by itself": by_itself,
    "transposed": lambda: nn.ConvTranspose2d(16, 32, 3, bias=False),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("name", OTHERS)
def test_called_as_a_module(name: str, passed: list[Any]) -> None:
    m, x = OTHERS[name](), rows(2, 16, 9, 9)
    y = blocks.convolve(m, x)
    assert not passed
    assert torch.equal(y, m(x))
    blocks.convolve(conv(), x)
    assert len(passed) == 1  # a plain one is not


PATCHES = {
    "F.conv2d": (F, "conv2d"),
    "forward": (nn.Conv2d, "forward"),
    "_conv_forward": (nn.Conv2d, "_conv_forward"),
    "__call__": (nn.Module, "__call__"),
    "_call_impl": (nn.Module, "_call_impl"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patched(name: str, passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of somebody's own in the place of PyTorch's is called."""
    owner, attribute = PATCHES[name]
    original, calls = getattr(owner, attribute), []

    def patch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    m, x = conv(), rows(2, 16, 9, 9)
    monkeypatch.setattr(owner, attribute, patch)
    blocks.convolve_alone(m, x)
    assert calls
    assert not passed


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "resnet_fast" not in str(func)
        return func(*args, **(kwargs or {}))


class Function(torch.overrides.TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is F.conv2d
        return func(*args, **(kwargs or {}))


def test_watched(passed: list[Any]) -> None:
    m, x = conv(), rows(2, 16, 9, 9)
    calls: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: calls.append(1))
    blocks.convolve_alone(m, x)
    handle.remove()
    assert calls
    with Mode():
        blocks.convolve_alone(m, x)
    with Function() as mode:
        blocks.convolve_alone(m, x)
    assert mode.seen == 1
    assert not passed


class Logged(Tensor):
    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            args[1].seen.append("conv2d")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weight_of_a_subclass() -> None:
    """It sees the standard function with itself as the weight, as in the module."""
    m, x = conv(), rows(2, 16, 9, 9)
    weight = m.weight.detach().as_subclass(Logged)
    weight.seen = []
    del m.weight
    m._parameters["weight"] = weight  # type: ignore[assignment]
    blocks.convolve(m, x)
    assert weight.seen == ["conv2d"]


def test_functional_call_takes_the_given_weight(passed: list[Any]) -> None:
    """Weights that are swapped in for a call, as torch.func.functional_call does it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            return blocks.convolve_alone(self.conv, x)

    block, x = Block(), rows(2, 16, 9, 9)
    y = torch.func.functional_call(block, {"conv.weight": torch.zeros(32, 16, 3, 3)}, (x,))
    assert len(passed) == 1
    assert not y.any()


# ---- whole models --------------------------------------------------------------------------------
class WeightGradients(TorchDispatchMode):
    """How many gradients of a convolution's weight were computed, and how many by Winograd's."""

    def __init__(self) -> None:
        super().__init__()
        self.winograd = self.plain = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.winograd += name == "resnet_fast::conv_winograd_weight"
        # Columns are summed up by addmm_; a product of 1x1 is one of `mm`, as fc's are.
        self.plain += name == "aten::addmm_"
        self.plain += name == "aten::convolution_backward" and args[-1][1]
        return func(*args, **(kwargs or {}))


def resnet18() -> Any:
    torch.manual_seed(0)
    model = shims.torchvision_or_skip().models.resnet18(num_classes=10)
    return model.to(memory_format=torch.channels_last)


def gradients(model: Any, x: Tensor, target: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_frozen_backbone() -> None:
    """Weights that want no gradient cost none."""
    model = rf.accelerate(resnet18())
    x = rows(8, 3, 64, 64)
    for wanting in ("fc", "layer1.1.conv2", ""):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(wanting))
        loss = model(x).square().sum()
        with WeightGradients() as seen:
            loss.backward()
        if wanting:
            assert (seen.winograd, seen.plain) == (wanting != "fc", 0)
        else:
            assert seen.winograd == 7  # layer1's and layer2's; the other maps are too small
            assert seen.plain == 10


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18"])
def test_own_models_train(name: str) -> None:
    """Pre-activation blocks add to a convolution's output in place."""
    torch.manual_seed(0)
    model = rf.models.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    x = rows(16, 3, 32, 32)
    with rf.use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model)(x)
    with dispatch.recording() as events:
        y = model(x)
    assert [e.op for e in events].count("conv2d") >= 10
    oracle.check("y", y, eager, exact)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_resnet18(dtype: torch.dtype | None) -> None:
    """Every parameter's gradient is as near to float64's as eager's is.

    Judged over three batches: where ReLU's kink falls is chance in either, and so is the error of
    a channel's sum in a single batch.
    """
    model = resnet18()
    models = [copy.deepcopy(model).double(), model, rf.accelerate(copy.deepcopy(model))]
    error = {name: [0.0, 0.0, 0.0] for name, _ in model.named_parameters()}
    for seed in range(3):
        torch.manual_seed(seed)
        x, target = rows(8, 3, 64, 64), torch.randint(10, (8,))
        exact = gradients(models[0], x.double(), target, None)
        eager, ours = (gradients(m, x, target, dtype) for m in models[1:])
        assert ours.keys() == error.keys()
        for name, right in exact.items():
            found = (ours[name] - right, eager[name] - right, right)
            peaks = zip(error[name], found, strict=True)
            error[name] = [max(peak, float(t.abs().max())) for peak, t in peaks]
    eps = torch.finfo(dtype or torch.float32).eps
    bad = {name: e for name, e in error.items() if e[0] > 2 * e[1] + eps * e[2]}
    assert not bad
