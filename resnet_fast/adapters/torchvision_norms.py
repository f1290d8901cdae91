# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's FrozenBatchNorm2d, the norm of its detection backbones: fused within blocks."""

from __future__ import annotations

from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_fast._ready import register_frozen_norm

register_frozen_norm(FrozenBatchNorm2d)
