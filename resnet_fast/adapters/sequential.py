# SPDX-License-Identifier: BSD-3-Clause
"""nn.Sequential: each batch norm that a ReLU follows is one op with it.

So are torchvision's Conv2dNormActivation and every other subclass that leaves the forward alone:
deep stems, decoders, heads, people's own plain networks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import pairwise
from typing import Any

from torch import fx, nn

from resnet_fast import blocks, graphs
from resnet_fast._ready import legacy_hook, plain_context, plain_norm, plain_tensor
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


def children_in_turn(
    items: Iterable[tuple[str, nn.Module]], wanted: Container[str], x: Any
) -> Iterator[tuple[str, Any]]:
    """(name, value) of each child of a getter of feature maps, run one after the other.

    A norm that is not `wanted` is one op with the ReLU after it, and has no value of its own.
    """
    left = iter(items)
    for name, module in left:
        if name in wanted or not (plain_tensor(x) and plain_norm(module)):
            x = blocks.stem_pool(module, x)
            yield name, x
            continue
        after, act = next(left, ("", None))
        if type(act) is nn.ReLU:
            x = blocks.norm_relu(module, act, x)
        else:
            x = module(x)
            x = x if act is None else act(x)
        yield after, x


def idle(module: nn.Module) -> str:
    """Why a module that runs its children in their order stays as it is."""
    children = list(module._modules.values())
    for bn, act in pairwise(children):
        if plain_norm(bn) and type(act) is nn.ReLU:
            return ""
    return "no batch norm in it comes directly before a ReLU"


register_adapter(nn.Sequential, Sequential, idle=idle)
