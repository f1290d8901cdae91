# SPDX-License-Identifier: BSD-3-Clause
"""The raw operators: schemas, fakes, and a plain-PyTorch implementation for every device.

The C++ extension only overrides these per device key, so opcheck, compile and export hold on a
machine where nothing was built. Raw operators carry no autograd: functional.py adds it.

Tag ``needs_exact_strides``: the order of the mask bits follows the layout of the forward's x; a
compiler that handed forward and backward other strides than were traced would mix them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fast import _conv, _conv_sequence, _max_pool, _phases, _plain, _scale
from resnet_fast.layout import accumulate_dtype, mask_bytes, new_like, to_layout

library = torch.library.Library("resnet_fast", "DEF")

SCHEMAS = (
    "add_relu_forward(Tensor x, Tensor residual, bool save_mask) -> (Tensor y, Tensor mask)",
    "add_relu_backward(Tensor grad, Tensor mask, bool channels_last) -> Tensor",
    # Forwards that keep nothing for a backward: of what a small call costs, most are the tensors.
    "add_relu_inference(Tensor x, Tensor residual) -> Tensor",
    "batch_norm_act_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor running_mean, Tensor running_var, float eps, bool relu) -> Tensor",
    "batch_norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps,"
    " bool relu, bool save_mask) -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? bias, Tensor? mask, bool training, bool relu, bool[4] output_mask)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    # The same with dx written over grad, if it is wanted, and empty in the result.
    "batch_norm_act_backward_(Tensor(a!) grad, Tensor x, Tensor mean, Tensor invstd,"
    " Tensor? weight, Tensor? bias, Tensor? mask, bool training, bool relu, bool[4] output_mask)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    *_phases.SCHEMAS,
    *_conv.SCHEMAS,
    *_conv_sequence.SCHEMAS,
    *_scale.SCHEMAS,
    *_max_pool.SCHEMAS,
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

for _schema in SCHEMAS:
    library.define(_schema, tags=_TAGS)


# ---- fakes ---------------------------------------------------------------------------------------
def _fake_add_relu_forward(x: Tensor, residual: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    _plain.check_same("residual", residual, x)
    y = new_like(x)
    return y, x.new_empty(mask_bytes(x.numel()) if save_mask else 0, dtype=torch.uint8)


def _fake_add_relu_backward(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    _plain.check_mask(mask, grad)
    return torch.empty_like(to_layout(grad, channels_last))


def _fake_batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _plain.check_forward(x, weight, bias, residual, running_mean, running_var, training)
    stat = x.new_empty(x.size(1), dtype=accumulate_dtype(x.dtype))
    mask = x.new_empty(mask_bytes(x.numel()) if save_mask else 0, dtype=torch.uint8)
    return new_like(x), stat, torch.empty_like(stat), mask


def _fake_add_relu_inference(x: Tensor, residual: Tensor) -> Tensor:
    _plain.check_same("residual", residual, x)
    return new_like(x)


def _fake_batch_norm_act_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    _plain.check_forward(x, weight, bias, residual, running_mean, running_var, False)
    return new_like(x)


def _fake_batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # NOTE: a fake also answers where CPU and meta tensors are mixed: the dispatcher prefers Meta.
    _plain.check_backward(grad, x, mean, invstd, weight, bias, mask)
    want_dx, want_dresidual, want_dweight, want_dbias = output_mask
    param = _plain.param_dtype(accumulate_dtype(x.dtype), weight, bias)
    return (
        new_like(x) if want_dx else _plain.nothing(x, x.dtype),
        new_like(x) if want_dresidual else _plain.nothing(x, x.dtype),
        x.new_empty(x.size(1) if want_dweight else 0, dtype=param),
        x.new_empty(x.size(1) if want_dbias else 0, dtype=param),
    )


def _fake_batch_norm_act_backward_(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, *rest = _fake_batch_norm_act_backward(*args)
    return _plain.nothing(dx, dx.dtype), rest[0], rest[1], rest[2]


# ---- registration --------------------------------------------------------------------------------
_PLAIN_AND_FAKE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add_relu_forward": (_plain.add_relu_forward, _fake_add_relu_forward),
    "add_relu_inference": (_plain.add_relu_inference, _fake_add_relu_inference),
    "batch_norm_act_inference": (
        _plain.batch_norm_act_inference,
        _fake_batch_norm_act_inference,
    ),
    "add_relu_backward": (_plain.add_relu_backward, _fake_add_relu_backward),
    "batch_norm_act_forward": (_plain.batch_norm_act_forward, _fake_batch_norm_act_forward),
    "batch_norm_act_backward": (_plain.batch_norm_act_backward, _fake_batch_norm_act_backward),
    "batch_norm_statistics": (_phases.batch_norm_statistics, _phases.fake_statistics),
    "batch_norm_act_backward_reduce": (
        _phases.batch_norm_act_backward_reduce,
        _phases.fake_reduce,
    ),
    "batch_norm_act_backward_apply": (_phases.batch_norm_act_backward_apply, _phases.fake_apply),
    "scaled_add_relu_forward": (_scale.scaled_add_relu_forward, _scale.fake_forward),
    "scaled_add_relu_backward": (_scale.scaled_add_relu_backward, _scale.fake_backward),
    "max_pool_forward": (_max_pool.max_pool_forward, _max_pool.fake_forward),
    "max_pool_backward": (_max_pool.max_pool_backward, _max_pool.fake_backward),
    "conv_winograd": (_conv.conv_winograd, _conv.fake_winograd),
    "conv_winograd_": (_conv.conv_winograd_, _conv.fake_winograd_),
    "conv_winograd_pack": (_conv.conv_winograd_pack, _conv.fake_winograd_pack),
    "conv_winograd_weight": (_conv.conv_winograd_weight, _conv.fake_winograd_weight),
    "huge_pages": (_conv.huge_pages, _conv.huge_pages),
    "conv_direct": (_conv.conv_direct, _conv.fake_direct),
    "conv_direct_": (_conv.conv_direct_, _conv.fake_direct_),
    "conv_sequence": (_conv_sequence.conv_sequence, _conv_sequence.fake_sequence),
    "conv_stem_": (_conv.conv_stem_, _conv.fake_stem_),
    "conv_stem": (_conv.conv_stem, _conv.fake_stem),
    "batch_norm_act_backward_": (_plain.batch_norm_act_backward_, _fake_batch_norm_act_backward_),
}

for _name, (_plain_op, _fake) in _PLAIN_AND_FAKE.items():
    # The key of all devices: a device's own kernel, if the extension brings one, goes before it.
    library.impl(_name, _plain_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fast::{_name}", _fake, lib=library)
