# SPDX-License-Identifier: BSD-3-Clause
"""U30: many forward passes of one picture in eval mode: occlusion, LIME, RISE; batch 1."""

from __future__ import annotations

from typing import Any

import torch
from twins import Results, image
from ways import Way, photos, small_basic, small_bottleneck, state

WAY = Way("U30", "deployment")


def occlusion(model: Any) -> Results:
    """Zeiler & Fergus 2014: the answer with each patch of the picture greyed out."""
    x = photos()[:1]
    pictures = x.repeat(9, 1, 1, 1)
    for i in range(9):
        row, column = divmod(i, 3)
        pictures[i, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 0
    with torch.inference_mode():
        scores = model.eval()(pictures)[:, 1]
    return {"scores": scores.clone()} | state(model)


def lime(model: Any) -> Results:
    """Ribeiro et al. 2016: a linear model of the answers to pictures with parts switched off."""
    on = (image(24, 9, seed=21) > 0).double()
    masks = on.view(24, 1, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    with torch.no_grad():
        scores = model.eval()(photos()[:1] * masks)[:, 4]
    ridge = on.T @ on + torch.eye(9, dtype=torch.float64)
    return {"importance": torch.linalg.solve(ridge, on.T @ scores)}


def rise(model: Any) -> Results:
    """Petsiuk et al. 2018: masks averaged by the answers, picture by picture (batch 1)."""
    masks = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    masks = torch.nn.functional.interpolate(masks, size=(48, 48), mode="bilinear")
    model.eval().requires_grad_(False)
    total = sum(model(photos()[1:2] * mask)[0, 0] * mask for mask in masks)
    return {"saliency": total}


def test_occlusion() -> None:
    WAY.check(small_bottleneck, occlusion)


def test_lime() -> None:
    WAY.check(small_basic, lime)


def test_rise() -> None:
    WAY.check(small_bottleneck, rise)
