# SPDX-License-Identifier: BSD-3-Clause
"""The test of the tests: the tolerance rule rejects planted errors and accepts honest rounding."""

from __future__ import annotations

import cases
import layouts
import oracle
import pytest
import torch
from cases import Case
from layouts import lay
from oracle import check, eager_batch_norm_act
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _wrong_eps(args, named):
    return eager_batch_norm_act(*args, **named | {"eps": 1e-3})


def _wrong_momentum(args, named):
    return eager_batch_norm_act(*args, **named | {"momentum": named["momentum"] + 1e-2})


def _larger_bias(args, named):
    return eager_batch_norm_act(*args[:2], 1.1 * args[2], *args[3:], **named)


def _residual_after(args, named):
    y = eager_batch_norm_act(*args, **named | {"residual": None})
    return y + named["residual"]


def _unbiased_batch_variance(args, named):
    x, n = args[0], args[0].numel() // args[0].size(1)
    y = eager_batch_norm_act(*args, **named | {"activation": None, "residual": None})
    y = y * ((n - 1) / n) ** 0.5 + named["residual"]
    return torch.relu(y).to(x.dtype)


def _one_gradient_too_much(args, named):
    y = eager_batch_norm_act(*args, **named)
    extra = torch.zeros_like(args[0])
    extra.view(-1)[3] = 0.25
    return y + (args[0] - args[0].detach()) * extra


PLANTED = {
    f.__name__.strip("_"): f
    for f in (
        _wrong_eps,
        _wrong_momentum,
        _larger_bias,
        _residual_after,
        _unbiased_batch_variance,
        _one_gradient_too_much,
    )
}


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.word)
@pytest.mark.parametrize("planted", PLANTED)
def test_rule_rejects_a_planted_error(planted: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, residual="tensor")
    with pytest.raises(AssertionError, match="elements are off"):
        oracle.compare(case, lambda *args, **named: PLANTED[planted](args, named))


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.word)
def test_rule_accepts_one_rounding(dtype: torch.dtype) -> None:
    """The oracle, computed in float64 and rounded once, passes as if it were ours."""

    def rounded(*args: Tensor | None, **named: object) -> Tensor:
        mean, var = args[3:]
        wide = [None if t is None else t.double().clone() for t in args]
        residual = named["residual"].double()
        y = oracle.exact_batch_norm_act(*wide, **named | {"residual": residual}).to(dtype)
        mean.copy_(wide[3])
        var.copy_(wide[4])
        return y

    oracle.compare(Case(dtype=dtype, residual="tensor"), rounded)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("residual", ["none", "tensor", "same"])
def test_the_oracle_is_what_pytorch_computes(training: bool, affine: str, residual: str) -> None:
    case = Case(dtype=torch.float64, training=training, affine=affine, residual=residual)
    inputs = cases.make(case)
    exact = oracle.run(oracle.exact_batch_norm_act, inputs, case)
    eager = oracle.run(eager_batch_norm_act, inputs, case)
    assert exact.keys() == eager.keys()
    for name, result in exact.items():
        torch.testing.assert_close(result, eager[name], rtol=1e-11, atol=1e-12)


def test_message_names_shape_layout_dtype_errors_and_five_elements() -> None:
    right = torch.linspace(1, 2, 24, dtype=torch.float64).view(2, 3, 2, 2)
    wrong = right.float()
    wrong[1] += 0.5
    with pytest.raises(AssertionError) as caught:
        check("y", wrong, right.float(), right, context="a case")
    message = str(caught.value)
    for part in ("y: (2, 3, 2, 2) torch.float32 strides (12, 4, 2, 1) [a case]", "12 of 24"):
        assert part in message
    assert "max error 0.5 (eager " in message
    assert message.count("  at [1,") == 5


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_rule_rejects_a_special_value_out_of_place(special: float) -> None:
    right = torch.ones(2, 3, dtype=torch.float64)
    eager = right.clone()
    eager[0, 1] = special
    for wrong in (right, -eager, eager.flip(1) * 0):
        with pytest.raises(AssertionError, match="NaN or infinity not where"):
            check("y", torch.where(wrong.isnan(), 7.0, wrong), eager, eager)
    check("y", eager.clone(), eager, eager)


def test_a_channel_is_judged_by_its_own_size() -> None:
    """An error of 1e-3 in a channel of size 1 shows beside a channel of size 1e6."""
    right = torch.ones(4, 2, 3, dtype=torch.float64)
    right[:, 1] = 1e6
    wrong = right.float()
    wrong[0, 0, 0] += 1e-3
    check("y", wrong, right.float(), right)
    with pytest.raises(AssertionError, match="1 of 24 elements"):
        check("y", wrong, right.float(), right, channel=1)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 5, 3, 4), (2, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_layouts_hold_the_values_in_other_strides(layout: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    t = lay(values, layout)
    assert torch.equal(t, values[:1].expand(shape) if layout == "expanded" else values)
    dense = layout == "contiguous" or (layout == "channels_last" and len(shape) < 4)
    assert t.is_contiguous() == dense


def test_kink_gets_no_gradient() -> None:
    case = Case(shape=(16, 8, 7, 7), dtype=torch.bfloat16)
    inputs = cases.make(case)
    near = cases.kink(inputs, case)
    assert 0 < near.float().mean() < 0.1
    assert not inputs.grad[near].any()
    assert inputs.grad[~near].all()
