# SPDX-License-Identifier: BSD-3-Clause
"""Stand-alone blocks for people's own networks."""

from resnet_fast.nn.modules import AddReLU, ConvBNAct2d

__all__ = ["AddReLU", "ConvBNAct2d"]
