# SPDX-License-Identifier: BSD-3-Clause
"""Residual blocks of plain parts on the CPU: asked about once, then run without asking again.

blocks.py asks before each norm whether it may be fused, since a hook on the convolution before may
have changed that. Where the convolutions are plain as well, nobody's code runs within the block,
and one look at all its parts holds until its end. On small tensors the asking, and the calls of the
modules, are a good part of what a block costs. Whatever is not of the common kind is left to
blocks.py. Modules are read past nn.Module.__getattr__, in their dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import _checks, convolution, dispatch, functional
from resnet_fast._ready import (
    State,
    convolutions_untouched,
    modules_untouched,
    no_tracer_or_mode,
)

# The classes themselves, whatever nn's names may come to mean: a module's class is compared.
_BatchNorm2d, _Conv2d, _ReLU, _Sequential = nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Sequential

_CHECK = nn.BatchNorm2d._check_input_dim  # PyTorch's own

# Of each convolution of a block its name, and that of the norm behind it.
Names = tuple[tuple[str, str], ...]
BASIC: Names = (("conv1", "bn1"), ("conv2", "bn2"))
BOTTLENECK: Names = (*BASIC, ("conv3", "bn3"))
# Values of x below which PyTorch's own operators, called without their modules, train sooner than
# the fused one: they pass over more memory, but their autograd is in C++.
SMALL = 1 << 17
_SMALL = f"fewer than {SMALL:,} values: in training PyTorch's operators cost less"
# A convolution and the norm behind it, as they are called: the dictionary of the first, its weight,
# and of the second the dictionary and the tensors. (A tuple of a class takes longer to make.)
_Step = tuple[dict[str, Any], Tensor, dict[str, Any], State]
# relu(bn(out) + identity) for what turns out to be less plain: bn, relu, out, identity.
Join = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def residual_block(block: Any, names: Names, x: Any, join: Join) -> Tensor | None:
    """The forward of a block on x (N, C, H, W); None, and nothing done, where a part is not plain.

    block: a module with the convolutions and norms in `names`, relu, and downsample (a module or
    None). The last norm takes the shortcut in; join does that where shapes must be broadcast.
    """
    if not (
        dispatch.at_once(x, None)
        and x.dim() == 4
        and modules_untouched()
        and convolutions_untouched()
        and _BatchNorm2d._check_input_dim is _CHECK
        and no_tracer_or_mode()
        and not torch.is_autocast_enabled("cpu")
    ):
        return None
    try:
        steps = _steps(block, names, x)
    except KeyError:  # a part, or a tensor of one, is missing
        return None
    if steps is None:
        return None
    first, *between, last, down = steps
    out, x = _convolve_and_input(first, x)  # x is the shortcut's from here on
    out = _norm(first, out, None, "relu")
    for step in between:
        out = _convolve(step, out)  # by this name, so that the activation before can be freed
        out = _norm(step, out, None, "relu")
    out = _convolve(last, out)
    identity = x if down is None else _norm(down, _convolve(down, x), None, None)
    if identity.shape != out.shape:
        modules = block._modules
        return join(modules[names[-1][1]], modules["relu"], out, identity)
    return _norm(last, out, identity, "relu")


# ---- the look ------------------------------------------------------------------------------------
def _steps(block: Any, names: Names, x: Tensor) -> list[Any] | None:
    """The steps of a block, that of its downsample (or None) last; None if a part is not plain."""
    own, kind = block.__dict__, type(block)
    modules = own["_modules"]
    relu, down = modules["relu"], modules.get("downsample")
    if (
        type(relu) is not _ReLU
        or not _plain(relu.__dict__)
        or own["_backward_hooks"]  # of the old kind, perhaps: they are shown the last node
        or (down is None and block.downsample is not None)
        # What hides a module of that name.
        or not own.keys().isdisjoint(modules)
        or any([hasattr(kind, name) for name in modules])
    ):
        return None
    pairs = [(modules[conv], modules[norm]) for conv, norm in names]
    if down is not None:
        parts = down._modules
        if type(down) is not _Sequential or len(parts) != 2 or not _plain(down.__dict__):
            return None
        pairs.append(tuple(parts.values()))
    steps: list[Any] = []
    weights: list[Tensor] = []
    channels: list[Tensor | None] = []
    for conv, norm in pairs:
        step = _step(conv, norm)
        if step is None:
            return None
        steps.append(step)
        weights.append(step[1])
        channels += step[3]
    if not (dispatch.fitting(x.dtype, weights) and dispatch.fitting(x.dtype, channels)):
        return None
    if down is None:
        steps.append(None)
    elif steps[-1][3][2] is steps[-2][3][2]:
        return None  # one statistic in two norms, which then run in another order: see blocks.py
    return steps


def _step(conv: Any, bn: Any) -> _Step | None:
    """A convolution and the norm behind it, if both are plain."""
    if type(conv) is not _Conv2d or type(bn) is not _BatchNorm2d:
        return None
    c, b = conv.__dict__, bn.__dict__
    filters, affine, statistics = c["_parameters"], b["_parameters"], b["_buffers"]
    weight, eps = filters["weight"], b["eps"]
    mean, var = statistics["running_mean"], statistics["running_var"]
    if (
        not (_plain(c) and _plain(b))
        or weight is None
        or filters["bias"] is not None
        or c["padding_mode"] != "zeros"
        or "weight" in c
        or "bias" in c
        or "_conv_forward" in c
        or mean is None
        or var is None
        or type(eps) is not float
        or not eps > 0
        or type(b["momentum"]) is not float
        or "weight" in b
        or "bias" in b
        or "running_mean" in b
        or "running_var" in b
        or "_check_input_dim" in b
    ):
        return None
    if b["training"] and not (
        b["track_running_stats"]
        and statistics["num_batches_tracked"] is not None
        and "num_batches_tracked" not in b
    ):
        return None
    return c, weight, b, (affine["weight"], affine["bias"], mean, var)


def _plain(own: dict[str, Any]) -> bool:
    """plain_module() of the module with that dictionary, whose class is known."""
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "_compiled_call_impl" in own
        or "forward" in own
        or "_call_impl" in own
    )


# ---- the calls -----------------------------------------------------------------------------------
def _asks(x: Tensor) -> bool:
    """Whether convolution.py may have a kernel: it has none for float32 in NCHW."""
    return x.numel() >= convolution.FROM_NUMEL and not (
        x.dtype is torch.float32 and x.is_contiguous()
    )


def _convolve(step: _Step, x: Tensor) -> Tensor:
    c, weight, _, _ = step
    arguments = c["stride"], c["padding"], c["dilation"], c["groups"]
    if _asks(x):
        return convolution.conv2d(x, weight, *arguments)
    return F.conv2d(x, weight, None, *arguments)


def _convolve_and_input(step: _Step, x: Tensor) -> tuple[Tensor, Tensor]:
    c, weight, _, _ = step
    if _asks(x):
        arguments = c["stride"], c["padding"], c["dilation"], c["groups"]
        return convolution.conv2d_and_input(x, weight, *arguments)
    return _convolve(step, x), x


def _norm(step: _Step, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """norms.batch_norm for what _step() lets through."""
    _, _, b, state = step
    training = b["training"]
    weight, bias, *_ = state
    separate = (
        x.numel() < SMALL
        and x.dtype is torch.float32
        and torch.is_grad_enabled()
        and functional.needs_gradient(x, weight, bias, residual)
    )
    if training:
        counter = b["_buffers"]["num_batches_tracked"]
        counter.add_(1)
    try:
        if training and x.size(0) == 1:
            _checks.more_than_one_value(x.shape)
        if separate:
            dispatch.took("batch_norm_act", "torch", _SMALL)
            y = torch.batch_norm(x, *state, training, b["momentum"], b["eps"], False)
            if residual is not None:
                y += residual
            return y if activation is None else torch.relu_(y)
        return functional.batch_norm_act_at_once(
            x, state, residual, training, b["momentum"], b["eps"], activation
        )
    except (ValueError, TypeError, RuntimeError):
        if training:
            counter.sub_(1)
        raise
