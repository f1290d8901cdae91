# SPDX-License-Identifier: BSD-3-Clause
"""timm's features_only: the stem of a ResNet lies in the getter itself, its blocks below it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models._features import FeatureDictNet as Original

from resnet_fast._ready import fell_back, legacy_hook, plain_context, why_not_context, why_not_owner
from resnet_fast.adapters import register_adapter, replaced, sequential

_COLLECT = Original._collect


class FeatureDictNet(Original):  # type: ignore[misc]
    """timm's FeatureDictNet with norm and ReLU fused, where nobody asks for the norm."""

    _resnet_fast_norms = ()

    def _collect(self, x: Any) -> Any:
        if not plain_context(x) or legacy_hook(self):
            fell_back(type(self).__name__, x, why_not_context(x) or why_not_owner(self))
            return super()._collect(x)
        if self.grad_checkpointing or replaced(self, x, "_collect", _COLLECT):
            return super()._collect(x)  # checkpoints are set between its children
        wanted = self.return_layers
        out: OrderedDict[str, Any] = OrderedDict()
        for name, y in sequential.children_in_turn(self.items(), wanted, x):
            if name not in wanted:
                continue
            if isinstance(y, tuple | list):
                y = torch.cat(list(y), 1) if self.concat else y[0]
            out[wanted[name]] = y
        return out


register_adapter(Original, FeatureDictNet, "_collect", idle=sequential.idle)
