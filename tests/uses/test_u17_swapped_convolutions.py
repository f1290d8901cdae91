# SPDX-License-Identifier: BSD-3-Clause
"""U17: another module in the place of a convolution: the rest of the block stays fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Results
from ways import Way, small_basic, small_bottleneck, train

WAY = Way("U17", "convs swapped")


def each_conv(model: nn.Module, change: Any) -> None:
    """Put change(conv) in the place of every 3x3 convolution of the blocks."""
    for m in list(model.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                setattr(m, name, change(child))


class LoRA(nn.Module):
    """A frozen convolution with a low-rank branch beside it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(
            conv.in_channels, 2, 3, conv.stride, conv.padding, bias=False
        ).double()
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.up(self.down(x))
        return out


def tucker(conv: nn.Conv2d) -> nn.Module:
    """Tucker-2 (Kim et al. 2016): 1x1, small 3x3, 1x1, by the SVDs of the two unfoldings."""
    w = conv.weight.detach()
    rank_out, rank_in = w.shape[0] // 2, w.shape[1] // 2
    u = torch.linalg.svd(w.flatten(1), full_matrices=False)[0][:, :rank_out]
    v = torch.linalg.svd(w.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank_in]
    core = torch.einsum("oikl,or,is->rskl", w, u, v)
    parts = nn.Sequential(
        nn.Conv2d(w.shape[1], rank_in, 1, bias=False),
        nn.Conv2d(rank_in, rank_out, 3, conv.stride, conv.padding, bias=False),
        nn.Conv2d(rank_out, w.shape[0], 1, bias=False),
    ).double()
    with torch.no_grad():
        parts[0].weight.copy_(v.T[:, :, None, None])
        parts[1].weight.copy_(core)
        parts[2].weight.copy_(u[:, :, None, None])
    return parts


class BCos(nn.Module):
    """A B-cos layer (Boehle et al. 2022): the conv times the cosine between patch and weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        ones = torch.ones_like(self.conv.weight[:1, :1]).expand(1, x.shape[1], -1, -1)
        size = F.conv2d(x.square(), ones, None, self.conv.stride, self.conv.padding)
        norm = self.conv.weight.flatten(1).norm(dim=1).view(1, -1, 1, 1)
        return out * (out / (norm * (size + 1e-6).sqrt())).abs()


class Ternary(nn.Module):
    """A quantised convolution: weights -s, 0 or s, a straight-through gradient."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        scale = w.detach().abs().mean()
        hard = scale * (w.detach() / scale).round().clamp(-1, 1)
        w = w + (hard - w.detach())
        return F.conv2d(x, w, None, self.conv.stride, self.conv.padding)


def swapped(change: Any) -> Any:
    def use(model: Any) -> Results:
        torch.manual_seed(6)
        each_conv(model, change)
        return train(model, steps=2)

    return use


def test_lora() -> None:
    WAY.check(small_basic, swapped(LoRA))


def test_tucker() -> None:
    # The factors of an SVD are taken of the same weights on each side: the same factors.
    def use(model: Any) -> Results:
        each_conv(model.layer1, tucker)
        each_conv(model.layer2, tucker)
        return train(model, steps=2)

    WAY.check(small_bottleneck, use)


def test_b_cos() -> None:
    WAY.check(small_basic, swapped(BCos))


def test_quantised() -> None:
    WAY.check(small_basic, swapped(Ternary))
