# SPDX-License-Identifier: BSD-3-Clause
"""Segmentation and detection models of torchvision's after accelerate: equal steps, nothing left
plain but what explain() lists. segmentation_models_pytorch's are in test_segmentation_models.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import shims
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from twins import Results, assert_same, image, randomise, reasons, step, twin

import resnet_fast as rf
from resnet_fast import dispatch

tv = shims.torchvision_or_skip()

from torchvision.models.detection import backbone_utils, retinanet  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402

X = image(2, 3, 64, 64)


class Head(nn.Module):
    """All the tensors that a model gives in a dictionary, joined."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(1) for y in self.model(x).values()], 1)


def left_plain(theirs: nn.Module, ours: nn.Module, *inputs: Any) -> int:
    """How many batch norms run in a forward of a model, but not fused in its accelerated twin's."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    theirs, ours = twin(theirs), twin(ours)  # running statistics move
    for m in theirs.modules():
        if isinstance(m, _BatchNorm | FrozenBatchNorm2d):
            m.register_forward_hook(count)
    theirs(*inputs)
    with dispatch.recording() as events:
        ours(*inputs)
    return calls - sum(e.op == "batch_norm_act" and e.impl != "reference" for e in events)


def check(model: nn.Module, left: int = 0) -> None:
    """The same step; all norms fused but `left`, which are listed; and restored as it was."""
    theirs = Head(randomise(model))
    ours = rf.accelerate(twin(theirs))
    for module in (theirs, ours):
        for m in module.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), rtol=1e-7))
    if rf.is_available():
        assert left_plain(theirs, ours, X) == left
        listed = [row for row in rf.explain(ours, X).rows if row.reason]
        assert len(listed) == left
    ours, theirs = ours.eval(), theirs.eval()
    with torch.no_grad():
        assert_same({"y": ours(X)}, {"y": theirs(X)}, rtol=1e-7)
    assert [type(m) for m in rf.restore(ours).modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.parametrize(
    ("name", "left"),
    [pytest.param("fcn_resnet50", 0, marks=pytest.mark.slow), ("deeplabv3_resnet50", 1)],
)
def test_segmentation(name: str, left: int) -> None:
    """Of DeepLab the pooling branch is a Sequential with a forward of its own."""
    build = getattr(tv.models.segmentation, name)
    check(build(weights=None, weights_backbone=None, num_classes=3, aux_loss=True), left)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detection_backbones(name: str, norm: Any) -> None:
    check(
        backbone_utils.resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=norm, trainable_layers=2
        )
    )


def test_a_detector_in_training() -> None:
    """RetinaNet: the losses of two pictures with boxes, and every gradient."""
    backbone = backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5)
    torch.manual_seed(0)
    theirs = randomise(
        retinanet.RetinaNet(backbone, 3, anchor_generator=anchors, min_size=64, max_size=64)
    )
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 60.0]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)]

    def losses(model: Any) -> Results:
        found = model(list(X), targets)
        sum(found.values()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {name: loss.detach() for name, loss in found.items()} | grads

    ours = rf.accelerate(twin(theirs))
    assert not reasons(lambda: assert_same(losses(ours), losses(theirs), rtol=1e-7))
    if rf.is_available():
        assert left_plain(theirs, ours, list(X), targets) == 0


def test_explain_lists_what_is_not_accelerated() -> None:
    model = rf.accelerate(
        tv.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    ).eval()
    rows = rf.explain(model, X.float()).rows
    # MobileNetV3's blocks end in a norm without ReLU and have hard-swish before it.
    assert any("no batch norm in it comes directly before a ReLU" in row.reason for row in rows)
    plain = rf.explain(rf.restore(model)).rows
    assert plain
    assert all(row.implementation == "reference" and row.reason for row in plain)


class OwnForward(tv.models.ResNet):  # type: ignore[misc]
    """An encoder whose forward runs the stem by itself, as many libraries' do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))


def test_explain_says_that_a_stem_is_never_reached() -> None:
    model = rf.accelerate(OwnForward(tv.models.resnet.BasicBlock, [1, 1, 1, 1]).eval())
    rows = {row.module: row for row in rf.explain(model, X.float()).rows if row.op == "block"}
    assert rows[""].implementation == "reference"
    assert rows[""].reason == "its forward does not run _forward_impl, which is what is fused"
    assert rows["layer3.0"].implementation == "not run"
