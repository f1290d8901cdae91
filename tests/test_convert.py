# SPDX-License-Identifier: BSD-3-Clause
"""accelerate and restore: only classes change, and a whole model gives what its twin gives."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_blocks import AttentionBlock, OwnBlock, OwnForward, OwnImpl, OwnNet, make, tv
from twins import Log, assert_same, image, randomise, reasons, step, twin

from resnet_fast import adapters, models
from resnet_fast.convert import accelerate, restore

X = image(2, 3, 48, 40)


def small(block: Any = tv.Bottleneck, net: Any = tv.ResNet, **kwargs: Any) -> Any:
    """A torchvision ResNet of every kind of block and little else, float64."""
    torch.manual_seed(4)
    return randomise(net(block, [2, 1, 1, 1], num_classes=5, **kwargs))


def classes(model: Any) -> list[type]:
    return [type(m) for m in model.modules()]


# ---- what changes and what does not --------------------------------------------------------------
def test_only_classes_change_and_restore_brings_them_back() -> None:
    model = small()
    model.layer1[0].register_forward_hook(lambda *_: None)
    before = classes(model)
    tensors = [*model.parameters(), *model.buffers()]
    dicts = [m.__dict__ for m in model.modules()]
    text, keys = repr(model), list(model.state_dict())

    assert accelerate(model) is model
    assert isinstance(model, tv.ResNet)
    assert isinstance(model.layer1[0], tv.Bottleneck)
    assert all(adapters.is_accelerated(m) for m in (model, *model.layer1, *model.layer4))
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, tensors, strict=True))
    assert all(m.__dict__ is d for m, d in zip(model.modules(), dicts, strict=True))
    assert (repr(model), list(model.state_dict())) == (text, keys)
    accelerated = classes(model)
    assert sum(a is not b for a, b in zip(accelerated, before, strict=True)) == 6
    assert classes(accelerate(model)) == accelerated

    assert restore(model) is model
    assert all(a is b for a, b in zip(classes(model), before, strict=True))
    assert all(m.__dict__ is d for m, d in zip(model.modules(), dicts, strict=True))
    assert classes(restore(model)) == before


@pytest.mark.parametrize("block", [tv.BasicBlock, tv.Bottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_and_its_twin(block: Any, training: bool) -> None:
    theirs = small(block).train(training)
    ours = accelerate(twin(theirs))
    assert not reasons(lambda: assert_same(step(ours, X, 2), step(theirs, X, 2), rtol=1e-8))
    restore(ours)
    assert_same(step(ours, X), step(theirs, X), rtol=1e-7)


def test_every_family_of_torchvision_is_fused_throughout() -> None:
    for kwargs in (
        {"groups": 2, "width_per_group": 4},
        {"width_per_group": 128},
        {"replace_stride_with_dilation": [False, True, True]},
        {"zero_init_residual": True},
    ):
        theirs = small(**kwargs)
        ours = accelerate(twin(theirs))
        assert not reasons(lambda a=ours, b=theirs: assert_same(step(a, X), step(b, X), 1e-8))


def test_training_steps_with_restore_and_new_weights_between() -> None:
    theirs, ours = small(), accelerate(small())
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses.append([])
        for i in range(6):
            if model is ours and i == 2:
                restore(model)
            if model is ours and i == 3:
                accelerate(model)
            if i == 4:  # no weight may be remembered from before
                model.load_state_dict(small(zero_init_residual=True).state_dict())
            optimiser.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-6)


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "maxpool", "layer2", "avgpool", "fc", ""])
def test_hooks_on_the_parts_of_the_whole_model(part: str) -> None:
    theirs = small(tv.BasicBlock)
    ours, logs = accelerate(twin(theirs)), (Log(), Log())
    for model, log in zip((theirs, ours), logs, strict=True):
        model.get_submodule(part).register_forward_hook(
            lambda _, args, out, log=log: log.add(part, *args, out)
        )
        fell_back = reasons(lambda m=model: step(m, X))
    logs[1].same_as(logs[0])
    assert logs[1]
    stem = [("ResNet", f"{part} has a forward hook")] if part in ("bn1", "relu") else []
    assert fell_back == stem


def test_a_patched_max_pool_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(small(tv.BasicBlock))
    plain, calls = F.max_pool2d, []

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return plain(*args, **kwargs)

    model(X)
    monkeypatch.setattr(F, "max_pool2d", patched)
    model(X)
    assert len(calls) == 1


def test_hook_orders_across_the_model_are_the_twins() -> None:
    theirs = small(tv.BasicBlock)
    ours, logs = accelerate(twin(theirs)), (Log(), Log())
    for model, log in zip((theirs, ours), logs, strict=True):
        for name, m in model.named_modules():
            m.register_forward_hook(lambda _, __, out, name=name, log=log: log.add(name, out))
        step(model, X)
    logs[1].same_as(logs[0])
    assert len(logs[1]) > 40


# ---- where the blocks are ------------------------------------------------------------------------
def test_truncated_models_getters_and_bare_blocks() -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    model = small(tv.BasicBlock)
    layers = {"layer1": "a", "layer3": "b"}
    pairs = [
        (nn.Sequential(*list(m.children())[:-3]), IntermediateLayerGetter(m, layers), m.layer2[0])
        for m in (model, twin(model))
    ]
    for theirs, ours in zip(*pairs, strict=True):
        accelerate(ours)
        x = image(2, 64, 6, 6) if isinstance(ours, tv.BasicBlock) else X
        want, got = theirs(x), ours(x)
        if isinstance(want, OrderedDict):
            want, got = want["b"], got["b"]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert adapters.is_accelerated(pairs[1][2])
    assert adapters.is_accelerated(pairs[1][1]["layer3"][0])


def test_models_without_known_blocks_pass_unchanged() -> None:
    own = models.resnet18()
    for model in (own, models.resnet20(), nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(2))):
        before = classes(model)
        assert accelerate(model) is model
        assert classes(model) == before
        assert classes(restore(model)) == before


@pytest.mark.parametrize("wrong", [None, 3, "resnet18", tv.ResNet, torch.zeros(2)])
def test_what_is_not_a_module_is_refused(wrong: Any) -> None:
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=rf"model must be .*; got {type(wrong).__name__}"):
            function(wrong)


# ---- subclasses ----------------------------------------------------------------------------------
def test_subclasses_that_leave_the_forward_alone() -> None:
    theirs = small(OwnBlock, OwnNet)
    ours = accelerate(twin(theirs))
    assert type(ours) is not OwnNet
    assert isinstance(ours, OwnNet)
    assert isinstance(ours.layer1[0], OwnBlock)
    assert repr(ours) == repr(theirs)
    assert ours.layer1[0].width() == theirs.layer1[0].width()
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), rtol=1e-8))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert classes(other) == classes(ours)
        assert torch.equal(other.eval()(X), ours.eval()(X))
    assert classes(restore(ours)) == classes(theirs)


def test_subclasses_with_a_forward_of_their_own_are_left_alone() -> None:
    block = AttentionBlock(8, 8).double()
    assert adapters.why_not(block) == "AttentionBlock overrides forward"
    assert type(accelerate(block)) is AttentionBlock
    net = small(net=OwnImpl)
    assert adapters.why_not(net) == "OwnImpl overrides _forward_impl"
    assert type(accelerate(net)) is OwnImpl
    assert adapters.is_accelerated(net.layer1[0])

    theirs = small(net=OwnForward)  # its forward goes through _forward_impl, which is torchvision's
    ours = accelerate(twin(theirs))
    assert adapters.is_accelerated(ours)
    assert_same(step(ours, X), step(theirs, X), rtol=1e-8)


def test_a_forward_replaced_on_the_object_is_left_alone() -> None:
    model = small(tv.BasicBlock)
    block = model.layer1[0]
    plain = block.forward
    block.forward = lambda x: plain(x) * 2
    assert adapters.why_not(block) == "its forward was replaced on the object"
    want = twin(model)(X)  # the copy's forward is still that of `block`
    torch.testing.assert_close(accelerate(model)(X), want)
    assert type(block) is tv.BasicBlock


def test_a_class_patched_after_accelerate_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = accelerate(small(OwnBlock, OwnNet))
    monkeypatch.setattr(
        OwnBlock, "forward", lambda self, x: self.conv1(x)[:, :, ::2], raising=False
    )
    x = image(2, 64, 8, 8)
    assert ours.layer1[0](x).shape == (2, 64, 4, 8)
    assert reasons(lambda: ours.layer1[0](x)) == [("OwnBlock", "OwnBlock.forward was replaced")]
    monkeypatch.setattr(tv.ResNet, "_forward_impl", lambda self, x: x + 1)
    assert torch.equal(ours(X), X + 1)
    assert reasons(lambda: ours(X)) == [("OwnNet", "OwnNet._forward_impl was replaced")]


def test_other_reasons_not_to_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meta(type):
        pass

    class WithMeta(tv.BasicBlock, metaclass=Meta):
        pass

    assert adapters.why_not(WithMeta(8, 8)) == "WithMeta has a metaclass"
    assert adapters.why_not(nn.Linear(2, 2)) == "no adapter for torch.nn.modules.linear.Linear"
    assert adapters.why_not(accelerate(make("basic"))) == "it is accelerated"
    with pytest.raises(TypeError, match="no adapter for Linear"):
        adapters.accelerated_class(nn.Linear)

    def patched(self: Any, x: Tensor) -> Tensor:
        return x

    adapter = adapters._ADAPTERS[tv.BasicBlock]._replace(function=patched)
    monkeypatch.setitem(adapters._ADAPTERS, tv.BasicBlock, adapter)
    assert "patched had been replaced when resnet_fast" in adapters.why_not(make("basic"))


def test_restore_refuses_a_class_made_later_by_somebody_else() -> None:
    model = accelerate(small())
    block = model.layer2[0]
    accelerated = type(block)
    block.__class__ = type("Sharded", (accelerated,), {})  # as fully_shard does
    assert_same(step(model, X), step(small(), X), rtol=1e-8)
    with pytest.raises(RuntimeError, match=r"layer2.0 was changed to class Sharded after acc"):
        restore(model)
    assert adapters.is_accelerated(model)
    block.__class__ = accelerated
    assert classes(restore(model)) == classes(small())


# ---- copies --------------------------------------------------------------------------------------
def test_copies_pickles_and_files_stay_accelerated() -> None:
    model = accelerate(small()).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert classes(other) == classes(model)
        assert torch.equal(other(X), model(X))
        assert classes(restore(other)) == classes(small())
        accelerate(model)


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_pickle_opens_in_a_new_process(tmp_path: Path) -> None:
    torch.save(accelerate(make("bottleneck")), tmp_path / "model.pt")
    code = (
        "import sys; sys.path.insert(0, '..'); import shims, torch; shims.import_torchvision()\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(type(model).__module__, type(model).__name__)"
    )
    assert run_python(code) == "resnet_fast.adapters.torchvision Bottleneck"


def test_torchvision_is_not_imported_for_models_that_do_not_need_it() -> None:
    code = (
        "import sys; sys.path.insert(0, '..'); import torch\n"
        "from resnet_fast import convert, models\n"
        "convert.restore(convert.accelerate(models.resnet20()))\n"
        "print('torchvision' in sys.modules)"
    )
    assert run_python(code) == "False"


# ---- graphs --------------------------------------------------------------------------------------
def test_feature_extraction_sees_the_same_graph() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    theirs = small(tv.BasicBlock).eval()
    ours = accelerate(twin(theirs))
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = ["relu", "layer1.1.bn1", "layer2.0.add", "layer4.0.relu_1", "flatten"]
    a, b = create_feature_extractor(ours, nodes), create_feature_extractor(theirs, nodes)
    assert str(a.graph) == str(b.graph)
    assert_same(a(X), b(X))
    assert not reasons(lambda: ours(X))


def test_compiled_model_in_one_graph() -> None:
    theirs = small(tv.BasicBlock)
    compiled = torch.compile(accelerate(twin(theirs)), backend="aot_eager", fullgraph=True)
    got = {k.removeprefix("_orig_mod."): t for k, t in step(compiled, X).items()}
    assert_same(got, step(theirs, X), rtol=1e-8)


# ---- the registry --------------------------------------------------------------------------------
class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class FastBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 1 + x


def test_register_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
    with pytest.raises(TypeError, match="accelerated must be a subclass of Block; got"):
        adapters.register_adapter(Block, nn.Linear)
    with pytest.raises(ValueError, match="method must be one that Block defines; got 'extra'"):
        adapters.register_adapter(Block, FastBlock, "extra")
    adapters.register_adapter(Block, FastBlock)
    model = nn.Sequential(Block(), nn.ReLU())
    assert classes(accelerate(model)) == [nn.Sequential, FastBlock, nn.ReLU]
    assert classes(restore(model)) == [nn.Sequential, Block, nn.ReLU]
