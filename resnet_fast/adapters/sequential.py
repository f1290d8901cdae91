# SPDX-License-Identifier: BSD-3-Clause
"""nn.Sequential: each batch norm that a ReLU follows is one op with it.

So are torchvision's Conv2dNormActivation and every other subclass that leaves the forward alone:
deep stems, decoders, heads, people's own plain networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import fx, nn

from resnet_fast import blocks, graphs
from resnet_fast._ready import legacy_hook, plain_context, plain_norm
from resnet_fast.adapters import register_adapter, replaced

_FORWARD = nn.Sequential.forward


class Sequential(nn.Sequential):
    """nn.Sequential with its runs of norm and ReLU fused."""

    _resnet_fast_norms = ()

    def forward(self, input: Any) -> Any:
        if (
            not plain_context(input)
            or legacy_hook(self)
            or replaced(self, input, "forward", _FORWARD)
        ):
            if isinstance(input, fx.Proxy):
                graphs.traced(input)
            return super().forward(input)
        return _run(iter(self._modules.values()), input)


def _run(modules: Iterator[nn.Module | None], x: Any) -> Any:
    """The modules one after the other, as nn.Sequential does it: each is looked up when its turn
    has come, for a hook on one may have changed a later one."""
    for module in modules:
        if not plain_norm(module):
            x = blocks.convolve(module, x)  # type: ignore[arg-type]
            continue
        following = next(modules, None)
        if type(following) is nn.ReLU:
            x = blocks.norm_relu(module, following, x)  # type: ignore[arg-type]
        else:
            x = module(x)  # type: ignore[misc]
            x = x if following is None else following(x)
    return x


def _idle(module: nn.Sequential) -> str:
    """Why a Sequential stays as it is."""
    children = list(module._modules.values())
    for bn, act in pairwise(children):
        if plain_norm(bn) and type(act) is nn.ReLU:
            return ""
    return "no batch norm in it comes directly before a ReLU"


register_adapter(nn.Sequential, Sequential, idle=_idle)
