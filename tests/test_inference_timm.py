# SPDX-License-Identifier: BSD-3-Clause
"""optimize_for_inference over timm's ResNet family: numbers, and how many convs are folded."""

from __future__ import annotations

from typing import Any

import pytest
import shims
from inference_cases import agrees, image, lively
from torch import nn

import resnet_fast as rf
from resnet_fast.inference import cpu

timm: Any = shims.timm_or_skip()

X = image(2, 3, 64, 64)

# Arguments; how many batch norms stay, as they come before the conv they belong to (one a block and
# the last one); how many convs more are packed than there are nn.Conv2d (blur filters).
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet18": ({}, 0, 0),
    "resnet18 drop path": ({"drop_path_rate": 0.2, "drop_rate": 0.1}, 0, 0),
    "resnet18 output stride": ({"output_stride": 8}, 0, 0),
    "resnet18 features": ({"features_only": True}, 0, 0),
    "resnet50d": ({}, 0, 0),
    "resnext50_32x4d": ({}, 0, 0),
    "seresnet18": ({}, 0, 0),
    "ecaresnet26t": ({}, 0, 0),
    "resnetblur18": ({}, 0, 4),
    "resnetaa50d": ({}, 0, 0),
    "resnetv2_18": ({}, 9, 0),
}
# A second of each kind, in `make test-slow`.
SLOW = {
    "resnet18 drop path",
    "resnet18 output stride",
    "resnext50_32x4d",
    "resnetaa50d",
    "resnet50d",
    "ecaresnet26t",
    "resnetblur18",
}


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS]
)
def test_agrees_and_folds(name: str) -> None:
    options, left, more = MODELS[name]
    options = options if "features_only" in options else {**options, "num_classes": 7}
    model = lively(timm.create_model(name.split()[0], pretrained=False, **options)).eval()
    fast = rf.optimize_for_inference(model, X)
    assert fast.trace is not None, str(rf.explain(fast))
    packed = [row for row in rf.explain(fast).rows if row.implementation in cpu.FAST]
    assert len(packed) == count(model, nn.Conv2d) + more
    assert sum(row.step.count("bn") for row in packed) == count(model, nn.BatchNorm2d) - left
    agrees(fast, model, X)
    agrees(fast, model, image(3, 3, 96, 64, seed=4))
