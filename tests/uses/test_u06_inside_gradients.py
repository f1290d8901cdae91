# SPDX-License-Identifier: BSD-3-Clause
"""U06: Grad-CAM and the like: gradients at intermediate maps by every means PyTorch has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from twins import Results
from ways import Way, photos, small_basic, small_bottleneck

WAY = Way("U06", "gradients of the inside")


def cam(maps: Tensor, grad: Tensor) -> Tensor:
    """Selvaraju et al. 2017: the maps weighted by their mean gradients, positive part."""
    return F.relu((grad.mean((2, 3), keepdim=True) * maps).sum(1))


def by_module_hooks(model: Any) -> Results:
    """Forward hook and full backward hook on the last layer's block."""
    kept: dict[str, Tensor] = {}
    block = model.layer4[-1]
    block.register_forward_hook(lambda _, __, out: kept.update(maps=out.detach()))
    block.register_full_backward_hook(lambda _, __, out: kept.update(grad=out[0].detach()))
    model.eval()(photos())[:, 3].sum().backward()
    return {"cam": cam(kept["maps"], kept["grad"])} | kept


def by_tensor_hooks(model: Any) -> Results:
    """Hooks on the very tensors that pass between the layers."""
    kept: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            kept[name] = out.detach()
            out.register_hook(lambda grad: kept.update({f"{name}.grad": grad.detach()}))

        return hook

    for i in range(1, 5):
        getattr(model, f"layer{i}").register_forward_hook(watch(f"layer{i}"))
    model.eval()(photos())[:, 3].sum().backward()
    for i in range(1, 5):
        kept[f"cam{i}"] = cam(kept[f"layer{i}"], kept[f"layer{i}.grad"])
    return kept


def by_retain_grad(model: Any) -> Results:
    """Stage by stage, retain_grad on each map, gradients of the training mode as well."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(photos()))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        x.retain_grad()
        maps.append(x)
    model.fc(torch.flatten(model.avgpool(x), 1))[:, 5].sum().backward()
    return {f"{i}": m.grad for i, m in enumerate(maps)}


def test_by_module_hooks() -> None:
    WAY.check(small_basic, by_module_hooks)


def test_by_tensor_hooks() -> None:
    WAY.check(small_bottleneck, by_tensor_hooks)


def test_by_retain_grad() -> None:
    WAY.check(small_bottleneck, by_retain_grad)
