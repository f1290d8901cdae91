# SPDX-License-Identifier: BSD-3-Clause
"""U16: weights that change between calls by every means: no stale one is ever used."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import Results
from ways import EXCEPT, Way, batches, photos, small_basic, small_bottleneck, state, train

WAY = Way(
    "U16",
    "weights that change",
    EXCEPT,
    "a block with a parametrized or pruned norm, that block alone",
)


def in_place(model: Any) -> Results:
    """Written into, swapped by .data, loaded, perturbed between passes (crossbar noise)."""
    model.eval()
    results = {"0": model(photos())}
    with torch.no_grad():
        model.layer1[0].bn1.weight.mul_(1.5)
        model.layer1[0].bn2.running_mean.add_(0.1)
        model.layer2[0].conv1.weight.neg_()
    results["1"] = model(photos())
    model.layer1[0].bn1.bias.data = model.layer1[0].bn1.bias.data + 0.5
    model.layer3[0].bn2.running_var = model.layer3[0].bn2.running_var * 2
    results["2"] = model(photos())
    model.load_state_dict({k: t * 0.9 for k, t in model.state_dict().items()})
    results["3"] = model(photos())
    return {name: t.detach() for name, t in results.items()}


def ema(model: Any) -> Results:
    """An exponential moving average of a model in training, evaluated after each step."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    answers = []
    for images, labels in batches(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        averaged.update_parameters(model)
        averaged.eval()
        answers.append(averaged(photos()).detach())
    return {"answers": torch.stack(answers)} | state(averaged)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def changed_convolutions(model: Any) -> Results:
    """A pruning mask on every conv, weight normalisation on one more; trained, then made final."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for m in convs[1:]:
        prune.l1_unstructured(m, "weight", amount=0.5)
    parametrize.register_parametrization(convs[0], "weight", Doubled())
    results = train(model, steps=2)
    for m in convs[1:]:
        prune.remove(m, "weight")
    parametrize.remove_parametrizations(convs[0], "weight")
    results["after"] = model.eval()(photos()).detach()
    assert float((convs[3].weight == 0).double().mean()) >= 0.5
    return results


def changed_norms(model: Any) -> Results:
    """The same on norms: another class, or a hook that computes the weight."""
    parametrize.register_parametrization(model.layer1[0].bn1, "weight", Doubled())
    prune.l1_unstructured(model.layer2[0].bn2, "weight", amount=0.5)
    return train(model, steps=2)


class LowRank(nn.Module):
    """weight + B A, scaled: LoRA on a conv's weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, rest = weight.shape[0], weight[0].numel()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(2, rest, generator=generator).to(weight))
        self.b = nn.Parameter(torch.randn(out, 2, generator=generator).to(weight) / 16)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight) / 4


def merged(model: Any) -> Results:
    """LoRA trained on frozen weights, then merged into them: the answers stay."""
    model.requires_grad_(False).eval()
    for m in list(model.modules()):
        if isinstance(m, nn.Conv2d):
            parametrize.register_parametrization(m, "weight", LowRank(m.weight))
    results = train(model, steps=2)
    before = model.eval()(photos()).detach()
    for m in list(model.modules()):
        if parametrize.is_parametrized(m):
            parametrize.remove_parametrizations(m, "weight")
    after = model(photos()).detach()
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    return results | {"after": after}


def test_in_place() -> None:
    WAY.check(small_basic, in_place)
    WAY.check(small_bottleneck, in_place)


def test_moving_average() -> None:
    WAY.check(small_basic, ema)


def test_pruned_and_parametrized_convolutions() -> None:
    WAY.check(small_basic, changed_convolutions)


def test_pruned_and_parametrized_norms() -> None:
    WAY.check(
        small_basic,
        changed_norms,
        falls_back=("bn1 is a ParametrizedBatchNorm2d", "bn2 has a forward pre-hook"),
    )


def test_low_rank_merge() -> None:
    WAY.check(small_basic, merged)


def test_a_copy_does_not_follow() -> None:
    def use(model: Any) -> Results:
        other = copy.deepcopy(model.eval())
        with torch.no_grad():
            model.layer1[0].bn1.weight.zero_()
        return {"changed": model(photos()).detach(), "copy": other(photos()).detach()}

    WAY.check(small_basic, use)
