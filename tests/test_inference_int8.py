# SPDX-License-Identifier: BSD-3-Clause
"""dtype="int8": quantised by torchao, calibrated on a loader, judged against float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inference_cases import image, lively

import resnet_fast as rf

X = image(4, 3, 32, 32)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    pytest.importorskip("torchao")
    model = lively(rf.models.resnet20())
    loader = [(X, torch.zeros(4)), (image(4, 3, 32, 32, seed=5), torch.zeros(4))]
    return model, rf.optimize_for_inference(model, X, dtype="int8", calibration=loader)


def test_every_conv_is_quantised_and_the_drop_is_said(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    rows = [row for row in rf.explain(fast).rows if "conv" in row.step]
    assert len(rows) == 19  # of the stem and nine blocks; CIFAR's shortcuts have none
    assert {row.implementation for row in rows} == {"oneDNN int8"}
    assert fast.agreement.images == 8
    assert 0 < fast.agreement.error < 0.25
    assert 0 <= fast.agreement.top1 <= 1


def test_int8_answers(pair: tuple[Any, Any]) -> None:
    """The compiled graph gives what the quantised graph was judged by."""
    model, fast = pair
    y = fast(X)
    right = model.eval()(X)
    assert y.dtype is torch.float32
    assert float((y - right).norm() / right.norm()) < 2 * fast.agreement.error + 0.02
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="refresh"):
        fast(X)


def test_bad_calibration() -> None:
    pytest.importorskip("torchao")
    model = rf.models.resnet20()
    with pytest.raises(ValueError, match="calibration"):
        rf.optimize_for_inference(model, X, dtype="int8")
    with pytest.raises(ValueError, match="calibration"):
        rf.optimize_for_inference(model, X, calibration=[X])
    with pytest.raises(TypeError, match="only once"):
        rf.optimize_for_inference(model, X, dtype="int8", calibration=iter([X]))
    with pytest.raises(ValueError, match="no images"):
        rf.optimize_for_inference(model, X, dtype="int8", calibration=[])
    with pytest.raises(TypeError, match="calibration must give"):
        rf.optimize_for_inference(model, X, dtype="int8", calibration=["x"])
