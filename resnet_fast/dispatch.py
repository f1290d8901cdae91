# SPDX-License-Identifier: BSD-3-Clause
"""The one place where an implementation is chosen, call by call, and the choice recorded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from resnet_fast import config, env

logger = logging.getLogger("resnet_fast")

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, FakeTensor))
_ORDINARY = frozenset((Tensor, torch.nn.Parameter))
_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
_HALF = frozenset((torch.float16, torch.bfloat16))
# The fast implementation of each device type. The tests put the emulated CUDA kernels in here.
_fast: dict[str, str] = {"cpu": "cpu", "cuda": "cuda"}


class Event(NamedTuple):
    """One decision: which op or block, which implementation ran, and why not a fast one."""

    op: str
    impl: str
    reason: str


class _Recorder(threading.local):
    """Events of this thread, while somebody listens."""

    def __init__(self) -> None:
        self.lists: list[list[Event]] = []


# A tensor that a torch.func transform has left behind.
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_counts: dict[Event, int] = {}
# How often each decision of took() was taken since note() said so, in a list of one; not in
# _counts.
_taken: dict[Event, list[int]] = {}
_recorder = _Recorder()
_open: list[int] = []  # one entry for each recording that is open, in any thread


def note(op: str, impl: str, reason: str = "") -> None:
    """Record that `impl` runs `op`; `reason` says why it is not a fast one ("" if it is).

    Raises RuntimeError for a fallback under RESNET_FAST_REQUIRE=1, unless it was asked for with
    use_backend("reference").
    """
    if torch.compiler.is_compiling():
        return  # a side effect in a traced function would be compiled in, or break the graph
    event = Event(op, impl, reason)
    count = _counts.get(event, 0)
    _counts[event] = count + 1
    for events in _recorder.lists:
        events.append(event)
    if impl == "reference" and config.required and config.backend() != "reference":
        raise RuntimeError(f"RESNET_FAST_REQUIRE=1: {op} would run the reference: {reason}")
    if count == 0 and config.log_level:
        _log(event)


def _log(event: Event) -> None:
    if event.impl == "reference":
        logger.warning("%s runs the reference: %s", event.op, event.reason)
    elif config.log_level > 1:
        logger.warning("%s runs %s", event.op, event.impl)


def took(op: str, impl: str = "cpu", reason: str = "") -> None:
    """note(), and sooner, for calls that at_once() has let through."""
    count = _taken.get((op, impl, reason))  # type: ignore[call-overload]
    if count is None or _open:
        note(op, impl, reason)
        _taken.setdefault(Event(op, impl, reason), [0])
    else:
        count[0] += 1


def counters() -> dict[Event, int]:
    """How often each decision was taken since the start or the last reset_counters()."""
    counts = dict(_counts)
    for event, (count,) in _taken.items():
        counts[event] = counts.get(event, 0) + count
    return counts


def reset_counters() -> None:
    """Forget what was counted."""
    _counts.clear()
    _taken.clear()


@contextmanager
def recording() -> Generator[list[Event], None, None]:
    """Collect the events of this thread, in order of calls, in the list it yields."""
    events: list[Event] = []
    _recorder.lists.append(events)
    _open.append(1)
    try:
        yield events
    finally:
        _open.pop()
        # NOTE: by identity: two lists of equal events are equal.
        _recorder.lists = [other for other in _recorder.lists if other is not events]


def choose(op: str, x: Tensor, same: Tensor | None, *channel: Tensor | None) -> str:
    """The implementation for one call: "cpu", "cuda" or "reference".

    x: the activation. same: a residual, or None. channel: weight, bias and running statistics.
    """
    reason = _why_not(x, same, channel)
    impl = "reference" if reason else _fast[x.device.type]
    note(op, impl, reason)
    return impl


def choose_cpu(op: str, x: Tensor, same: Tensor, other: Tensor | None, why: str = "") -> str:
    """choose() for an op that has kernels for the CPU alone.

    other: one more tensor of x's dtype, or None. why: what else speaks against them, or "".
    """
    device = x.device.type
    reason = why or _why_not(x, same, (other,))
    if not reason and _fast[device] != "cpu":
        reason = f"no {_fast[device]} kernel for {op} yet"
    impl = "reference" if reason else "cpu"
    note(op, impl, reason)
    return impl


def at_once(x: Tensor, same: Tensor | None, channel: tuple[Tensor | None, ...] = ()) -> bool:
    """True for the common call, which choose() would give to the CPU kernels.

    It asks, in as few attribute reads as there can be, for ordinary dense tensors on the CPU, x not
    empty and of two dimensions or more, `same` None or of x's shape and dtype, and parameters of
    one fitting dtype; their shapes are the op's to check. False says nothing: ask choose().
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _ORDINARY
        or not x.is_cpu
        or config._backend not in ("auto", "cpu")
        or env._why_unavailable is not None
        or _fast["cpu"] != "cpu"
        or torch._C._get_tracing_state() is not None
    ):
        return False
    dtype = x.dtype
    if (
        dtype not in _DTYPES
        or x.layout is not torch.strided
        or x.dim() < 2
        or x.numel() == 0
        or torch._C._are_functorch_transforms_active()
        or _wrapped(x)
        or forward_ad._current_level >= 0
    ):
        return False
    if same is not None and (
        type(same) not in _ORDINARY
        or same.dtype is not dtype
        or not same.is_cpu
        or same.layout is not torch.strided
        or same.shape != x.shape
        or _wrapped(same)
    ):
        return False
    return fitting(dtype, channel)


def fitting(dtype: torch.dtype, channel: Iterable[Tensor | None]) -> bool:
    """True for ordinary CPU tensors, or None, of one dtype that goes with an x of `dtype`."""
    common = None
    for t in channel:
        if t is None:
            continue
        if type(t) not in _ORDINARY or not t.is_cpu or _wrapped(t):
            return False
        if common is None:
            common = t.dtype
        if t.dtype is not common:
            return False
    if common is not None and common is not dtype:
        return common is torch.float32 and dtype in _HALF
    return True


def _why_not(x: Tensor, same: Tensor | None, channel: tuple[Tensor | None, ...]) -> str:
    """Why no fast implementation can serve this call; "" if one can."""
    wanted = config.backend()
    if wanted == "reference":
        return "use_backend('reference')"
    device = x.device.type
    if wanted not in ("auto", device):
        return f"use_backend({wanted!r}), and x is on {device}"
    if device not in _fast:
        return f"no kernels for device {device}"
    unavailable = env.why_unavailable(device)
    if unavailable is not None:
        return unavailable
    return _why_not_tensors(x, same, channel) or _why_not_mode() or _why_not_card(x)


def _why_not_card(x: Tensor) -> str:
    return env.why_not_card(x.device.index or 0) if x.device.type == "cuda" else ""


def _why_not_tensors(x: Tensor, same: Tensor | None, channel: tuple[Tensor | None, ...]) -> str:
    dtype = x.dtype
    if type(x) not in _PLAIN_TYPES:
        return f"x is a {type(x).__name__}"
    if dtype not in _DTYPES:
        return f"no kernels for dtype {dtype}"
    if x.layout is not torch.strided or x.numel() == 0:
        return "x is empty" if x.layout is torch.strided else f"x has layout {x.layout}"
    if same is not None:
        if type(same) not in _PLAIN_TYPES:
            return f"residual is a {type(same).__name__}"
        if same.dtype != dtype or same.shape != x.shape or same.device != x.device:
            return "residual differs from x in shape, dtype or device"
    return _why_not_channel(dtype, channel)


def _why_not_channel(dtype: torch.dtype, channel: tuple[Tensor | None, ...]) -> str:
    common: torch.dtype | None = None
    for t in channel:
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES:
            return f"a parameter is a {type(t).__name__}"
        common = common or t.dtype
        if t.dtype != common:
            return "parameters and statistics differ in dtype"
    if common is None or common == dtype or (common == torch.float32 and dtype in _HALF):
        return ""
    return f"x is {dtype} and the parameters are {common}"


def _why_not_mode() -> str:
    """Whether a transformation is at work that only plain PyTorch operators go through."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export: the graph holds standard operators"
        return ""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active: the graph holds standard operators"
    return ""
