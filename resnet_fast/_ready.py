# SPDX-License-Identifier: BSD-3-Clause
"""When a run of modules may be replaced by one fused op, and if not, why not.

A fused op never calls the BatchNorm and ReLU modules it stands for. So it may only run where nobody
could tell: no hook of any kind on them or on all modules, no replaced ``forward``, no subclass, no
tracer or mode that wants to see the single operators. Hooks come and go, so this is asked at every
call, in attribute reads alone; a sentence is only made when the answer is no.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize, prune
from torch.utils._device import DeviceContext

from resnet_fast import dispatch

# PyTorch's own, to notice when somebody has put a function of theirs in the place of one.
_CALL = nn.Module._wrapped_call_impl
_CALL_IMPL = nn.Module._call_impl
_BATCH_NORM_FORWARD = nn.BatchNorm2d.forward
_RELU_FORWARD = nn.ReLU.forward
_F_BATCH_NORM = F.batch_norm
_F_RELU = F.relu
_CONV_FORWARD, _CONV_OF = nn.Conv2d.forward, nn.Conv2d._conv_forward
_F_CONV = F.conv2d
_MAX_POOL_FORWARD = nn.MaxPool2d.forward
_F_MAX_POOL = F.max_pool2d
_PRUNE_CALL = prune.BasePruningMethod.__call__
_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = (Tensor, nn.Parameter, type(None))
# The classes themselves, whatever nn's names may come to mean: a module's class is compared.
_BatchNorm2d = nn.BatchNorm2d
_ReLU = nn.ReLU
_Module = nn.Module

# Other norms than nn.BatchNorm2d that the fused op can stand for, and the forward of each.
_OTHER_NORMS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.SyncBatchNorm: nn.SyncBatchNorm.forward
}
_FROZEN: set[type[nn.Module]] = set()

State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


# ---- fast answers --------------------------------------------------------------------------------
def plain_tensor(x: object) -> bool:
    """True for a torch.Tensor that is of no subclass (a Parameter is plain)."""
    return type(x) in _PLAIN


def plain_state(bn: nn.Module) -> State | None:
    """bn's weight, bias, running_mean and running_var; None if the fused op cannot take them."""
    state = weight, bias, mean, var = _state(bn)
    if (
        type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(var) in _PLAIN_OR_NONE
        and (mean is None) == (var is None)
    ):
        return state
    return None


def _state(bn: Any) -> State:
    """bn's four attributes, read past nn.Module.__getattr__ where that is the same and ten times
    as fast: unless one was set on the object, or taken out of the module's dictionaries."""
    own = bn.__dict__
    if not ("weight" in own or "bias" in own or "running_mean" in own or "running_var" in own):
        parameters, buffers = bn._parameters, bn._buffers
        try:
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
            )
        except KeyError:
            pass
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def plain_module(m: object, kind: type[nn.Module]) -> bool:
    """True if calling m is calling kind.forward and nothing else."""
    return (
        type(m) is kind
        and not (
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        )
        and m._compiled_call_impl is None
        and "forward" not in m.__dict__
        and "_call_impl" not in m.__dict__
    )


def plain_norm(m: object) -> bool:
    """True if m is an nn.BatchNorm2d, or another norm made known here, and calling it is plain."""
    kind = type(m)
    if kind is _BatchNorm2d and plain_module(m, _BatchNorm2d):
        return True
    if kind in _OTHER_NORMS:
        return plain_module(m, kind) and kind.forward is _OTHER_NORMS[kind]
    return isinstance(m, nn.BatchNorm2d) and _reparametrized(m)


def _reparametrized(m: nn.BatchNorm2d) -> bool:
    """True if m is an nn.BatchNorm2d but for where its tensors come from.

    torch.nn.utils.parametrize makes properties of them, in a class of its own; reading them is what
    m's forward does. torch.nn.utils.prune sets them in a pre-hook, which prune_now() runs.
    """
    kind = type(m)
    return (
        not torch.compiler.is_compiling()
        and (kind is nn.BatchNorm2d or (_only_properties(kind) and parametrize.is_parametrized(m)))
        and not (m._forward_hooks or m._backward_hooks or m._backward_pre_hooks)
        and not m._forward_pre_hooks_with_kwargs
        and all(_prunes(hook) for hook in m._forward_pre_hooks.values())
        and m._compiled_call_impl is None
        and "forward" not in m.__dict__
        and "_call_impl" not in m.__dict__
    )


def _only_properties(kind: type[nn.Module]) -> bool:
    """True for a class as parametrize makes it of nn.BatchNorm2d."""
    own = {"__module__", "__doc__", "__getstate__", "__deepcopy__"}
    return kind.__bases__ == (nn.BatchNorm2d,) and all(
        name in own or isinstance(value, property) for name, value in vars(kind).items()
    )


def _prunes(hook: object) -> bool:
    """True for a pruning method's pre-hook: it sets one tensor of the module and gives nothing."""
    return (
        isinstance(hook, prune.BasePruningMethod)
        and type(hook).__call__ is _PRUNE_CALL
        and prune.BasePruningMethod.__call__ is _PRUNE_CALL
    )


def prune_now(bn: nn.Module, x: Tensor) -> None:
    """Run the pre-hooks of a norm for which plain_norm() is true, as calling it does."""
    for hook in tuple(bn._forward_pre_hooks.values()):
        hook(bn, (x,))


def frozen_norm(m: object) -> bool:
    """True for a norm made known by register_frozen_norm."""
    return type(m) in _FROZEN


def register_frozen_norm(kind: type[nn.Module]) -> None:
    """Make a class known whose forward is x * scale + shift of its four buffers and eps.

    The buffers are weight, bias, running_mean and running_var, never changed by a call.
    """
    if kind.forward.__module__ == kind.__module__:  # else somebody has put his own in its place
        _OTHER_NORMS[kind] = kind.forward
        _FROZEN.add(kind)


def plain_context(x: object) -> bool:
    """True if x is a plain tensor and nothing watches or changes the calls of all modules."""
    return (
        type(x) in _PLAIN
        and modules_untouched()
        and (torch.compiler.is_compiling() or no_tracer_or_mode())
    )


def modules_untouched() -> bool:
    """True if no hook is on all modules, and norms and ReLUs are called as PyTorch has it."""
    return (
        not (
            _module._global_forward_hooks
            or _module._global_forward_pre_hooks
            or _module._global_backward_hooks
            or _module._global_backward_pre_hooks
        )
        and _BatchNorm2d.__call__ is _CALL
        and _ReLU.__call__ is _CALL
        and _Module._call_impl is _CALL_IMPL
        and _BatchNorm2d.forward is _BATCH_NORM_FORWARD
        and _ReLU.forward is _RELU_FORWARD
        and F.batch_norm is _F_BATCH_NORM
        and F.relu is _F_RELU
    )


def convolutions_untouched() -> bool:
    """True if nn.Conv2d is called as PyTorch has it."""
    return (
        nn.Conv2d.forward is _CONV_FORWARD
        and nn.Conv2d._conv_forward is _CONV_OF
        and nn.Conv2d.__call__ is _CALL
        and F.conv2d is _F_CONV
    )


def plain_conv(m: object) -> bool:
    """True if m is an nn.Conv2d without bias whose call is F.conv2d with zeros around, no more."""
    return (
        plain_module(m, nn.Conv2d)
        and convolutions_untouched()
        and "_conv_forward" not in m.__dict__  # type: ignore[attr-defined]
        and "weight" not in m.__dict__  # type: ignore[attr-defined]
        and m._parameters.get("weight") is not None  # type: ignore[attr-defined]
        and m.bias is None  # type: ignore[attr-defined]
        and m.padding_mode == "zeros"  # type: ignore[attr-defined]
    )


def plain_max_pool() -> bool:
    """True if calling an nn.MaxPool2d is still calling PyTorch's function."""
    return (
        nn.MaxPool2d.forward is _MAX_POOL_FORWARD
        and nn.MaxPool2d.__call__ is _CALL
        and F.max_pool2d is _F_MAX_POOL
    )


def no_tracer_or_mode() -> bool:
    return (
        torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and (torch._C._len_torch_function_stack() == 0 or _function_mode() == "")
    )


def _function_mode() -> str:
    """The class of the innermost TorchFunctionMode that could change an operator, or ""."""
    for i in reversed(range(torch._C._len_torch_function_stack())):
        mode = type(torch._C._get_function_stack_at(i))
        # NOTE: torch.set_default_device leaves one of these on for good; it only makes factories
        # such as torch.zeros choose a device.
        if mode is not DeviceContext:
            return mode.__name__
    return ""


def block_parts(owner: nn.Module, norms: tuple[str, ...], x: object) -> list[Any] | None:
    """The batch norms of owner named `norms`, and owner.relu, if its forward on x may fuse them.

    If not, None, and the reason is recorded under the class of owner.
    """
    if plain_context(x) and not legacy_hook(owner):
        parts: list[Any] = [getattr(owner, name, None) for name in norms]
        for norm in parts:
            if not (plain_module(norm, _BatchNorm2d) or plain_norm(norm)):
                break
        else:
            relu = getattr(owner, "relu", None)
            if plain_module(relu, _ReLU):
                parts.append(relu)
                return parts
    fell_back(type(owner).__name__, x, why_not_context(x) or why_not_block(owner, norms))
    return None


def fell_back(op: str, x: object, why: str) -> None:
    """Record that op on x runs the reference, and why."""
    if isinstance(x, fx.Proxy):  # symbolic tracing computes nothing: there is nothing to record
        from resnet_fast import graphs  # which is made of blocks

        graphs.traced(x)
    else:
        dispatch.note(op, "reference", why)


def legacy_hook(owner: nn.Module) -> bool:
    """True for a register_backward_hook hook, which is shown the block's last autograd node."""
    return bool(owner._backward_hooks) and owner._is_full_backward_hook is False


# ---- sentences -----------------------------------------------------------------------------------
_HOOKS = (
    ("_forward_hooks", "forward hook"),
    ("_forward_pre_hooks", "forward pre-hook"),
    ("_backward_hooks", "backward hook"),
    ("_backward_pre_hooks", "backward pre-hook"),
)


def why_not_block(owner: nn.Module, norms: tuple[str, ...]) -> str:
    """Why owner's batch norms, named `norms`, cannot be fused with owner.relu; "" if they can."""
    reasons = [why_not_norm(name, getattr(owner, name, None)) for name in norms]
    reasons.append(why_not_module("relu", getattr(owner, "relu", None), nn.ReLU))
    return next((reason for reason in reasons if reason), why_not_owner(owner))


def why_not_owner(owner: nn.Module) -> str:
    """Why nothing in a block may be fused, whatever it holds; "" if it may."""
    return "a register_backward_hook hook is on the block" if legacy_hook(owner) else ""


def why_not_norm(name: str, m: object) -> str:
    """Why m, called `name`, cannot be fused as a batch norm; "" if it can."""
    kind = type(m)
    if kind not in _OTHER_NORMS:
        return "" if plain_norm(m) else why_not_module(name, m, nn.BatchNorm2d)
    if kind.forward is not _OTHER_NORMS[kind]:
        return f"{kind.__name__}.forward was replaced"
    return why_not_module(name, m, kind)


def why_not_module(name: str, m: object, kind: type[nn.Module]) -> str:
    """Why m, called `name`, cannot be fused as a module of exactly `kind`; "" if it can."""
    if m is None:
        return f"{name} is None or missing"
    if type(m) is not kind or not isinstance(m, nn.Module):
        return f"{name} is a {type(m).__name__}, not exactly nn.{kind.__name__}"
    for attribute, hook in _HOOKS:
        if getattr(m, attribute):
            return f"{name} has a {hook}"
    if "forward" in m.__dict__ or "_call_impl" in m.__dict__:
        return f"{name} has a forward of its own"
    return "" if m._compiled_call_impl is None else f"{name} was compiled by itself"


def why_not_state(name: str, bn: Any) -> str:
    """Why bn's tensors cannot go to the fused op; "" if they can."""
    for attribute in ("weight", "bias", "running_mean", "running_var"):
        t = getattr(bn, attribute)
        if type(t) not in _PLAIN_OR_NONE:
            return f"{name}.{attribute} is a {type(t).__name__}"
    if (bn.running_mean is None) != (bn.running_var is None):
        return f"{name} has one of running_mean and running_var without the other"
    return ""


def why_not_context(x: object) -> str:
    """Why no module at all can be fused in this call on x; "" if one can."""
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, not a plain torch.Tensor"
    for attribute, hook in _HOOKS:
        if getattr(_module, f"_global{attribute}"):
            return f"a {hook} is registered for all modules"
    patched = {
        "nn.Module.__call__": nn.Module.__call__ is not _CALL,
        "nn.BatchNorm2d.__call__": nn.BatchNorm2d.__call__ is not _CALL,
        "nn.ReLU.__call__": nn.ReLU.__call__ is not _CALL,
        "nn.Module._call_impl": nn.Module._call_impl is not _CALL_IMPL,
        "nn.BatchNorm2d.forward": nn.BatchNorm2d.forward is not _BATCH_NORM_FORWARD,
        "nn.ReLU.forward": nn.ReLU.forward is not _RELU_FORWARD,
        "F.batch_norm": F.batch_norm is not _F_BATCH_NORM,
        "F.relu": F.relu is not _F_RELU,
    }
    for what, changed in patched.items():
        if changed:
            return f"{what} was replaced"
    return "" if torch.compiler.is_compiling() else _why_not_mode()


def _why_not_mode() -> str:
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active: the graph holds standard operators"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active: it sees standard operators"
    mode = _function_mode()
    return f"a TorchFunctionMode ({mode}) is active: it sees standard operators" if mode else ""
