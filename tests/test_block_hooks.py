# SPDX-License-Identifier: BSD-3-Clause
"""Hooks of every kind on every part of a fused block see and change what they do in a plain one.

Each case does the same thing to a torchvision block and to its accelerated twin (twins.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules import module as nn_module
from torchvision_blocks import Change, X, check, make, run_twins
from twins import Log, reasons, step, twin

from resnet_fast.convert import accelerate

PARTS = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample", "downsample.0", "downsample.1", "")


def fused_still(part: str) -> bool:
    """Parts that are called as modules in any case."""
    return part == "" or "conv" in part or part == "downsample.0"


def name_in_reason(part: str) -> str:
    return {"downsample.1": "the end of downsample"}.get(part, part)


def forward_hook(m: Any, part: str, log: Log) -> None:
    m.register_forward_hook(lambda _, args, out: log.add(part, args[0], out))


def forward_hook_kwargs(m: Any, part: str, log: Log) -> None:
    def hook(_: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        log.add(part, args[0], len(kwargs), out)

    m.register_forward_hook(hook, with_kwargs=True, always_call=True, prepend=True)


def forward_hook_changing(m: Any, part: str, log: Log) -> None:
    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        log.add(part, out)
        return out * 1.25 - 0.125

    m.register_forward_hook(hook)


def forward_pre_hook(m: Any, part: str, log: Log) -> None:
    m.register_forward_pre_hook(lambda _, args: log.add(part, args[0]))


def forward_pre_hook_changing(m: Any, part: str, log: Log) -> None:
    def hook(_: Any, args: Any) -> Tensor:
        log.add(part, *args)
        return args[0] * 1.5

    m.register_forward_pre_hook(hook)


def backward_hook(m: Any, part: str, log: Log) -> None:
    m.register_full_backward_hook(lambda _, gi, go: log.add(part, *gi, *go))


def backward_hook_changing(m: Any, part: str, log: Log) -> None:
    def hook(_: Any, grad_in: Any, grad_out: Any) -> Any:
        log.add(part, *grad_in, *grad_out)
        return tuple(g * 0.5 for g in grad_in)

    m.register_full_backward_hook(hook)


def backward_pre_hook(m: Any, part: str, log: Log) -> None:
    m.register_full_backward_pre_hook(lambda _, go: log.add(part, *go))


def legacy_backward_hook(m: Any, part: str, log: Log) -> None:
    m.register_backward_hook(lambda _, gi, go: log.add(part, *gi, *go))


def retain_output(m: Any, part: str, log: Log) -> None:
    def hook(_: Any, __: Any, out: Tensor) -> None:
        out.register_hook(lambda grad: log.add(part, grad))

    m.register_forward_hook(hook)


def on(part: str, hook: Callable[..., None]) -> Change:
    def change(m: Any, log: Log) -> None:
        log.expected = True
        hook(m.get_submodule(part), part, log)

    return change


FORWARD = {
    "forward hook": (
        forward_hook,
        forward_hook_kwargs,
        forward_hook_changing,
        retain_output,
    ),
    "forward pre-hook": (forward_pre_hook, forward_pre_hook_changing),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("hook", [h for hooks in FORWARD.values() for h in hooks])
def test_forward_hooks_on_every_part(part: str, hook: Callable[..., None]) -> None:
    kind = next(kind for kind, hooks in FORWARD.items() if hook in hooks)
    why = None if fused_still(part) else f"{name_in_reason(part)} has a {kind}"
    check("basic_down", on(part, hook), why)


# Under these PyTorch refuses the in-place ReLU and +=: see the two tests after the next one.
REFUSED = ("relu", "bn1", "bn2")


@pytest.mark.parametrize("part", [part for part in PARTS if part not in REFUSED])
@pytest.mark.parametrize("hook", [backward_hook, backward_hook_changing, backward_pre_hook])
def test_full_backward_hooks_on_every_part(part: str, hook: Callable[..., None]) -> None:
    kind = "backward pre-hook" if hook is backward_pre_hook else "backward hook"
    why = None if fused_still(part) else f"{name_in_reason(part)} has a {kind}"
    check("basic_down", on(part, hook), why)


@pytest.mark.parametrize("part", REFUSED)
def test_the_error_of_inplace_relu_under_a_backward_hook_is_pytorchs(part: str) -> None:
    def message(model: Any) -> str:
        model.get_submodule(part).register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace") as info:
            step(model, X)
        return str(info.value)

    theirs = make("basic")
    assert message(accelerate(twin(theirs))) == message(theirs)


@pytest.mark.parametrize("hook", [backward_hook, backward_hook_changing, backward_pre_hook])
@pytest.mark.parametrize("part", ["bn1", "relu"])
def test_full_backward_hooks_where_relu_is_not_in_place(
    part: str, hook: Callable[..., None]
) -> None:
    def change(m: Any, log: Log) -> None:
        m.relu.inplace = False
        on(part, hook)(m, log)

    check("basic_down", change, f"{part} has a backward")


@pytest.mark.filterwarnings("ignore:.*backward hook.*")
@pytest.mark.parametrize("part", ["bn1", "bn2", "relu", "downsample.1", "conv2", ""])
def test_register_backward_hook_of_old(part: str) -> None:
    why = {
        "conv2": None,
        "": "register_backward_hook hook is on the block",
        "downsample.1": "the end of downsample has a backward hook",
    }.get(part, f"{part} has a backward hook")
    check("basic_down", on(part, legacy_backward_hook), why)


@pytest.mark.parametrize("which", ["forward", "forward_pre"])
def test_hooks_on_all_modules(which: str) -> None:
    @contextmanager
    def change(m: Any, log: Log) -> Iterator[None]:
        log.expected = True

        def hook(module: Any, *values: Any) -> None:
            tensors = [v[0] if isinstance(v, tuple) else v for v in values]
            log.add(type(module).__name__, *tensors)

        handle = getattr(nn_module, f"register_module_{which}_hook")(hook)
        yield
        handle.remove()

    kind = {"forward": "forward hook", "forward_pre": "forward pre-hook"}[which]
    why = f"a {kind} is registered for all modules"
    assert run_twins("basic_down", change) == [("BasicBlock", why)]


@pytest.mark.parametrize("which", ["full_backward", "full_backward_pre"])
def test_backward_hooks_on_all_modules_stop_the_fusion(which: str) -> None:
    block = accelerate(make("basic")).eval()
    handle = getattr(nn_module, f"register_module_{which}_hook")(lambda *_: None)
    try:
        with torch.no_grad():
            assert "hook is registered for all modules" in reasons(lambda: block(X))[0][1]
    finally:
        handle.remove()
    assert not reasons(lambda: block(X))


def test_a_hook_that_comes_and_goes() -> None:
    block = accelerate(make("basic"))
    assert not reasons(lambda: block(X))
    handle = block.bn2.register_forward_hook(lambda *_: None)
    assert reasons(lambda: block(X)) == [("BasicBlock", "bn2 has a forward hook")]
    handle.remove()
    assert not reasons(lambda: block(X))


@pytest.mark.parametrize("part", ["bn1", "bn2", "relu", "downsample.1"])
def test_a_hook_registered_while_the_block_runs(part: str) -> None:
    def change(m: Any, log: Log) -> None:
        def register(*_: Any) -> None:
            forward_hook(m.get_submodule(part), part, log)

        log.expected = True
        m.conv1.register_forward_pre_hook(register)

    check("basic_down", change, "has a forward hook")


def test_a_changed_mode_while_the_block_runs() -> None:
    def change(m: Any, _: Log) -> None:
        m.conv2.register_forward_hook(lambda *_: m.bn2.eval() and None)

    check("basic", change, None)
