# SPDX-License-Identifier: BSD-3-Clause
"""Fused blocks under autocast, tracers, modes, patches of PyTorch, and torch.func.

Each case does the same thing to a torchvision block and to its accelerated twin (twins.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision_blocks import KINDS, X, check, make, tv
from twins import Log, assert_same, reasons, step, twin

from resnet_fast.convert import accelerate


# ---- dtypes, and inputs of other kinds -----------------------------------------------------------
@pytest.mark.parametrize("kind", ["basic", "bottleneck_down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_the_plain_block(kind: str, dtype: torch.dtype) -> None:
    theirs = make(kind).float()
    ours = accelerate(twin(theirs))
    x = X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(x), ours(x)
        fell_back = reasons(lambda: ours(x))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)
    # In "basic" a float32 input meets the branch's bfloat16 in the sum.
    differs = kind == "basic" and dtype == torch.float32
    assert any("another dtype" in why for _, why in fell_back) == differs


def test_parameters_and_channels_last_stay_fused() -> None:
    block = accelerate(make("basic"))
    assert not reasons(lambda: block(nn.Parameter(X)))
    y = block(X.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


class Tagged(Tensor):
    """A tensor subclass that goes through every operator."""


def test_tensor_subclasses_take_the_plain_path() -> None:
    block = accelerate(make("basic"))
    plain = make("basic")
    x = X.as_subclass(Tagged)
    fell_back = reasons(lambda: torch.testing.assert_close(block(x), plain(x)))
    assert fell_back == [("BasicBlock", "the input is a Tagged, not a plain torch.Tensor")]
    assert type(block(x)) is Tagged
    block.bn1.weight = nn.Parameter(block.bn1.weight.detach().as_subclass(Tagged))
    assert ("batch_norm_act", "the norm.weight is a Tagged") in reasons(lambda: block(X))
    block.conv1.register_forward_hook(lambda _, __, out: out.as_subclass(Tagged))
    assert "is a Tagged" in reasons(lambda: block(X))[0][1]

    block = accelerate(make("basic_down"))
    block.downsample.register_forward_hook(lambda _, __, out: out.as_subclass(Tagged))
    why = "the shortcut is a Tagged, not a plain torch.Tensor"
    assert ("batch_norm_act", why) in reasons(lambda: block(X))


# ---- modes, patches, tracers ---------------------------------------------------------------------
class CountingFunctions(TorchFunctionMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.relu, F.batch_norm):
            self.log.add(func.__name__)
        return func(*args, **(kwargs or {}))


class CountingDispatch(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.add(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_standard_operators() -> None:
    check("basic", lambda _, log: CountingFunctions(log), "TorchFunctionMode (CountingFunctions)")
    check("basic", lambda _, log: CountingDispatch(log), "a TorchDispatchMode is active")
    block = accelerate(make("basic"))
    with torch.device("cpu"):  # changes factories only
        assert not reasons(lambda: block(X))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (nn.ReLU, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.ReLU, "__call__"),
        (nn.BatchNorm2d, "__call__"),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        (F, "relu"),
        (F, "batch_norm"),
        (tv.BasicBlock, "forward"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__.rpartition(".")[2],
)
def test_patched_pytorch_is_seen(where: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = getattr(where, name)
    log = Log()

    def patched(*args: Any, **kwargs: Any) -> Any:
        log.add("called")
        return plain(*args, **kwargs)

    block = accelerate(make("basic"))
    monkeypatch.setattr(where, name, patched)
    assert "was replaced" in reasons(lambda: block(X))[0][1]
    assert log


def test_symbolic_tracing_sees_the_plain_graph() -> None:
    for kind in KINDS:
        theirs = make(kind)
        ours = accelerate(twin(theirs))
        assert not reasons(lambda m=ours: torch.fx.symbolic_trace(m))

        def nodes(m: Any) -> list[tuple[str, str]]:
            return [(n.op, str(n.target)) for n in torch.fx.symbolic_trace(m).graph.nodes]

        assert nodes(ours) == nodes(theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_jit_trace_takes_the_plain_path() -> None:
    block = accelerate(make("basic")).eval()
    with torch.no_grad():
        fell_back = reasons(lambda: torch.jit.trace(block, (X,), check_trace=False))
        traced = torch.jit.trace(block, (X,))
        torch.testing.assert_close(traced(X), block(X))
    assert fell_back[0][1].startswith("torch.jit.trace is active")


# ---- checkpointing -------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_moves_statistics_as_in_the_plain_block(kind: str, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    theirs = make(kind)
    ours = Checkpointed(accelerate(twin(theirs)))
    assert_same(step(ours, X, 2), step(Checkpointed(theirs), X, 2))


# ---- transformations -----------------------------------------------------------------------------
def test_second_order_gradients() -> None:
    theirs = make("basic_down")
    ours = accelerate(twin(theirs))

    def penalty(m: Any) -> list[Tensor]:
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x, *m.parameters()]))

    for a, b in zip(penalty(ours), penalty(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))


def test_torch_func_transformations() -> None:
    theirs = make("basic_down").eval()
    ours = accelerate(twin(theirs))

    def per_sample(m: Any) -> dict[str, Tensor]:
        parameters = {k: p.detach() for k, p in m.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(m, parameters, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)

    assert_same(per_sample(ours), per_sample(theirs))
    for m in (ours, theirs):
        m.requires_grad_(False)
    (_, got), (_, want) = (torch.func.jvp(m, (X,), (X.cos(),)) for m in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind: str, fused: bool) -> None:
    plain = make(kind)
    plain.relu = plain.relu if fused else nn.LeakyReLU()
    block = accelerate(twin(plain))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = {k.removeprefix("_orig_mod."): t for k, t in step(compiled, X).items()}
    assert_same(got, step(plain, X))
