# SPDX-License-Identifier: BSD-3-Clause
"""U16: weights that change between calls by every means: no stale one is ever used."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import Results, assert_same
from ways import (
    Way,
    assert_path,
    batches,
    fast_twin,
    make,
    photos,
    small_basic,
    small_bottleneck,
    state,
    train,
    tv,
)

import resnet_fast as rf
from resnet_fast import dispatch

WAY = Way("U16", "weights that change")


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
    """The same on norms: another class, or a hook that computes the weight; both on one."""
    parametrize.register_parametrization(model.layer1[0].bn1, "weight", Doubled())
    parametrize.register_parametrization(model.layer1[0].bn1, "bias", Doubled())
    prune.l1_unstructured(model.layer2[0].bn2, "weight", amount=0.5)
    prune.l1_unstructured(model.layer2[0].bn2, "bias", amount=4)
    prune.l1_unstructured(model.layer3[0].downsample[1], "weight", amount=0.25)
    parametrize.register_parametrization(model.bn1, "weight", Doubled())
    prune.l1_unstructured(model.bn1, "bias", amount=0.5)
    results = train(model, steps=2)
    model.layer2[0].bn2.weight_mask.zero_()  # the mask of a later round
    results["masked"] = model.eval()(photos()).detach()
    prune.remove(model.layer2[0].bn2, "weight")
    parametrize.remove_parametrizations(model.layer1[0].bn1, "weight")
    results["after"] = model(photos()).detach()
    assert not model.layer2[0].bn2.weight.any()
    return results


def counted_parametrization(model: Any) -> Results:
    """A parametrization and a pruning with a state of their own are each asked once a call."""

    class Counts(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight * self.calls

    counts, seen = Counts(), []
    parametrize.register_parametrization(model.layer1[0].bn2, "weight", counts, unsafe=True)
    counts.register_forward_hook(lambda *_: seen.append(1))
    counts.calls = 0
    seen.clear()
    answers = [model.eval()(photos()).detach() for _ in range(3)]
    assert (counts.calls, len(seen)) == (3, 3)
    return {"answers": torch.stack(answers)}


def pruned_with_a_hook(model: Any) -> Results:
    """Any other hook beside the pruning is heard, and its norm's block runs plain."""
    bn = model.layer2[0].bn2
    prune.l1_unstructured(bn, "weight", amount=0.5)
    seen: list[Tensor] = []
    bn.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    results = train(model, steps=1)
    return results | {f"seen {i}": t for i, t in enumerate(seen)}


class Masked(prune.L1Unstructured):
    """A pruning method that does more than PyTorch's when it is called."""

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        super().__call__(module, inputs)
        return (inputs[0] * 2,)


def own_pruning(model: Any) -> Results:
    """A pruning method of one's own that also changes the input."""
    Masked.apply(model.layer2[0].bn2, "weight", amount=0.5)
    return train(model, steps=1)


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
    WAY.check(small_basic, changed_norms)
    WAY.check(small_basic, counted_parametrization)


def test_a_hook_beside_the_pruning_is_heard() -> None:
    for use in (pruned_with_a_hook, own_pruning):
        untouched = make(small_basic, tv)
        want = use(copy.deepcopy(untouched))
        for library in ("torchvision", "ours"):
            model = fast_twin(library, small_basic, untouched)
            with dispatch.recording() as events:
                got = use(model)
            assert_same(got, want, 1e-7)
            assert_path(events, ("bn2 has a forward pre-hook",))


def test_explain_calls_changed_norms_fast() -> None:
    model = rf.accelerate(make(small_basic, tv))
    prune.l1_unstructured(model.layer2[0].bn2, "weight", amount=0.5)
    parametrize.register_parametrization(model.layer1[0].bn1, "weight", Doubled())
    assert not [row for row in rf.explain(model).rows if row.reason]
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    model.layer2[0].bn2.register_forward_hook(lambda *_: None)
    assert len([row for row in rf.explain(model).rows if row.reason]) == 2


def test_low_rank_merge() -> None:
    WAY.check(small_basic, merged)


def test_a_copy_does_not_follow() -> None:
    def use(model: Any) -> Results:
        other = copy.deepcopy(model.eval())
        with torch.no_grad():
            model.layer1[0].bn1.weight.zero_()
        return {"changed": model(photos()).detach(), "copy": other(photos()).detach()}

    WAY.check(small_basic, use)
