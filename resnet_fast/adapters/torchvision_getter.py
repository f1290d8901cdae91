# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's IntermediateLayerGetter: the stem of its segmentation and detection backbones.

It runs a model's children one after the other. The blocks among them are accelerated on their own;
the norm and the ReLU of the stem lie in the getter itself.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, fx
from torchvision.models._utils import IntermediateLayerGetter as Original

from resnet_fast import graphs
from resnet_fast._ready import legacy_hook, plain_context
from resnet_fast.adapters import register_adapter, replaced, sequential

_FORWARD = Original.forward


class IntermediateLayerGetter(Original):  # type: ignore[misc]
    """torchvision's IntermediateLayerGetter, its stem fused where nobody asks for the norm."""

    _resnet_fast_norms = ()

    def forward(self, x: Any) -> Any:
        if not plain_context(x) or legacy_hook(self) or replaced(self, x, "forward", _FORWARD):
            if isinstance(x, fx.Proxy):
                graphs.traced(x)
            return super().forward(x)
        wanted = self.return_layers
        out: OrderedDict[str, Tensor] = OrderedDict()
        for name, y in sequential.children_in_turn(self.items(), wanted, x):
            if name in wanted:
                out[wanted[name]] = y
        return out


register_adapter(Original, IntermediateLayerGetter, idle=sequential.idle)
