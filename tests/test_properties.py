# SPDX-License-Identifier: BSD-3-Clause
"""Any shape, layout, dtype and option that hypothesis can think of, by the same rules.

The profile of conftest.py draws the same examples in every run; the slow tests draw many more.
"""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import HALF, Case
from layouts import LAYOUTS, lay
from test_add_relu import assert_same_as_eager

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, *HALF)
FEW, MANY = 60, 1000


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(N, C, *) of at most some thousand elements, sizes near vectors and blocks preferred."""
    n = draw(st.sampled_from((1, 2, 3, 5)))
    c = draw(st.one_of(st.integers(1, 40), st.sampled_from((64, 65, 127, 256, 1000))))
    rest = draw(st.sampled_from((0, 1, 2, 2, 2, 3)))
    most = max(1, 6000 // (n * c))
    sizes = []
    for _ in range(rest):
        size = draw(st.integers(1, min(17, most)))
        most = max(1, most // size)
        sizes.append(size)
    return (n, c, *sizes)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    dtype = draw(st.sampled_from(DTYPES))
    training = draw(st.booleans())
    count = 1
    for i, size in enumerate(shape):
        count *= 1 if i == 1 else size
    assume(count > 1 or not training)
    values = ("normal", "outlier", "constant") + (() if dtype in HALF else ("offset",))
    return Case(
        shape=shape,
        dtype=dtype,
        param_dtype=draw(st.sampled_from((None, dtype))),
        layout=draw(st.sampled_from(LAYOUTS)),
        training=training,
        activation=draw(st.sampled_from(("relu", None))),
        affine=draw(st.sampled_from(("both", "weight", "bias", "none"))),
        gamma=draw(st.sampled_from(("normal", "zero", "negative"))),
        running=draw(st.booleans()) if training else True,
        residual=draw(st.sampled_from(("none", "tensor", "same", "frozen"))),
        residual_layout=draw(st.sampled_from((None, *LAYOUTS))),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
        momentum=draw(st.sampled_from((0.1, 0.0, 1.0, 0.9))),
        eps=draw(st.sampled_from((1e-5, 1e-3))),
        values=draw(st.sampled_from(values)),
        seed=draw(st.integers(0, 3)),
    )


@pytest.mark.slow_for("plain", "emulated")
@given(case=any_case())
@settings(max_examples=FEW)
def test_batch_norm_act(impl, case: Case) -> None:
    impl.compare(case)


@pytest.mark.slow
@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@given(case=any_case())
@settings(max_examples=MANY)
def test_batch_norm_act_many(impl, case: Case) -> None:
    impl.compare(case)


@st.composite
def joins(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual and gradient, with some zeros of either sign and some specials among them."""
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0])
    made = []
    for _ in range(3):
        values = torch.randn(shape, generator=rng)
        swapped = torch.rand(shape, generator=rng) < 0.2
        which = torch.randint(len(special), shape, generator=rng)
        values = torch.where(swapped, special[which], values).to(dtype)
        made.append(lay(values, draw(st.sampled_from(LAYOUTS))))
    return made[0], made[1], made[2]


@given(tensors=joins())
@settings(max_examples=FEW)
def test_add_relu(impl, tensors: tuple[torch.Tensor, ...]) -> None:
    assert_same_as_eager(impl, *tensors)


@pytest.mark.slow
@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@given(tensors=joins())
@settings(max_examples=MANY)
def test_add_relu_many(impl, tensors: tuple[torch.Tensor, ...]) -> None:
    assert_same_as_eager(impl, *tensors)


@pytest.mark.slow_for("plain", "emulated")
@given(shape=shapes(), training=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=FEW)
def test_layout_changes_no_number_much(impl, shape, training: bool, seed: int) -> None:
    """channels_last and contiguous are two orders of the same sums, each within the rule; here
    the statistics of the two are compared with each other."""
    assume(shape[0] * torch.Size(shape[2:]).numel() > 1)
    case = Case(shape=shape, training=training, seed=seed)
    inputs = cases.make(case)
    one = oracle.run(impl.batch_norm_act, inputs, case)
    inputs.x = lay(inputs.x, "channels_last")
    other = oracle.run(impl.batch_norm_act, inputs, case)
    sizes = cases.magnitudes(inputs, case)
    for name, result in one.items():
        oracle.check(name, other[name], result, result.double(), magnitude=2 * sizes[name])
