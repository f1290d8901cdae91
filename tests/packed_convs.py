# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the convolutions with packed weights share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layouts
import oracle
import pytest
import torch
from torch import Tensor

OPS = torch.ops.resnet_fast


def rows(*shape: int) -> Tensor:
    return layouts.channels_last(torch.randn(shape))


def finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = y if residual is None else y + residual.to(y.dtype)
    return y.relu() if relu else y


def check(
    ours: Tensor,
    conv: Callable[[torch.dtype], Tensor],
    magnitude: Tensor,
    residual: Tensor | None,
    relu: bool,
    context: object = "",
) -> None:
    """The rule, and that ours is dense channels-last. conv: PyTorch's, with bias, in a dtype."""
    eager, exact = (finished(conv(d), residual, relu) for d in (torch.float32, torch.float64))
    oracle.check("y", ours, eager, exact, magnitude=magnitude, channel=1, context=context)
    dense = torch.empty(ours.shape, memory_format=torch.channels_last)
    assert ours.stride() == dense.stride()


def check_bits(op: Callable[..., Tensor], x: Tensor, *rest: Any) -> None:
    """One thread and two, x in rows, contiguous or with gaps: the same bits. Begins with two."""
    two = op(x, *rest)
    assert torch.equal(op(x.contiguous(), *rest), two)
    assert torch.equal(op(x.repeat(1, 1, 1, 2)[..., : x.size(3)], *rest), two)
    torch.set_num_threads(1)
    assert torch.equal(op(x, *rest), two)
    torch.set_num_threads(2)


def check_refusals(
    op: Callable[..., Any], good: dict[str, Any], wrong: list[tuple[dict[str, Any], str]]
) -> None:
    """Each of the wrong arguments, in place of the good ones, raises the error that names it."""
    op(*good.values())
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*(good | changes).values())
