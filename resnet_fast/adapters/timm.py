# SPDX-License-Identifier: BSD-3-Clause
"""timm's ResNet: all of resnet*, resnext*, wide_resnet*, seresnet*, ecaresnet*, their D variants.

Anti-aliasing, DropBlock and other activations are called as the modules they are; around them the
norms, and the sum with ReLU, are fused. So are the products of plain channel attention and
stochastic depth with the sum (timm_gates.py).
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import resnet as tm
from torch import Tensor, nn

from resnet_fast import blocks
from resnet_fast._ready import (
    fell_back,
    legacy_hook,
    plain_context,
    why_not_context,
    why_not_norm,
    why_not_owner,
)
from resnet_fast.adapters import register_adapter, replaced, timm_gates

_BASIC_FORWARD = tm.BasicBlock.forward
_BOTTLENECK_FORWARD = tm.Bottleneck.forward
_FORWARD_FEATURES = tm.ResNet.forward_features


def _ready(block: nn.Module, x: object) -> bool:
    """True if parts of block may be fused at all in this call; else the reason is recorded."""
    if plain_context(x) and not legacy_hook(block):
        return True
    fell_back(type(block).__name__, x, why_not_context(x) or why_not_owner(block))
    return False


def _why_not(block: nn.Module, norms: tuple[str, ...]) -> str:
    """For explain() without inputs: the first norm of a block that cannot be fused, and why."""
    reasons = (why_not_norm(name, getattr(block, name, None)) for name in norms)
    return next((reason for reason in reasons if reason), why_not_owner(block))


def _gates(block: Any) -> list[nn.Module]:
    """What comes between the last norm and the sum, and does something there."""
    return [
        gate
        for gate in (block.se, block.drop_path)
        if gate is not None and not timm_gates.idle(gate)
    ]


class BasicBlock(tm.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock, fused."""

    _resnet_fast_norms = blocks.BASIC

    def forward(self, x: Tensor) -> Tensor:
        if replaced(self, x, "forward", _BASIC_FORWARD) or not _ready(self, x):
            return cast(Tensor, super().forward(x))
        out = blocks.norm_act(self.bn1, self.act1, blocks.convolve(self.conv1, x), self.drop_block)
        out = blocks.convolve(self.conv2, self.aa(out))
        return blocks.gated_join(self, self.bn2, self.act2, out, x, _gates(self))

    def _resnet_fast_why_not(self) -> str:
        return _why_not(self, blocks.BASIC)


class Bottleneck(tm.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck, fused."""

    _resnet_fast_norms = blocks.BOTTLENECK

    def forward(self, x: Tensor) -> Tensor:
        if replaced(self, x, "forward", _BOTTLENECK_FORWARD) or not _ready(self, x):
            return cast(Tensor, super().forward(x))
        out = blocks.norm_act(self.bn1, self.act1, blocks.convolve(self.conv1, x))
        out = blocks.norm_act(
            self.bn2, self.act2, blocks.convolve(self.conv2, out), self.drop_block
        )
        out = blocks.convolve(self.conv3, self.aa(out))
        return blocks.gated_join(self, self.bn3, self.act3, out, x, _gates(self))

    def _resnet_fast_why_not(self) -> str:
        return _why_not(self, blocks.BOTTLENECK)


class ResNet(tm.ResNet):  # type: ignore[misc]
    """timm's ResNet with a fused stem; its blocks are accelerated on their own."""

    _resnet_fast_norms = blocks.STEM

    def forward_features(self, x: Tensor) -> Tensor:
        if replaced(self, x, "forward_features", _FORWARD_FEATURES) or not _ready(self, x):
            return cast(Tensor, super().forward_features(x))
        x = blocks.norm_act(self.bn1, self.act1, blocks.convolve(self.conv1, x))
        x = blocks.stem_pool(self.maxpool, x)
        layers = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            return cast(Tensor, tm.checkpoint_seq(layers, x, flatten=True))
        for layer in layers:
            x = layer(x)
        return x

    def _resnet_fast_why_not(self) -> str:
        return _why_not(self, blocks.STEM)


register_adapter(tm.BasicBlock, BasicBlock)
register_adapter(tm.Bottleneck, Bottleneck)
register_adapter(tm.ResNet, ResNet, "forward_features")
