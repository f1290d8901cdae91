# SPDX-License-Identifier: BSD-3-Clause
"""Forward hooks in an optimized model: true tensors, in order, once; the rest stays folded."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import shims
import torch
from inference_cases import agrees, eager, image, lively, table
from torch import Tensor, nn
from torch.nn.utils import prune

import resnet_fast as rf
from resnet_fast.inference import cpu

X = image(3, 3, 32, 32)


def small() -> Any:
    return lively(rf.models.resnet20()).eval()


def convs(fast: Any) -> list[str]:
    """Modules whose convs are packed."""
    rows = rf.explain(fast).rows
    return [row.module for row in rows if row.implementation in cpu.FAST]


class Recorder:
    """Copies what the hooked modules of a model take and give; ``with_hooks`` adds it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def on(self, model: nn.Module) -> nn.Module:
        for name in self.names:
            model.get_submodule(name).register_forward_hook(
                lambda m, args, y, name=name: self.seen.append((name, args[0].clone(), y.clone()))
            )
        return model


NAMES = ["conv1", "bn1", "relu", "layer1", "layer1.1", "layer2.0.conv2", "layer2.0.bn1",
         "layer3.1.bn2", "avgpool", "fc", ""]  # fmt: skip


ALONE = [["layer2.0.bn1"], ["layer1"]]
CASES = [("torchvision", NAMES), *(("ours", names) for names in ALONE)]
CASES += [
    pytest.param("ours", names, marks=pytest.mark.slow)
    for names in (NAMES, ["conv1"], ["relu"], [""])
]


@pytest.mark.parametrize(("kind", "names"), CASES)
def test_a_hook_sees_true_tensors_once_and_in_order(kind: str, names: list[str]) -> None:
    if kind == "torchvision":
        models = shims.torchvision_or_skip().models
        model = lively(models.resnet18(num_classes=5)).eval()
        names = [name.replace("layer3.1", "layer4.1") for name in names]
    else:
        model = small()
    have = dict(model.named_modules())
    names = [name for name in names if name in have]
    assert names
    ours = Recorder(names)
    hooked = ours.on(copy.deepcopy(model))
    fast = rf.optimize_for_inference(hooked, X)
    assert ours.seen == [], "tracing ran the hooks"
    assert fast.trace is not None, str(rf.explain(fast))
    result = fast(X)
    right = {}
    for dtype in (torch.float32, torch.float64):
        recorder = Recorder(names)
        twin = recorder.on(copy.deepcopy(model)).to(dtype, memory_format=torch.channels_last)
        with torch.no_grad(), rf.use_backend("reference"):
            y = twin(X.to(dtype, memory_format=torch.channels_last))
        right[dtype] = recorder.seen, y
    assert [entry[0] for entry in ours.seen] == [entry[0] for entry in right[torch.float64][0]]
    for mine, base, exact in zip(ours.seen, *(r[0] for r in right.values()), strict=True):
        oracle.check(f"{mine[0]} takes", mine[1], base[1], exact[1])
        oracle.check(f"{mine[0]} gives", mine[2], base[2], exact[2])
    oracle.check("logits", result, *(r[1] for r in right.values()))


def test_the_rest_stays_folded() -> None:
    plain = rf.optimize_for_inference(small(), X)
    model = small()
    model.layer2[1].conv1.register_forward_hook(lambda m, args, y: None)
    model.layer3.register_forward_hook(lambda m, args, y: None)
    fast = rf.optimize_for_inference(model, X)
    assert set(convs(plain)) - set(convs(fast)) == {"layer2.1.conv1"}
    rows = {row.module: row for row in rf.explain(fast).rows if "hook" in row.reason + row.step}
    assert rows["layer2.1.conv1"].implementation == "module"
    assert "called as it is" in rows["layer2.1.conv1"].reason
    assert "its inside is folded" in rows["layer3"].reason
    agrees(fast, model, X)


def test_hooks_that_return_values() -> None:
    model = small()
    model.layer1[0].register_forward_hook(lambda m, args, y: y * 2)
    model.layer2[0].conv1.register_forward_hook(lambda m, args, y: y - 0.25)
    model.layer3.register_forward_pre_hook(lambda m, args: (args[0].abs() + 0.5,))
    model.fc.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
    )
    fast = rf.optimize_for_inference(model, X)
    assert fast.trace is not None
    for batch in (1, 2, 40):
        agrees(fast, model, image(batch, 3, 32, 32, seed=batch))
    agrees(fast, model, image(2, 3, 40, 48))


@pytest.mark.parametrize("result", [lambda y: y[:, :, ::2], lambda y: y.double(), lambda y: [y]])
def test_a_hook_that_gives_something_else_is_refused(result: Callable[[Tensor], Any]) -> None:
    model = small()
    model.layer2.register_forward_hook(lambda m, args, y: result(y))
    fast = rf.optimize_for_inference(model, X)
    with pytest.raises(RuntimeError, match="hook on layer2 gave"):
        fast(X)


def test_a_hook_that_changes_weights_is_refused() -> None:
    def double(module: Any, args: Any) -> None:
        with torch.no_grad():
            module[0].conv1.weight.mul_(2)

    model = small()
    model.layer1.register_forward_pre_hook(double)
    fast = rf.optimize_for_inference(model, X)
    with pytest.raises(RuntimeError, match=r"hook changed layer1\.0\.conv1\.weight"):
        fast(X)


def test_what_a_hook_keeps_is_not_overwritten() -> None:
    """The residual sum runs in place where nobody else has the tensor; a hook may have it."""
    kept: list[Tensor] = []
    copies: list[Tensor] = []
    model = small()

    def keep(module: Any, args: Any, y: Tensor) -> None:
        kept.extend((args[0], y))
        copies.extend((args[0].clone(), y.clone()))

    for block in model.layer1:
        for module in (block, block.conv2, block.bn2):
            module.register_forward_hook(keep)
    fast = rf.optimize_for_inference(model, X)
    fast(X)
    assert len(kept) == 2 * 9
    for mine, copied in zip(kept, copies, strict=True):
        assert torch.equal(mine, copied)


def test_in_place_relu_of_a_value_that_others_read() -> None:
    """A hooked in-place ReLU writes to its input, and the shortcut reads what it wrote."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.relu(y) * 2 + y

    for name in ("relu", "conv"):
        model = Block().eval()
        model.get_submodule(name).register_forward_hook(lambda m, args, y: y + 1)
        fast = rf.optimize_for_inference(model, X)
        assert fast.trace is not None
        agrees(fast, model, X)


def test_identity_whose_value_is_written_to() -> None:
    """An alias that a later operator writes through: no graph, and still the right answer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.tap = nn.Conv2d(3, 3, 3, padding=1), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.tap(y).relu_()
            return z + y

    model = Net().eval()
    model.tap.register_forward_hook(lambda m, args, y: None)
    fast = rf.optimize_for_inference(model, X)
    assert fast.trace is None
    assert "written to in place" in str(rf.explain(fast))
    agrees(fast, model, X)


def test_pruning_masks_are_hooks() -> None:
    """torch.nn.utils.prune works by a forward pre-hook: that module is called as it is."""
    model = small()
    prune.random_unstructured(model.conv1, "weight", amount=0.5)
    fast = rf.optimize_for_inference(model, X)
    assert table(fast)["conv1"][1] == "module"
    assert len(convs(fast)) == 18
    with torch.no_grad():
        model(X)  # deepcopy, for the comparison, wants a weight without a graph
    agrees(fast, model, X)
    with torch.no_grad():
        model.conv1.weight_orig.mul_(2)
    with pytest.raises(RuntimeError, match="weight_orig"):
        fast(X)
    fast.refresh(model)
    with torch.no_grad():
        model(X)
    agrees(fast, model, X)


def test_hooks_added_and_removed_afterwards() -> None:
    model = small()
    fast = rf.optimize_for_inference(model, X)
    agrees(fast, model, X)
    seen: list[int] = []
    handle = model.layer2.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    with pytest.raises(RuntimeError, match=r"layer2.*hooks.*refresh\(model\)"):
        fast(X)
    fast.refresh(model)
    fast(X)
    assert seen == [3]
    handle.remove()
    with pytest.raises(RuntimeError, match="hooks"):
        fast(X)
    fast.refresh(model)
    agrees(fast, model, X)
    assert len(convs(fast)) == 19
    # A profiler comes and goes between two calls: nothing is different then.
    model.layer1.register_forward_hook(lambda m, args, y: None).remove()
    agrees(fast, model, X)


def test_hooks_behind_a_dictionary_put_in_the_old_ones_place() -> None:
    model = small()
    fast = rf.optimize_for_inference(model, X)
    model.conv1._forward_hooks = OrderedDict()
    agrees(fast, model, X)
    model.conv1.register_forward_hook(lambda m, args, y: y)
    with pytest.raises(RuntimeError, match="hooks"):
        fast(X)


def test_bfloat16_and_the_hook() -> None:
    model = small()
    model.layer2[0].register_forward_hook(lambda m, args, y: y * 2)
    agrees(rf.optimize_for_inference(model, X, dtype=torch.bfloat16), model, X, torch.bfloat16)


def test_eager_is_as_before() -> None:
    """The model that was optimized still has its hooks, and they are its own."""
    model = small()
    calls: list[str] = []
    model.bn1.register_forward_hook(lambda m, args, y: calls.append("bn1"))
    rf.optimize_for_inference(model, X)
    eager(model, X, torch.float32)
    assert calls == ["bn1"]
