# SPDX-License-Identifier: BSD-3-Clause
"""U09: a backbone for something else: getters, truncations, skips of a U-Net."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import with_torchvision  # noqa: F401
from torch import Tensor, fx, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from twins import Results
from ways import Way, fast_twin, gradients, make, photos, small_basic, small_bottleneck, state, tv

import resnet_fast as rf
from resnet_fast import adapters, dispatch

WAY = Way("U09", "feature maps")
LAYERS = {"layer1": "a", "layer2": "b", "layer3": "c", "layer4": "d"}


class UNet(nn.Module):
    """A decoder that takes every stage's map as a skip (segmentation of nuclei)."""

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = IntermediateLayerGetter(backbone, LAYERS)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.backbone(x).values())
        y = self.lateral[-1](maps[-1])
        for i in (2, 1, 0):
            y = F.interpolate(y, maps[i].shape[-2:], mode="nearest") + self.lateral[i](maps[i])
        return y


def unet(channels: tuple[int, ...]) -> Any:
    def use(model: Any) -> Results:
        torch.manual_seed(2)
        net = UNet(model, channels).double()
        y = net(photos())
        (y.square().mean() + y[:, 0].mean()).backward()
        return {"y": y.detach()} | gradients(net) | state(net)

    return use


def truncated(model: Any) -> Results:
    """layer4 and the head cut off, by children (RTM weather, a truncated ResNet-50)."""
    net = nn.Sequential(*list(model.children())[:-3])
    y = net(photos())
    y.square().mean().backward()
    return {"y": y.detach()} | gradients(net) | state(net)


def extracted(nodes: list[str], train: bool) -> Any:
    """The maps of these nodes, and where `train` is set what a backward through all leaves."""

    def use(model: Any) -> Results:
        net = create_feature_extractor(model.train(train), nodes)
        maps = net(photos())
        results = {name: y.detach().clone() for name, y in maps.items()}
        if train:
            sum(y.square().mean() for y in maps.values()).backward()
            # Nothing else may have moved, and the parameters are the model's own.
            results |= gradients(model) | state(model)
        return results | {"itself": model.eval()(photos()).detach()}

    return use


def test_unet() -> None:
    WAY.check(small_basic, unet((64, 128, 256, 512)))
    WAY.check(small_bottleneck, unet((256, 512, 1024, 2048)))


def test_truncated() -> None:
    WAY.check(small_bottleneck, truncated)


NODES = ["relu", "layer1.0.relu", "layer2.0.add", "layer3", "flatten"]


@pytest.mark.parametrize("train", [False, True])
def test_feature_extractor(train: bool) -> None:
    WAY.check(small_basic, extracted(NODES, train))
    WAY.check(small_bottleneck, extracted(NODES, train), libraries=("torchvision",))


@pytest.mark.parametrize("train", [False, True])
def test_feature_extractor_of_every_node(train: bool) -> None:
    """Each name that tracing gives, in mixtures: what is asked for is not fused away."""
    names = get_graph_node_names(small_basic(tv))
    assert get_graph_node_names(rf.accelerate(small_basic(tv))) == names
    assert len(names[0]) > 40
    for start in range(4):
        WAY.check(small_basic, extracted(names[0][start::4], train), libraries=("torchvision",))


@pytest.mark.parametrize("nodes", [["layer4"], NODES])
def test_every_norm_of_an_extractor_is_fused(nodes: list[str]) -> None:
    net = create_feature_extractor(
        fast_twin("torchvision", small_basic, make(small_basic, tv)), nodes
    )
    rows = rf.explain(net, photos()).rows
    assert [row.reason for row in rows] == [""]
    assert (rows[0].module, rows[0].op, rows[0].calls) == ("", "batch_norm_act", 12)
    if rf.is_available():
        assert rows[0].implementation != "reference"
    text = net.code
    assert text.count("norm_add_relu(") == (4 if nodes == ["layer4"] else 3)
    assert "norm" not in rf.restore(net).code


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("build", [small_basic, small_bottleneck])
def test_extractor_of_a_plain_model_accelerated_afterwards(build: Any, train: bool) -> None:
    """As fast as the other order; restore() gives the same extractor back."""

    def use(model: Any) -> Results:
        fast = adapters.is_accelerated(model)
        plain = rf.restore(model).train(train)
        net = create_feature_extractor(plain, NODES)
        code = net.code
        if fast:
            assert rf.accelerate(net) is net
            assert [row.reason for row in rf.explain(net, photos()).rows] == [""]
            assert net.code.count("norm_add_relu(") == 3
        assert "norm" not in code
        results = {name: y.detach().clone() for name, y in net(photos()).items()}
        if train:
            sum(y.square().mean() for y in net(photos()).values()).backward()
            results |= gradients(plain) | state(plain)
        # Both graphs of torchvision's: the one that is not in use, too.
        net.train(not train)
        results |= {f"other {name}": y.detach().clone() for name, y in net(photos()).items()}
        assert rf.restore(net.train(train)).code == code
        return results | {f"{name} again": y.detach() for name, y in net(photos()).items()}

    WAY.check(build, use, libraries=("torchvision",))


def test_extractor_copied_pickled_and_traced_again() -> None:
    def use(model: Any) -> Results:
        net = create_feature_extractor(model.eval(), NODES)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twins = copy.deepcopy(net), torch.load(file, weights_only=False), fx.symbolic_trace(net)
        return {f"{i} {k}": y for i, t in enumerate(twins) for k, y in t(photos()).items()}

    WAY.check(small_basic, use, libraries=("torchvision",))


def test_norms_that_share_statistics_keep_their_order() -> None:
    def use(model: Any) -> Results:
        block = model.layer2[0]
        block.downsample[1].running_mean = block.bn2.running_mean
        block.downsample[1].running_var = block.bn2.running_var
        net = create_feature_extractor(model, ["layer4"])
        return {"y": net(photos())["layer4"].detach()} | state(model)

    WAY.check(small_basic, use, libraries=("torchvision",))


def test_the_stem_of_a_getter_is_fused() -> None:
    """Its norm and ReLU lie in the getter itself; asked for by name, they run as they are."""

    def norms(getter: nn.Module) -> int:
        with dispatch.recording() as events:
            getter(photos())
        return sum(event.op == "batch_norm_act" for event in events)

    for layers, fused in (({"layer2": "x"}, 6), ({"relu": "a", "layer2": "x"}, 6)):
        model = make(small_basic, tv)
        getter = IntermediateLayerGetter(model, layers)
        want = getter(photos())
        rf.accelerate(getter)
        assert norms(getter) == fused
        for name, y in getter(photos()).items():
            torch.testing.assert_close(y, want[name], rtol=1e-9, atol=1e-9)
    # The ReLU writes into what was asked for, as in torchvision.
    model = make(small_basic, tv)
    asked = IntermediateLayerGetter(model, {"conv1": "z", "bn1": "a", "maxpool": "p"})
    want = asked(photos())
    assert not norms(rf.accelerate(asked))
    for name, y in asked(photos()).items():
        torch.testing.assert_close(y, want[name], rtol=1e-9, atol=1e-9)
    assert type(rf.restore(asked)) is IntermediateLayerGetter


def test_getter_before_accelerate() -> None:
    """What is wrapped first is found inside the wrapper."""

    def use(model: Any) -> Results:
        getter = rf.accelerate(IntermediateLayerGetter(rf.restore(model), LAYERS))
        return dict(getter(photos()))

    def plain(lib: Any) -> nn.Module:
        return small_basic(lib)

    theirs = plain(tv).double()
    want = IntermediateLayerGetter(theirs, LAYERS)(photos())
    theirs_again = plain(tv).double()
    theirs_again.load_state_dict(theirs.state_dict())
    got = use(theirs_again)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-9, atol=1e-9)
