# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-50's batch-norm layers, and the bytes an op must move in training (forward + backward).

With n elements of s bytes, every tensor read or written once per pass over memory:

====================  =========================================================  ===============
op, scheme            passes                                                     bytes
====================  =========================================================  ===============
bn, both              forward: read x | read x, write y                          8ns
                      backward: read g, x | read g, x, write dx
bn_relu, ours         as bn: the mask is recomputed from x                       8ns
bn_relu, eager        bn, ReLU in place (2ns), its backward read g, y, write     13ns
bn_add_relu, ours     forward: read x | read x, r, write y, mask                 10ns + n/4
                      backward: read g, x, mask, write dr | read dr, x, write dx
bn_add_relu, eager    as bn_relu, and the add in place (3ns; no backward)        16ns
add_relu, ours        read x, r, write y, mask | read g, mask, write dx          5ns + n/4
add_relu, eager       read x, r, write y | ReLU in place | read g, y, write dx   8ns
gated_add_relu, ours  read x, r, write y, mask | read g, x, mask, write dx, dr   7ns + n/4
gated_add_relu,       read x, write z | read z, r, write z | ReLU in place       16ns
eager                 read g, y, write dr | read dr, write dx |
                      read dr, x, write their product | read it
====================  =========================================================  ===============

These are the least each scheme can do, so a share of copy bandwidth computed from them is a lower
bound of the bandwidth in fact used. Per-channel vectors are left out (below 0.1 %).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

import resnet_fast as rf

OPS = ("bn", "bn_relu", "bn_add_relu", "add_relu", "gated_add_relu")


class Layer(NamedTuple):
    """One op on one shape (N, C, H, W), and how often the network has it."""

    op: str
    shape: tuple[int, int, int, int]
    count: int

    @property
    def numel(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w


def bytes_moved(op: str, numel: int, itemsize: int, scheme: str) -> int:
    """Least bytes of ``op`` forward + backward in training; scheme is "ours" or "eager"."""
    words = {
        ("bn", "ours"): 8,
        ("bn", "eager"): 8,
        ("bn_relu", "ours"): 8,
        ("bn_relu", "eager"): 13,
        ("bn_add_relu", "ours"): 10,
        ("bn_add_relu", "eager"): 16,
        ("add_relu", "ours"): 5,
        ("add_relu", "eager"): 8,
        ("gated_add_relu", "ours"): 7,
        ("gated_add_relu", "eager"): 16,
    }[op, scheme]
    has_mask = scheme == "ours" and op.endswith("add_relu")
    return words * numel * itemsize + (numel // 4 if has_mask else 0)


def _op_of(name: str) -> str:
    """What follows the batch norm called ``name`` in a Bottleneck network."""
    if name.endswith("downsample.1"):
        return "bn"
    return "bn_add_relu" if name.endswith("bn3") else "bn_relu"


def resnet50_layers(batch: int, size: int = 224) -> list[Layer]:
    """The distinct batch-norm layers of ResNet-50 for (batch, 3, size, size), in network order.

    Found by running the network on the meta device, so the list cannot drift from the model.
    """
    shapes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    with torch.device("meta"):
        model = rf.models.resnet50()
        image = torch.empty(batch, 3, size, size)

    def note(name: str) -> object:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            shapes[_op_of(name), tuple(args[0].shape)] += 1

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note(name))
    with rf.use_backend("reference"):  # shapes alone, and RESNET_FAST_REQUIRE may be set
        model(image)
    return [Layer(op, shape, count) for (op, shape), count in shapes.items()]


def add_relu_layers(layers: list[Layer], op: str = "add_relu") -> list[Layer]:
    """The residual joins as ``add_relu`` alone, as a network without batch norm there has them.

    op: or as "gated_add_relu", as they are behind channel attention (SE-ResNet-50, ECA-ResNet-50),
    whose gate multiplies each image and channel.
    """
    return [Layer(op, layer.shape, layer.count) for layer in layers if layer.op == "bn_add_relu"]
