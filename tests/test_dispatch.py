# SPDX-License-Identifier: BSD-3-Clause
"""The choice of implementation: every reason for the reference can be reached, is recorded, and
gives what eager gives; the settings and environment variables do what they say.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IMPLEMENTATIONS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import resnet_fast as rf
from resnet_fast import config, dispatch, env, functional
from resnet_fast.dispatch import Event

C = 3


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension counts as loaded; where it is not, the plain raw operators stand in."""
    monkeypatch.setattr(env, "_why_unavailable", None)


class Sub(Tensor):
    """A tensor subclass that changes nothing."""


def make(shape: tuple[int, ...] = (2, C, 4, 5), **dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(**dtype) if dtype else torch.randn(shape)


def bn(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **more: Any) -> Tensor:
    mean, var = more.pop("stats", (torch.zeros(C), torch.ones(C)))
    return functional.batch_norm_act(x, weight, bias, mean, var, **more)


def sub(t: Tensor) -> Tensor:
    return t.as_subclass(Sub)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementation_is_tested(name: str) -> None:
    """One visible skip for each implementation that this machine lacks."""
    missing = IMPLEMENTATIONS[name].missing()
    if missing is not None:
        pytest.skip(f"{name} is not tested here: {missing}")


# ---- the reasons ---------------------------------------------------------------------------------
def _jvp(x: Tensor) -> Any:
    with forward_ad.dual_level():
        return functional.add_relu(forward_ad.make_dual(x, torch.ones_like(x)), x)


REASONS: dict[str, tuple[Callable[[], Any], str]] = {
    "subclass": (lambda: bn(sub(make())), "x is a Sub"),
    "subclass residual": (lambda: bn(make(), residual=sub(make())), "residual is a Sub"),
    "subclass parameter": (lambda: bn(make(), sub(torch.ones(C))), "a parameter is a Sub"),
    "dtype": (
        lambda: functional.add_relu(torch.ones(3).int(), torch.ones(3).int()),
        "no kernels for dtype torch.int32",
    ),
    "empty": (lambda: bn(make((0, C, 4, 5))), "x is empty"),
    "layout": (
        lambda: functional.add_relu(make().to_sparse(), make().to_sparse()),
        "x has layout torch.sparse_coo",
    ),
    "residual shape": (
        lambda: functional.add_relu(make(), make((5,))),
        "residual differs from x in shape, dtype or device",
    ),
    "residual dtype": (
        lambda: bn(make(dtype=torch.bfloat16), residual=make()),
        "residual differs from x in shape, dtype or device",
    ),
    "vmap": (
        lambda: vmap(lambda x: bn(x))(make((2, 2, C, 4, 5))),
        "a torch.func transform is active",
    ),
    "grad": (lambda: grad(lambda x: bn(x).sum())(make()), "a torch.func transform is active"),
    "forward mode": (lambda: _jvp(make()), "forward-mode differentiation is active"),
    "trace": (
        lambda: torch.jit.trace(lambda x: bn(x), make(), check_trace=False),
        "torch.jit.trace is active: the graph holds standard operators",
    ),
    "meta": (
        lambda: functional.add_relu(make().to("meta"), make().to("meta")),
        "no kernels for device meta",
    ),
}


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", REASONS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_every_reason_is_reached(name: str) -> None:
    call, reason = REASONS[name]
    with dispatch.recording() as events:
        call()
    assert events
    assert {(e.impl, e.reason) for e in events} == {("reference", reason)}


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("x", "weight", "running", "reason"),
    [
        (
            torch.float32,
            torch.float64,
            None,
            "x is torch.float32 and the parameters are torch.float64",
        ),
        (
            torch.float64,
            torch.float32,
            None,
            "x is torch.float64 and the parameters are torch.float32",
        ),
        (
            torch.bfloat16,
            torch.float16,
            None,
            "x is torch.bfloat16 and the parameters are torch.float16",
        ),
        (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
            "parameters and statistics differ in dtype",
        ),
    ],
    ids=str,
)
def test_dtypes_that_only_the_reference_takes(x, weight, running, reason: str) -> None:
    """Asked of the chooser: what PyTorch itself makes of them differs by device."""
    stats = torch.zeros(C).to(running or weight), torch.ones(C).to(running or weight)
    with dispatch.recording() as events:
        impl = dispatch.choose(
            "batch_norm_act", make(dtype=x), None, torch.ones(C).to(weight), None, *stats
        )
    assert impl == "reference"
    assert events == [Event("batch_norm_act", "reference", reason)]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    "x", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kind", ["bare", "same dtype", "float32"])
def test_fast_calls_give_no_reason(x: torch.dtype, kind: str) -> None:
    if kind == "float32" and x == torch.float64:
        pytest.skip("float64 goes with float64")
    parameter = nn.Parameter(torch.ones(C).to(torch.float32 if kind == "float32" else x))
    weight = None if kind == "bare" else parameter
    stats = (None, None) if kind == "bare" else (parameter.detach().clone(), parameter.detach())
    with dispatch.recording() as events:
        bn(make(dtype=x), weight, stats=stats, training=True, residual=make(dtype=x))
        functional.add_relu(nn.Parameter(make(dtype=x)), make(dtype=x))
    assert events == [Event("batch_norm_act", "cpu", ""), Event("add_relu", "cpu", "")]


@pytest.mark.usefixtures("loaded")
def test_asked_for_implementations() -> None:
    x = make()
    with dispatch.recording() as events:
        for name in ("reference", "cpu", "cuda"):
            with rf.use_backend(name):
                functional.add_relu(x, x)
        with rf.use_backend("cpu"):
            functional.add_relu(x.to("meta"), x.to("meta"))
    assert [e[1:] for e in events] == [
        ("reference", "use_backend('reference')"),
        ("cpu", ""),
        ("reference", "use_backend('cuda'), and x is on cpu"),
        ("reference", "use_backend('cpu'), and x is on meta"),
    ]


def test_an_extension_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_why_unavailable", "it was left at home")
    assert not rf.is_available()
    assert rf.why_unavailable() == "it was left at home"
    with dispatch.recording() as events:
        functional.add_relu(make(), make())
    assert events == [Event("add_relu", "reference", "it was left at home")]


# ---- the reference gives what eager gives --------------------------------------------------------
def eager(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias) + 2 * x)


def ours(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return functional.batch_norm_act(x, weight, bias, mean, var, residual=2 * x)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, a: grad(lambda x, w: f(x, w, *a[2:]).square().sum(), argnums=(0, 1))(*a[:2]),
    "jvp": lambda f, a: jvp(lambda x, w: f(x, w, *a[2:]), a[:2], (a[0] * 0.5, a[1] * 0.5)),
    "vmap": lambda f, a: vmap(lambda x: f(x, *a[1:]))(torch.stack([a[0], a[0] + 1])),
    "per-sample": lambda f, a: vmap(
        grad(lambda w, x: f(x[None], w, *a[2:]).square().sum()), in_dims=(None, 0)
    )(a[1], a[0]),
    "jacrev": lambda f, a: jacrev(lambda w: f(a[0], w, *a[2:]).sum((0, 2, 3)))(a[1]),
    "hessian": lambda f, a: torch.func.hessian(lambda w: f(a[0], w, *a[2:]).pow(3).sum())(a[1]),
}


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_equals_eager(name: str) -> None:
    args = (make(), torch.rand(C), torch.randn(C), torch.randn(C), torch.rand(C) + 0.5)
    with dispatch.recording() as events:
        got = TRANSFORMS[name](ours, args)
    assert {e.impl for e in events} == {"reference"}
    torch.testing.assert_close(got, TRANSFORMS[name](eager, args))


class Block(nn.Module):
    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.bn, self.op = nn.BatchNorm2d(C), op

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return self.op(x, bn.weight, bn.bias, bn.running_mean, bn.running_var)


@pytest.mark.implementations("reference", "plain", "cpu", "emulated")
def test_functional_call_equals_eager(impl) -> None:
    """With no transform around it, functional_call stays on the fast path."""
    state = {"bn.weight": torch.rand(C), "bn.running_mean": torch.randn(C)}
    x = make()
    with dispatch.recording() as events:
        got = functional_call(Block(ours), state, (x,))
    assert [e.impl for e in events] == [impl.ran]
    torch.testing.assert_close(got, functional_call(Block(eager), state, (x,)))


# ---- settings ------------------------------------------------------------------------------------
def test_use_backend_sets_and_restores() -> None:
    assert config.backend() == "auto"
    with rf.use_backend("cpu"):
        with rf.use_backend("reference"):
            assert config.backend() == "reference"
        assert config.backend() == "cpu"
    assert config.backend() == "auto"
    with pytest.raises(KeyError), rf.use_backend("reference"):
        raise KeyError
    assert config.backend() == "auto"
    rf.use_backend("reference")
    assert config.backend() == "reference"
    rf.use_backend("auto")
    assert config.backend() == "auto"


@pytest.mark.parametrize("name", ["CPU", "gpu", "", None, 3])
def test_use_backend_refuses_other_names(name: Any) -> None:
    with pytest.raises(ValueError, match=r"auto, reference, cpu, cuda; got"):
        rf.use_backend(name)
    assert config.backend() == "auto"


def test_counters_and_recordings() -> None:
    dispatch.reset_counters()
    x = make()
    with rf.use_backend("reference"), dispatch.recording() as outer:
        functional.add_relu(x, x)
        with dispatch.recording() as inner:
            functional.add_relu(x, x)
            bn(x)
    functional.add_relu(x, x)
    add = Event("add_relu", "reference", "use_backend('reference')")
    norm = add._replace(op="batch_norm_act")
    assert outer == [add, add, norm]
    assert inner == [add, norm]
    assert dispatch.counters()[add] == 2
    assert dispatch.counters()[norm] == 1
    assert sum(dispatch.counters().values()) == 4
    dispatch.counters().clear()
    assert dispatch.counters()
    dispatch.reset_counters()
    assert not dispatch.counters()


def test_a_recording_is_of_its_own_thread() -> None:
    other: list[Event] = []

    def work() -> None:
        with dispatch.recording() as events:
            functional.add_relu(make(), make())
        other.extend(events)

    with dispatch.recording() as mine:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert mine == []
    assert len(other) == 1


def test_require_raises_instead_of_falling_back(monkeypatch: pytest.MonkeyPatch, loaded) -> None:
    monkeypatch.setattr(config, "required", True)
    with pytest.raises(RuntimeError, match=r"REQUIRE=1: batch_norm_act .*x is empty"):
        bn(make((0, C, 4, 5)))
    with rf.use_backend("reference"):  # asked for by name
        assert bn(make((0, C, 4, 5))).shape == (0, C, 4, 5)
    functional.add_relu(make(), make())


def test_log_levels(monkeypatch: pytest.MonkeyPatch, caplog, loaded) -> None:
    caplog.set_level(logging.WARNING, logger="resnet_fast")

    def lines(level: int) -> list[str]:
        dispatch.reset_counters()
        caplog.clear()
        monkeypatch.setattr(config, "log_level", level)
        for _ in range(3):
            bn(make((0, C, 4, 5)))
            functional.add_relu(make(), make())
        return [r.getMessage() for r in caplog.records]

    fallback = "batch_norm_act runs the reference: x is empty"
    assert lines(0) == []
    assert lines(1) == [fallback]
    assert lines(2) == [fallback, "add_relu runs cpu"]


# ---- environment variables, read at import -------------------------------------------------------
PROGRAM = """
import json, torch, resnet_fast as rf
from resnet_fast import config, dispatch
out = {"available": rf.is_available(), "why": rf.why_unavailable(), "required": config.required}
try:
    rf.functional.add_relu(torch.ones(3), torch.ones(3))
except RuntimeError as error:
    out["error"] = str(error)
out["events"] = [list(e) for e in dispatch.counters()]
print(json.dumps(out))
"""


def program(**variables: str) -> tuple[dict[str, Any], str]:
    """What PROGRAM prints with these variables set, and what it says on stderr."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RESNET_FAST_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | variables | {"PYTHONPATH": str(Path(rf.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def test_disable_and_log() -> None:
    out, err = program(RESNET_FAST_DISABLE="1", RESNET_FAST_LOG="1")
    reason = "RESNET_FAST_DISABLE=1 is set"
    assert (out["available"], out["why"]) == (False, reason)
    assert out["events"] == [["add_relu", "reference", reason]]
    assert f"add_relu runs the reference: {reason}" in err


def test_require() -> None:
    out, err = program(RESNET_FAST_DISABLE="1", RESNET_FAST_REQUIRE="1")
    assert out["required"]
    assert "RESNET_FAST_REQUIRE=1: add_relu would run the reference" in out["error"]
    assert "add_relu" not in err
