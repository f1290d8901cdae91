# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the whole suite: every implementation of the ops as `impl`, seeds, profiles.

`RESNET_FAST_REQUIRE=1 pytest` (what `make test` runs) fails at once where the compiled kernels did
not load; otherwise their absence is one visible skip (test_dispatch.py), never a silent one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# NOTE: taken out of the environment before resnet_fast is imported: the suite also tests calls
# whose right answer is the reference, and those would raise.
REQUIRED = os.environ.pop("RESNET_FAST_REQUIRE", "0") == "1"

import cases  # noqa: E402
import emulated  # noqa: E402
import oracle  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from devices import on_device  # noqa: E402
from torch import Tensor  # noqa: E402

import resnet_fast as rf  # noqa: E402
from resnet_fast import _at_once, _conv_ways, _plain, config, convolution, dispatch, env, functional  # noqa: E402

# Blocks fuse at any size in the tests, whose tensors are small; but in test_blocks_small.py.
BLOCKS_FUSE_FROM, _at_once.SMALL = _at_once.SMALL, 0

try:
    import hypothesis
except ImportError:  # a bare machine: test_properties.py is one visible skip there
    hypothesis = None  # type: ignore[assignment]
else:
    hypothesis.settings.register_profile(
        "fixed",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("fixed")


@dataclass(frozen=True)
class Implementation:
    """One implementation of the ops, in force while a test that asks for `impl` runs.

    Its methods are the public functionals; they also assert that this implementation ran.
    """

    name: str
    backend: str  # for use_backend
    ran: str  # dispatch.Event.impl of its calls
    device: str = "cpu"
    raw: Any = field(default=torch.ops.resnet_fast, compare=False)

    @property
    def fast(self) -> bool:
        """Whether it goes through the raw operators."""
        return self.ran != "reference"

    def missing(self) -> str | None:
        """Why it cannot be tested on this machine; None if it can."""
        if self.name == "emulated":
            return module if isinstance(module := emulated.load(), str) else None
        if self.name == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return rf.why_unavailable(self.name) if self.name in ("cpu", "cuda") else None

    def add_relu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call("add_relu", *args, **kwargs)

    def batch_norm_act(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call("batch_norm_act", *args, **kwargs)

    def conv_bn_act(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call("conv_bn_act", *args, **kwargs)

    def compare(self, case: cases.Case) -> None:
        """Check one case of batch_norm_act by the tolerance rule, its layout too."""
        oracle.compare(case, self.batch_norm_act, self.device, layout_rule=self.fast)

    def _call(self, op: str, *args: Any, **kwargs: Any) -> Tensor:
        with dispatch.recording() as events:
            function = getattr(functional, op)
            if self.device == "cpu":
                y = function(*args, **kwargs)
            else:
                y = on_device(self.device, function, args, kwargs)
        assert {e.impl for e in events} == {self.ran}, f"{self.name} was to run: {events}"
        return y


# "plain": the raw operators in plain PyTorch behind the same autograd.Function, as on a device
# without kernels of its own. "emulated": the CUDA kernels on the CPU. "cuda": tests hand over
# tensors of the CPU all the same, see devices.py.
IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation("reference", backend="reference", ran="reference"),
        Implementation("plain", backend="auto", ran="cpu", raw=_plain),
        Implementation("cpu", backend="cpu", ran="cpu"),
        Implementation("emulated", backend="auto", ran="emulated", raw=emulated.operators),
        Implementation("cuda", backend="cuda", ran="cuda", device="cuda"),
    )
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: larger sweeps, run only by an explicit -m")
    config.addinivalue_line("markers", "implementations(*names): which of them `impl` takes")
    config.addinivalue_line("markers", "slow_for(*names): those of them whose tests are slow ones")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    # Small tensors need no second thread, and xdist's workers share the cores: see two_threads.
    torch.set_num_threads(1)
    # Convolutions are compared with float64: not in TF32, cuDNN's default.
    torch.backends.cudnn.allow_tf32 = False
    if REQUIRED and not rf.is_available():
        pytest.exit(f"RESNET_FAST_REQUIRE=1: {rf.why_unavailable()}", returncode=3)


def pytest_report_header() -> str:
    states = (f"{i.name} ({i.missing() or 'tested'})" for i in IMPLEMENTATIONS.values())
    return "resnet_fast implementations: " + ", ".join(states)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `impl` every implementation there is here, or those that @implementations names."""
    if "impl" not in metafunc.fixturenames:
        return
    named = metafunc.definition.get_closest_marker("implementations")
    names = named.args if named else IMPLEMENTATIONS
    slow = metafunc.definition.get_closest_marker("slow_for")
    here = [
        pytest.param(n, marks=pytest.mark.slow if slow and n in slow.args else ())
        for n in names
        if IMPLEMENTATIONS[n].missing() is None
    ]
    metafunc.parametrize("impl", here, indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An Implementation, switched on for the test."""
    chosen = IMPLEMENTATIONS[request.param]
    if chosen.name in ("plain", "emulated"):
        monkeypatch.setattr(env, "_why_unavailable", None)
        monkeypatch.setitem(dispatch._fast, "cpu", chosen.ran)
        for op in emulated.OPS:
            monkeypatch.setattr(functional, f"_{op}", getattr(chosen.raw, op))
        for op in ("add_relu_inference", "batch_norm_act_inference"):  # the CPU's alone
            monkeypatch.setattr(functional, f"_{op}", getattr(_plain, op))
    with rf.use_backend(chosen.backend):
        yield chosen


INSTRUCTION_SETS = {"baseline": 0, "avx2": 1, "avx512": 2}


@pytest.fixture(params=list(INSTRUCTION_SETS))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor runs, its CPU kernels switched on for the test."""
    if not rf.is_available():
        pytest.skip(str(rf.why_unavailable()))
    library = ctypes.CDLL(str(Path(rf.__file__).parent / "_kernels.so"))
    choose = library.resnet_fast_use_instruction_set
    if choose(INSTRUCTION_SETS[request.param]) != 0:
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    widest = max(value for value in INSTRUCTION_SETS.values() if choose(value) == 0)
    assert choose(widest) == 0
    assert choose(99) == -1


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run the test with two threads; all others run with one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def every_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own convolutions from one multiplication on, on a processor without 16-bit instructions.

    Otherwise they start at sizes that would make a slow suite.
    """
    for dtype in _conv_ways.FROM_MACS:
        monkeypatch.setitem(_conv_ways.FROM_MACS, dtype, 1)
    monkeypatch.setattr(convolution, "FROM_NUMEL", 0)
    monkeypatch.setattr(_conv_ways, "_ways", {})
    monkeypatch.setattr(_conv_ways, "has_instructions", lambda dtype: False)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts from the same seed and leaves the global settings as they were."""
    torch.manual_seed(0)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    left = (config.backend(), torch.get_num_threads(), torch.is_grad_enabled())
    assert left == ("auto", threads, grad), f"a test changed the process: {left}"
