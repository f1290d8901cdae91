# SPDX-License-Identifier: BSD-3-Clause
"""U27: autocast with and without GradScaler, .half(), .bfloat16(), float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Results
from ways import Way, assert_path, digits, fast_twin, gradients, make, small_basic, tv

from resnet_fast import dispatch

WAY = Way("U27", "mixed precision")


def autocast(dtype: torch.dtype, scaled: bool) -> Callable[[Any], Results]:
    """A float32 model under autocast; with a scaler as one trains in float16."""

    def use(model: Any) -> Results:
        images, labels = digits(8)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        with torch.autocast("cpu", dtype):
            y = model(images.float())
            loss = F.cross_entropy(y.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return {"y": y.detach()} | gradients(model)

    return use


def cast(dtype: torch.dtype) -> Callable[[Any], Results]:
    """The whole model in one dtype."""

    def use(model: Any) -> Results:
        images, labels = digits(8)
        model.to(dtype)
        y = model(images.to(dtype))
        F.cross_entropy(y.float(), labels).backward()
        return {"y": y.detach()} | gradients(model)

    return use


USES = {
    "autocast bfloat16": autocast(torch.bfloat16, False),
    "autocast float16": autocast(torch.float16, True),
    "bfloat16": cast(torch.bfloat16),
    "half": cast(torch.float16),
    "float32": cast(torch.float32),
}


def distance(got: Results, truth: Results) -> tuple[float, float]:
    """Of the answers and of all gradients together: |got - truth| / |truth|."""

    def flat(results: Results) -> Tensor:
        return torch.cat([t.double().flatten() for name, t in results.items() if name != "y"])

    y, exact = got["y"].double(), truth["y"].double()
    return (
        float((y - exact).norm() / exact.norm()),
        float((flat(got) - flat(truth)).norm() / flat(truth).norm()),
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "autocast float16" else n for n in USES],
)
def test_as_near_to_float64_as_plain_pytorch(name: str) -> None:
    """The rule of oracle.py on whole models: our error at most twice that of the untouched one."""
    untouched = make(small_basic, tv).float()
    truth = cast(torch.float64)(copy.deepcopy(untouched))
    eager = USES[name](copy.deepcopy(untouched))
    for library in ("torchvision", "ours"):
        model = fast_twin(library, small_basic, untouched).float()
        with dispatch.recording() as events:
            got = USES[name](model)
        assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in eager.items()}
        for error, baseline in zip(distance(got, truth), distance(eager, truth), strict=True):
            assert error <= 2 * baseline + torch.finfo(torch.float32).eps
        assert_path(events)


def test_norms_kept_in_float32() -> None:
    """A half model with float32 norms, as people keep them: half in, half out."""

    def use(model: Any) -> Results:
        model.to(torch.bfloat16)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()
        return {"y": model.eval()(digits(8)[0].bfloat16()).detach()}

    WAY.check(small_basic, use, rtol=0.05)
