# SPDX-License-Identifier: BSD-3-Clause
"""U19: what comes before the sum or in its place: attention, drop path, D shortcut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import shims
import torch
import with_torchvision  # noqa: F401
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from twins import Results, assert_same, image, randomise
from ways import Way, assert_path, make, photos, small_basic, train, tv

import resnet_fast as rf
from resnet_fast import dispatch

timm = shims.timm_or_skip()

# Without its adapter a block with a forward of its own runs plain, and explain() says so.
WAY = Way("U19", "residual variants; blocks of one's own by the adapter registered for them")
NAMES = {
    "seresnet18": {},
    "ecaresnet26t": {},
    "resnetblur18": {},
    "resnet18d": {},
    "resnet18": {"drop_path_rate": 0.4},
}


@pytest.mark.parametrize("name", NAMES)
def test_timm_variants(name: str) -> None:
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(name, num_classes=10, **NAMES[name]))
    ours = rf.accelerate(copy.deepcopy(theirs))
    torch.manual_seed(1)
    with dispatch.recording() as events:
        got = train(ours, steps=1)
    torch.manual_seed(1)
    assert_same(got, train(theirs, steps=1), rtol=1e-6)
    assert_path(events)


class Scaled(BasicBlock):
    """Inception-ResNet: the branch times 0.17 before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(identity + 0.17 * out)


class ActBeforeAdd(BasicBlock):
    """The activation on the branch, none behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class NoAdd(BasicBlock):
    """Guidance and ablation networks: no shortcut at all."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Attention(BasicBlock):
    """ECA-Net: a gate for each channel, from the means of its neighbours, before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out * channel_gate(self.gate, out)
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


def channel_gate(conv: Any, x: Tensor) -> Tensor:
    means = x.mean((2, 3)).unsqueeze(1)
    return conv(means).sigmoid().transpose(1, 2).unsqueeze(-1)


def fast_attention(block: Any, x: Tensor, plain: Any) -> Tensor:
    out = rf.blocks.bn_act(block.bn1, block.conv1(x))
    out = rf.blocks.bn_act(block.bn2, block.conv2(out), activation=None)
    identity = rf.blocks.shortcut(block.downsample, x)
    return rf.functional.add_relu(out, identity, scale=channel_gate(block.gate, out))


def fast_scaled(block: Any, x: Tensor, plain: Any) -> Tensor:
    out = rf.blocks.bn_act(block.bn1, block.conv1(x))
    out = rf.blocks.bn_act(block.bn2, block.conv2(out), activation=None)
    identity = rf.blocks.shortcut(block.downsample, x)
    return rf.functional.add_relu(out, identity, scale=0.17)


def fast_act_before_add(block: Any, x: Tensor, plain: Any) -> Tensor:
    out = rf.blocks.bn_act(block.bn1, block.conv1(x))
    out = rf.blocks.bn_act(block.bn2, block.conv2(out))
    return out + rf.blocks.shortcut(block.downsample, x)


def fast_no_add(block: Any, x: Tensor, plain: Any) -> Tensor:
    out = rf.blocks.bn_act(block.bn1, block.conv1(x))
    return rf.blocks.bn_act(block.bn2, block.conv2(out))


ADAPTERS = {
    Scaled: fast_scaled,
    Attention: fast_attention,
    ActBeforeAdd: fast_act_before_add,
    NoAdd: fast_no_add,
}


def own(block: type) -> Any:
    """A torchvision ResNet whose layer1 and layer2 hold blocks of another class."""

    def build(lib: Any) -> nn.Module:
        model = small_basic(lib)
        for layer in (model.layer1, model.layer2):  # type: ignore[union-attr]
            layer[0].__class__ = block
            if block is Attention:
                layer[0].gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        return model

    return build


def norm_calls(model: Any) -> int:
    """How many batch norms a forward of the model runs on the fast path."""
    with dispatch.recording() as events:
        model(image(2, 3, 32, 32))
    assert_path(events)
    return sum(e.op == "batch_norm_act" and e.impl != "reference" for e in events)


@pytest.mark.parametrize("block", ADAPTERS)
def test_own_blocks_by_their_adapters(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rf.adapters, "_ADAPTERS", dict(rf.adapters._ADAPTERS))
    rf.register_adapter(block, ADAPTERS[block])
    build = own(block)
    WAY.check(build, train, libraries=("torchvision",))
    model = rf.accelerate(make(build, tv))
    assert not [row for row in rf.explain(model).rows if row.reason]
    if rf.is_available():
        # The stem's, two in each block and one in each shortcut; without a sum there is none.
        assert norm_calls(model) == (11 if block is NoAdd else 12)
    assert type(rf.restore(model).layer2[0]) is block


@pytest.mark.parametrize("block", ADAPTERS)
def test_own_blocks_are_left_alone_without_an_adapter(block: Any) -> None:
    """Equal, the other blocks fused, and explain() says which are not."""
    build = own(block)

    def use(model: Any) -> Results:
        return train(model, steps=1)

    WAY.check(build, use, libraries=("torchvision",))
    model = rf.accelerate(make(build, tv))
    left = [row for row in rf.explain(model).rows if row.reason]
    assert [row.reason for row in left] == [f"{block.__name__} overrides forward"] * 2
    if rf.is_available():
        assert norm_calls(model) == 7


def test_guidance_removes_the_sum_of_one_block_only() -> None:
    """A downsample that gives zeros, as ablations of shortcuts have it."""

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    def use(model: Any) -> Results:
        model.layer1[0].downsample = Zero()
        return train(model, 1) | {"y": model(photos()).detach()}

    WAY.check(small_basic, use)
