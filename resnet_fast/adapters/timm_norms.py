# SPDX-License-Identifier: BSD-3-Clause
"""timm's BatchNormAct2d, a batch norm with its activation inside: what timm's ResNetV2 is made of.

One op where the activation is a ReLU or none; before any other one the norm alone is.
"""

from __future__ import annotations

from typing import cast

from timm.layers.norm_act import BatchNormAct2d as Original
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from resnet_fast import norms
from resnet_fast._ready import (
    fell_back,
    plain_context,
    plain_module,
    plain_state,
    why_not_context,
    why_not_state,
)
from resnet_fast.adapters import register_adapter, replaced

_FORWARD = Original.forward


@register_notrace_module  # type: ignore[untyped-decorator, unused-ignore]
class BatchNormAct2d(Original):  # type: ignore[misc]
    """timm's BatchNormAct2d, fused."""

    _resnet_fast_norms = ()

    def forward(self, x: Tensor) -> Tensor:
        state = plain_state(self) if plain_context(x) else None
        if state is None or replaced(self, x, "forward", _FORWARD):
            fell_back("batch_norm_act", x, why_not_context(x) or why_not_state("the norm", self))
            return cast(Tensor, super().forward(x))
        if plain_module(self.drop, nn.Identity):
            if plain_module(self.act, nn.ReLU):
                return norms.batch_norm(self, state, x, None, "relu")
            return cast(Tensor, self.act(norms.batch_norm(self, state, x, None, None)))
        return cast(Tensor, self.act(self.drop(norms.batch_norm(self, state, x, None, None))))


register_adapter(Original, BatchNormAct2d)
