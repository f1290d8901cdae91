# SPDX-License-Identifier: BSD-3-Clause
"""torch.library.opcheck on every raw operator, layout, dtype and optional argument.

It holds an operator to its schema (what is mutated, nothing aliased), its fake (shape, strides,
dtype) and to what aot_autograd makes of it. It says nothing about numbers. Where the extension is
not loaded it checks the plain implementation, which is then the registered one.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import word
from layouts import LAYOUTS, lay
from torch import Tensor

from resnet_fast import _plain

OPS = torch.ops.resnet_fast
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (2, 3, 4, 5),
    (3, 1, 2, 2),
    (2, 4, 1, 1),
    (4, 3),
    (2, 3, 5),
    (2, 3, 2, 3, 2),
    (1, 17, 3, 3),
)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(op: Any, args: tuple[Any, ...], *, traced: bool) -> None:
    """`traced` adds the check under aot_autograd with dynamic shapes, the slow one."""
    checks = (*CHECKS, "test_aot_dispatch_dynamic") if traced else CHECKS
    torch.library.opcheck(op.default, args, test_utils=checks)


def draw(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    return lay(torch.randn(shape).to(dtype), layout)


def is_traced(layout: str, dtype: torch.dtype) -> bool:
    return (layout, dtype) in (("contiguous", torch.float32), ("channels_last", torch.bfloat16))


# ---- add_relu ------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_add_relu_layouts(layout: str, dtype: torch.dtype) -> None:
    traced = is_traced(layout, dtype)
    x, residual, grad = (draw(SHAPES[0], layout, dtype) for _ in range(3))
    for save_mask in (True, False):
        opcheck(OPS.add_relu_forward, (x, residual, save_mask), traced=traced)
    opcheck(OPS.add_relu_inference, (x, residual), traced=traced)
    channels_last = layout == "channels_last"
    _, mask = OPS.add_relu_forward(x, residual, True)
    opcheck(OPS.add_relu_backward, (grad, mask, channels_last), traced=traced)


@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_add_relu_shapes(shape: tuple[int, ...], layout: str) -> None:
    x, residual, grad = (draw(shape, layout, torch.float32) for _ in range(3))
    traced = layout == "channels_last" and len(shape) > 3
    opcheck(OPS.add_relu_forward, (x, residual, True), traced=traced)
    _, mask = OPS.add_relu_forward(x, residual, True)
    channels_last = len(shape) > 3 and not x.is_contiguous()
    opcheck(OPS.add_relu_backward, (grad, mask, channels_last), traced=traced)


# ---- batch_norm_act ------------------------------------------------------------------------------
def forward_args(
    x: Tensor,
    *,
    param: torch.dtype | None = None,
    weight: bool = True,
    bias: bool = True,
    residual: str | None = None,
    running: bool = True,
    training: bool = True,
    relu: bool = True,
    save_mask: bool | None = None,
) -> tuple[Any, ...]:
    c = x.size(1)
    param = param or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (
        x,
        torch.randn(c).to(param) if weight else None,
        torch.randn(c).to(param) if bias else None,
        None if residual is None else draw(tuple(x.shape), residual, x.dtype),
        torch.zeros(c, dtype=param) if running else None,
        torch.ones(c, dtype=param) if running else None,
        training,
        0.1,
        1e-5,
        relu,
        residual is not None if save_mask is None else save_mask,
    )


def backward_args(
    forward: tuple[Any, ...], grad: Tensor, output_mask: tuple[bool, ...] = (True,) * 4
) -> tuple[Any, ...]:
    x, weight, bias, _, _, _, training, _, _, relu, save_mask = forward
    copies = [t.clone() if isinstance(t, Tensor) else t for t in forward[4:6]]
    _, mean, invstd, mask = OPS.batch_norm_act_forward(*forward[:4], *copies, *forward[6:])
    mask = mask if save_mask else None
    return grad, x, mean, invstd, weight, bias, mask, training, relu, list(output_mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "param"), [(d, None) for d in DTYPES] + [(torch.bfloat16,) * 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_batch_norm_act_layouts(layout: str, dtype, param, training: bool) -> None:
    traced = is_traced(layout, dtype)
    x, grad = (draw(SHAPES[0], layout, dtype) for _ in range(2))
    for residual in (None, layout):
        args = forward_args(x, param=param, residual=residual, training=training)
        opcheck(OPS.batch_norm_act_forward, args, traced=traced)
        opcheck(OPS.batch_norm_act_backward, backward_args(args, grad), traced=traced)
        if not training:
            opcheck(OPS.batch_norm_act_inference, (*args[:6], *args[8:10]), traced=traced)


@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_act_shapes(shape: tuple[int, ...], layout: str) -> None:
    x, grad = (draw(shape, layout, torch.float32) for _ in range(2))
    args = forward_args(x, residual="contiguous")
    traced = layout == "channels_last" and len(shape) > 3
    opcheck(OPS.batch_norm_act_forward, args, traced=traced)
    opcheck(OPS.batch_norm_act_backward, backward_args(args, grad), traced=traced)


OPTIONS = [
    {"weight": w, "bias": b, "residual": r, "running": s}
    for w, b, r, s in product((True, False), (True, False), (None, "contiguous"), (True, False))
]
OPTIONS += [{"relu": False, "residual": r} for r in (None, "contiguous")]
OPTIONS += [{"save_mask": True}, {"residual": "channels_last", "save_mask": False}]
OPTIONS += [{"training": False, "weight": w, "bias": not w} for w in (True, False)]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_batch_norm_act_options(options: dict[str, Any]) -> None:
    x, grad = (draw(SHAPES[0], "channels_last", torch.float32) for _ in range(2))
    args = forward_args(x, **options)
    opcheck(OPS.batch_norm_act_forward, args, traced=False)
    opcheck(OPS.batch_norm_act_backward, backward_args(args, grad), traced=False)


@pytest.mark.parametrize("asked", list(product((True, False), repeat=4)), ids=str)
def test_batch_norm_act_backward_output_mask(asked: tuple[bool, ...]) -> None:
    """Fakes and kernels agree on what is not asked for: empty tensors of size 0."""
    x, grad = (draw(SHAPES[0], "contiguous", torch.bfloat16) for _ in range(2))
    args = backward_args(forward_args(x, residual="contiguous"), grad, asked)
    opcheck(OPS.batch_norm_act_backward, args, traced=False)
    results = OPS.batch_norm_act_backward(*args)
    for wanted, result, like in zip(asked, results, (x, x, args[2], args[2]), strict=True):
        assert result.shape == (like.shape if wanted else (0,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [None, "same"])
def test_batch_norm_act_backward_over_grad(layout: str, residual: str | None) -> None:
    x, grad = (draw(SHAPES[0], layout, torch.float32) for _ in range(2))
    args = forward_args(x, residual=layout if residual else None)
    asked = (True, residual is not None, True, True)
    opcheck(OPS.batch_norm_act_backward_, backward_args(args, grad, asked), traced=True)


# ---- registered and plain operators --------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_registered_and_plain_operators_return_the_same_kind(layout: str, dtype) -> None:
    """Same shapes, strides and dtypes, hence one fake for both; the same bits for add_relu."""
    x, residual, grad = (draw((2, 5, 3, 7), layout, dtype) for _ in range(3))
    both = [ops.add_relu_forward(x, residual, True) for ops in (OPS, _plain)]
    for a, b in zip(*both, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    for other, training in product((None, "contiguous"), (True, False)):
        args = forward_args(x, residual=other, training=training)
        again = [*args[:4], *(t.clone() for t in args[4:6]), *args[6:]]
        pairs = zip(
            (*OPS.batch_norm_act_forward(*args), *args[4:6]),
            (*_plain.batch_norm_act_forward(*again), *again[4:6]),
            strict=True,
        )
        back = backward_args(args, grad)
        more = zip(
            OPS.batch_norm_act_backward(*back), _plain.batch_norm_act_backward(*back), strict=True
        )
        for a, b in (*pairs, *more):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
