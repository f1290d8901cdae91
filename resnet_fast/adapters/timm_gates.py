# SPDX-License-Identifier: BSD-3-Clause
"""timm's channel attention (SE, effective SE, ECA, circular ECA) and stochastic depth as scales.

Each function runs the submodules as the module's forward does, and leaves out its last product.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.eca import CecaModule, EcaModule
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from torch import Tensor, nn

from resnet_fast._ready import plain_module
from resnet_fast.gates import register_gate

_DROP_PATH_FORWARD = DropPath.forward


def _squeeze(se: Any, x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return 0.5 * mean + 0.5 * x.amax((2, 3), keepdim=True) if se.add_maxpool else mean


def squeeze_excite(se: Any, x: Tensor) -> Tensor:
    """The gate of SEModule: x (N, C, H, W) to (N, C, 1, 1)."""
    return cast(Tensor, se.gate(se.fc2(se.act(se.bn(se.fc1(_squeeze(se, x)))))))


def effective_squeeze_excite(se: Any, x: Tensor) -> Tensor:
    """The gate of EffectiveSEModule."""
    return cast(Tensor, se.gate(se.fc(_squeeze(se, x))))


def _over_channels(x: Tensor) -> Tensor:
    return x.mean((2, 3)).view(x.shape[0], 1, -1)


def eca(module: Any, x: Tensor) -> Tensor:
    """The gate of EcaModule."""
    y = module.conv(_over_channels(x))
    if module.conv2 is not None:
        y = module.conv2(module.act(y))
    return cast(Tensor, module.gate(y).view(x.shape[0], -1, 1, 1))


def circular_eca(module: Any, x: Tensor) -> Tensor:
    """The gate of CecaModule."""
    y = F.pad(_over_channels(x), (module.padding, module.padding), mode="circular")
    return cast(Tensor, module.gate(module.conv(y)).view(x.shape[0], -1, 1, 1))


def drop_path(module: Any, x: Tensor) -> Tensor:
    """What DropPath multiplies each image with: the same random numbers, of the same generator."""
    factors: Tensor = module(x.new_ones((x.shape[0], *[1] * (x.dim() - 1))))
    return factors.expand(*x.shape[:2], *[1] * (x.dim() - 2))


def idle(gate: nn.Module) -> bool:
    """True for a plain DropPath that hands on what it is given."""
    return (
        plain_module(gate, DropPath)
        and DropPath.forward is _DROP_PATH_FORWARD
        and (not gate.training or bool(gate.drop_prob == 0.0))
    )


register_gate(SEModule, squeeze_excite)
register_gate(EffectiveSEModule, effective_squeeze_excite)
register_gate(EcaModule, eca)
register_gate(CecaModule, circular_eca)
register_gate(DropPath, drop_path)
