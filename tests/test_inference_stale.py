# SPDX-License-Identifier: BSD-3-Clause
"""Weights that change after optimize_for_inference (USES U16), and refresh."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference_cases import agrees, image, lively
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import resnet_fast as rf
from resnet_fast.inference.watch import Watch

X = image(2, 3, 32, 32)


def small() -> Any:
    return lively(rf.models.resnet20())


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)


def _through_data(model: Any) -> None:
    model.conv1.weight.data = model.conv1.weight.data * 2


def _in_place_through_data(model: Any) -> None:
    model.layer2[1].conv2.weight.data.mul_(1.01)


def _load(model: Any) -> None:
    model.load_state_dict(lively(rf.models.resnet20(), seed=8).state_dict())


def _replace_parameter(model: Any) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * 0.5)


def _statistics(model: Any) -> None:
    model.train()
    with torch.no_grad():
        model(X)


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(X).sum().backward()
    optimizer.step()


def _ema(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(
            [*model.parameters()], [torch.ones_like(p) for p in model.parameters()], 0.1
        )


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": _in_place,
    "through .data": _through_data,
    "in place through .data": _in_place_through_data,
    "load_state_dict": _load,
    "another parameter": _replace_parameter,
    "running statistics": _statistics,
    "optimizer step": _step,
    "moving average": _ema,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_never_stale(name: str) -> None:
    model = small()
    fast = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match=r"refresh\(model\)"):
        fast(X)
    fast.refresh(model)
    agrees(fast, model, X)


class Mixed(nn.Module):
    """Parameters of several element sizes, one a view that starts in the middle of a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.two_bytes = nn.Parameter(torch.arange(7).to(torch.bfloat16))
        self.four_bytes = nn.Parameter(torch.arange(9.0)[1:].view(2, 2, 2))
        self.eight_bytes = nn.Parameter(torch.full((3,), float("nan"), dtype=torch.float64))
        self.strided = nn.Parameter(torch.arange(12.0).view(3, 4)[:, 1:3])
        self.empty = nn.Parameter(torch.zeros(0))


@pytest.mark.parametrize("name", ["two_bytes", "four_bytes", "eight_bytes", "strided"])
def test_values_written_through_data_are_noticed_in_every_dtype(name: str) -> None:
    model = Mixed()
    watch = Watch(model)
    assert watch.changed() is None
    parameter = getattr(model, name)
    before = parameter._version
    parameter.data.zero_().add_(40)
    assert parameter._version == before, "PyTorch counts this: the samples are not what noticed"
    assert watch.changed() == name


def test_another_order_of_the_same_parameters_is_no_change() -> None:
    model = nn.Linear(3, 2)
    watch = Watch(model)
    weight = model.weight
    del model.weight
    model.weight = weight
    assert watch.changed() is None
    weight.data = weight.data.clone()
    assert watch.changed() == "weight"


def test_a_buffer_that_is_none_and_one_that_goes() -> None:
    model = nn.BatchNorm2d(3, affine=False)
    model.register_buffer("extra", torch.ones(1))
    owner = nn.Sequential(model)
    watch = Watch(owner)
    assert watch.changed() is None
    model.extra = None
    assert watch.changed() == "0.extra"


def test_a_module_put_in_another_ones_place() -> None:
    model = small()
    fast = rf.optimize_for_inference(model, X)
    model.conv1 = nn.Sequential(model.conv1, nn.Identity())
    with pytest.raises(RuntimeError, match="conv1"):
        fast(X)
    before = fast.explain().rows
    with pytest.raises(ValueError, match="optimize_for_inference again"):
        fast.refresh(model)
    assert fast.explain().rows == before


def test_pruning_and_parametrizations() -> None:
    """Both make the weight from other tensors at each call: the graph's constants do so once."""
    model = small()
    parametrizations.weight_norm(model.conv1)
    fast = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    with torch.no_grad():
        model.conv1.parametrizations.weight.original0.mul_(2)
    with pytest.raises(RuntimeError, match="original0"):
        fast(X)
    fast.refresh(model)
    agrees(fast, model, X)


def test_the_model_is_not_kept_alive() -> None:
    model = small()
    right = model.eval()(X).detach()
    fast = rf.optimize_for_inference(model, X)
    gone = [weakref.ref(model), weakref.ref(model.conv1.weight)]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert torch.allclose(fast(X), right, rtol=1e-4, atol=1e-5)


def test_copies_are_private() -> None:
    model = small()
    fast = rf.optimize_for_inference(model, X)
    right = fast(X)
    watch, fast._watch = fast._watch, type(fast._watch)(nn.Identity())
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert torch.equal(fast(X), right), "the result reads the model's own tensors"
    assert watch.changed() is not None


def test_refresh_with_other_things() -> None:
    fast = rf.optimize_for_inference(small(), X)
    with pytest.raises(TypeError, match="model"):
        fast.refresh({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the one"):
        fast.refresh(rf.models.resnet32())


def test_refresh_from_a_copy_of_other_weights() -> None:
    fast = rf.optimize_for_inference(small(), X)
    other = lively(rf.models.resnet20(), seed=12)
    fast.refresh(other)
    agrees(fast, other, X)


def test_unfolded_weights_are_refreshed_too() -> None:
    """Constants of operators that are not convs: the head, and a norm before its conv."""
    model = lively(rf.models.preact_resnet18())
    fast = rf.optimize_for_inference(model, X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    fast.refresh(model)
    agrees(fast, model, X)


def test_shared_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(torch.relu(self.norm(self.conv(x))))) + x)

    model = lively(Twice())
    fast = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    with torch.no_grad():
        model.conv.weight.neg_()
    fast.refresh(model)
    agrees(fast, model, X)
