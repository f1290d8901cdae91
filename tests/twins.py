# SPDX-License-Identifier: BSD-3-Clause
"""A model and its untouched twin: the same step through both, everything compared, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import dispatch, env

Results = dict[str, Tensor]


def randomise(model: Any, seed: int = 0) -> Any:
    """float64, with every parameter and statistic away from its initial 0 or 1."""
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if not isinstance(m, nn.BatchNorm2d):
                continue
            for name in ("weight", "bias", "running_mean"):
                t = getattr(m, name)
                if t is not None:
                    t.copy_(torch.randn(t.shape, generator=generator) * 0.5 + (name == "weight"))
            if m.running_var is not None:
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
    return model


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(model: Any, x: Tensor, steps: int = 1) -> Results:
    """Forward and backward: the last output, all gradients, all buffers."""
    x = x.detach().clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(steps):
        y = model(x)
        y.backward(image(*y.shape, seed=2, dtype=y.dtype))
    results = {"y": y.detach(), "x.grad": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"{name}.grad"] = parameter.grad
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(ours: Results, theirs: Results, rtol: float = 1e-9, floor: float = 0.0) -> None:
    """Same names in the same order, and float64 values equal but for the order of additions.

    rtol: the largest difference, relative to the largest value of the tensor. floor: what is
    allowed besides, for a gradient that is zero but for the rounding of much larger terms.
    """
    assert list(ours) == list(theirs)
    for name, t in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (t.dtype, t.shape), name
        if not t.is_floating_point() or t.numel() == 0:
            assert torch.equal(ours[name], t), name
            continue
        # Not assert_close: its ten temporaries are what takes the time with 10^8 parameters.
        error, size = float((ours[name] - t).abs_().max()), float(t.abs().max())
        assert error <= rtol * size + floor, (
            f"{name}: largest difference {error:.3g}, value {size:.3g}"
        )


def twin(model: Any) -> Any:
    return copy.deepcopy(model)


class Log(list[Any]):
    """What hooks saw, as copies; `same_as` compares it with the twin's."""

    expected = False  # set where hooks must have been called

    def add(self, what: str, *values: Any) -> None:
        self.append((what, [v.detach().clone() if isinstance(v, Tensor) else v for v in values]))

    def same_as(self, other: Log) -> None:
        assert self or not self.expected
        assert [what for what, _ in self] == [what for what, _ in other]
        for (what, ours), (_, theirs) in zip(self, other, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                if isinstance(b, Tensor):
                    torch.testing.assert_close(
                        a, b, rtol=1e-9, atol=1e-9, msg=lambda m, what=what: f"{what}: {m}"
                    )
                else:
                    assert a == b, what


def reasons(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """(op, reason) of everything that fell back to the reference during a call.

    Not for want of the compiled kernels: the tests that ask are about everything else.
    """
    with dispatch.recording() as events:
        call()
    missing = env.why_unavailable()
    return [(e.op, e.reason) for e in events if e.impl == "reference" and e.reason != missing]
