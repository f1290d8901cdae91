# SPDX-License-Identifier: BSD-3-Clause
"""segmentation_models_pytorch: its ResNet encoders and decoders after accelerate, and restored."""

from __future__ import annotations

from typing import Any

import pytest
import shims
import torch
from test_dense_prediction import X, left_plain
from twins import assert_same, randomise, reasons, step, twin

import resnet_fast as rf

smp = shims.segmentation_models_or_skip()

SLOW = {"UnetPlusPlus", "MAnet", "PSPNet", "resnext50_32x4d"}
DECODERS, ENCODERS = (
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names.split()]
    for names in (
        "Unet UnetPlusPlus FPN Linknet MAnet PSPNet DeepLabV3Plus",
        "resnet50 resnext50_32x4d tu-resnet18 tu-seresnet18",
    )
)


def make(decoder: str, encoder: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(smp, decoder)(encoder, encoder_weights=None, classes=2, **kwargs)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout | torch.nn.Dropout2d):
            m.p = 0.0
    return randomise(model)


def check(theirs: Any, left: int = 0) -> Any:
    """The same step; all norms that run are fused but `left`, which are listed; and restored."""
    ours = rf.accelerate(twin(theirs))
    # Linknet has biases before norms: their gradient is zero but for the rounding of its terms.
    same = {"rtol": 1e-7, "floor": 1e-10}
    assert not reasons(lambda: assert_same(step(ours, X), step(theirs, X), **same))
    listed = [row for row in rf.explain(ours, X).rows if row.reason]
    if rf.is_available():
        assert left_plain(theirs, ours, X) == left
        assert bool(listed) == bool(left)
    with torch.no_grad():
        assert_same({"y": ours.eval()(X)}, {"y": theirs.eval()(X)}, rtol=1e-7)
    assert [type(m) for m in rf.restore(ours).modules()] == [type(m) for m in theirs.modules()]
    return listed


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders(decoder: str) -> None:
    """DeepLab's pooling branch is a Sequential with a forward of its own."""
    check(make(decoder, "resnet18"), left=int("DeepLab" in decoder))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders(encoder: str) -> None:
    check(make("Unet", encoder))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_depth(depth: int) -> None:
    channels = (32, 32, 16, 16, 16)[:depth]
    check(make("Unet", "resnet18", encoder_depth=depth, decoder_channels=channels))


def test_the_forward_of_the_encoder_is_one_that_we_know() -> None:
    """Otherwise the stem would run plain (adapters/segmentation_models.py)."""
    encoder = rf.accelerate(make("Unet", "resnet18").encoder)
    assert rf.adapters.original_class(encoder) is type(make("Unet", "resnet18").encoder)
    assert "forward" in vars(type(encoder))


def test_a_replaced_forward_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from segmentation_models_pytorch.encoders.resnet import ResNetEncoder

    encoder = rf.accelerate(make("Unet", "resnet18").encoder)
    monkeypatch.setattr(ResNetEncoder, "forward", lambda self, x: [2 * x])
    assert torch.equal(encoder(X)[0], 2 * X)


def test_what_is_not_accelerated_is_listed() -> None:
    """An encoder of another family, in a decoder that is fused."""
    # Three norms in each of sixteen blocks, and those of four shortcuts.
    listed = check(make("Unet", "se_resnet50"), left=52)
    reason = "no adapter for segmentation_models_pytorch.encoders._senet.SEResNetBottleneck"
    assert sum(row.reason == reason for row in listed) == 16
