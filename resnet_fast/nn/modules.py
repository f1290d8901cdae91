# SPDX-License-Identifier: BSD-3-Clause
"""AddReLU and ConvBNAct2d: modules over the fused ops, with ordinary PyTorch modules inside."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.common_types import _size_2_t
from torch.nn.modules.utils import _pair

from resnet_fast import blocks, functional, reference


class AddReLU(nn.Module):
    """relu(x + residual), bitwise what PyTorch computes, in one pass. No parameters."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual: of one shape and dtype, or such as PyTorch broadcasts and promotes.

        Returns a new tensor. For the backward one bit an element is kept.
        """
        if isinstance(x, fx.Proxy) or isinstance(residual, fx.Proxy):
            return reference.add_relu(x, residual)  # symbolic tracing sees + and relu
        return functional.add_relu(x, residual)


class ConvBNAct2d(nn.Module):
    """A convolution without bias, a batch norm, an optional residual sum and an activation.

    in_channels, out_channels, kernel_size, stride, dilation, groups: as in nn.Conv2d. padding: as
    in nn.Conv2d; None (default) is (kernel_size - 1) // 2 * dilation, which keeps the size at
    stride 1 for an odd kernel. eps, momentum: as in nn.BatchNorm2d. activation: "relu" (default) or
    None. device, dtype: of the parameters.

    The submodules are an nn.Conv2d, ``conv``, and an nn.BatchNorm2d, ``bn``, called or stood in for
    as in blocks.bn_act: hooks on them work, other modules may take their place. Raises ValueError
    for another activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t | str | None = None,
        dilation: _size_2_t = 1,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("relu", None):
            raise ValueError(f'activation must be "relu" or None; got {activation!r}')
        if padding is None:
            (kh, kw), (dh, dw) = _pair(kernel_size), _pair(dilation)
            padding = ((kh - 1) // 2 * dh, (kw - 1) // 2 * dw)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, in_channels, H, W). residual: of the result's shape (N, out_channels, H', W')."""
        out = blocks.convolve_alone(self.conv, x)
        return blocks.bn_act(self.bn, out, residual=residual, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
