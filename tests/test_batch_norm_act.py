# SPDX-License-Identifier: BSD-3-Clause
"""batch_norm_act against PyTorch's three operators, by the tolerance rule of oracle.py.

Tables of cases first; below them what needs a test of its own. Gradients of the gradient are in
test_gradcheck.py, errors in test_bad_input.py, saved tensors in test_autograd.py.
"""

from __future__ import annotations

from itertools import product

import cases
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import HALF, Case, word
from layouts import LAYOUTS
from oracle import check

import resnet_fast as rf

DTYPES = ((torch.float64, None), (torch.float32, None))
DTYPES += tuple((d, None) for d in HALF) + tuple((d, d) for d in HALF)  # (x, parameters)
JOINS = (("none", "relu"), ("none", None), ("tensor", "relu"), ("tensor", None), ("same", "relu"))
SHAPES = (
    (2, 1, 4, 5),
    (4, 3, 7, 7),
    (1, 16, 7, 7),
    (5, 65, 1, 1),
    (2, 1000, 1, 2),
    (7, 13),
    (3, 16, 129),
    (1, 7, 50),
    (2, 5, 3, 4, 6),
    (2, 8, 33, 31),
)


def _layouts() -> list[Case]:
    """Every dtype, layout, mode and join on one odd shape."""
    modes, joins = (True, False), ("none", "tensor")
    cases = [
        Case(dtype=d, param_dtype=p, layout=lay, training=t, residual=r)
        for (d, p), lay, t, r in product(DTYPES, LAYOUTS, modes, joins)
    ]
    cases += [
        Case(dtype=d, param_dtype=p, training=t, residual=r, activation=a)
        for (d, p), t, (r, a) in product(DTYPES, modes, JOINS)
    ]
    return cases


def _shapes() -> list[Case]:
    return [
        Case(shape=s, dtype=d, layout=lay, training=t, residual=r)
        for s, d, lay, t, r in product(
            SHAPES,
            (torch.float32, torch.bfloat16),
            ("contiguous", "channels_last"),
            (True, False),
            ("none", "tensor"),
        )
    ]


def _parameters() -> list[Case]:
    """Every optional argument by itself, in both modes, with and without a residual."""
    changes: list[dict] = [{"affine": a} for a in ("none", "weight", "bias")]
    changes += [{"gamma": g} for g in ("zero", "negative")]
    changes += [{"momentum": m} for m in (0.0, 1.0, 0.37)]
    changes += [{"eps": e} for e in (1e-3, 1.0)]
    changes += [{"residual": "frozen"}]
    cases = [
        Case(**{"training": t, "residual": r, "dtype": d} | change)
        for change, t, r, d in product(
            changes, (True, False), ("none", "tensor"), (torch.float32, torch.bfloat16)
        )
    ]
    cases += [
        Case(running=False, affine=a, residual=r, dtype=d)
        for a, r, (d, _) in product(("both", "none"), ("none", "tensor"), DTYPES[:4])
    ]
    return cases


def _mixed() -> list[Case]:
    """x, residual and gradient each in a layout of its own."""
    cases = [
        Case(layout=x, residual="tensor", residual_layout=r, grad_layout=g)
        for x, r, g in product(
            ("contiguous", "channels_last", "permuted"),
            LAYOUTS,
            ("contiguous", "channels_last", "expanded", "scalar"),
        )
    ]
    cases += [
        Case(shape=s, dtype=d, layout=x, grad_layout=g, training=t)
        for s, d, x, g, t in product(
            ((2, 7, 5, 3), (2, 3, 4, 3, 2)),
            (torch.float32, torch.bfloat16),
            ("contiguous", "channels_last"),
            (*LAYOUTS, "scalar"),
            (True, False),
        )
    ]
    return cases


def _values() -> list[Case]:
    """Large means, one huge element, a constant channel."""
    return [
        Case(shape=s, values=v, dtype=d, layout=lay, training=t, residual=r)
        for s, v, d, lay, t, r in product(
            ((8, 4, 9, 9), (32, 16, 7, 7), (3, 65)),
            ("offset", "outlier", "constant"),
            (torch.float64, torch.float32, *HALF),
            ("contiguous", "channels_last"),
            (True, False),
            ("none", "tensor"),
        )
        if not (v == "offset" and d in HALF)  # 1e4 + 1e-2 is one number in these
    ]


def _once(*tables: list[Case]) -> list[Case]:
    return list(dict.fromkeys(case for table in tables for case in table))


@pytest.mark.slow_for("plain")
@pytest.mark.parametrize("case", _once(_layouts(), _shapes(), _parameters()), ids=str)
def test_equals_eager(impl, case: Case) -> None:
    impl.compare(case)


@pytest.mark.slow_for("plain")
@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@pytest.mark.parametrize("case", _once(_mixed()), ids=str)
def test_mixed_layouts(impl, case: Case) -> None:
    impl.compare(case)


@pytest.mark.slow_for("plain", "reference")
@pytest.mark.parametrize("case", _once(_values()), ids=str)
def test_hard_values(impl, case: Case) -> None:
    impl.compare(case)


@pytest.mark.slow
@pytest.mark.implementations("cpu")
@pytest.mark.parametrize("shape", SHAPES, ids=word)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_with_everything(impl, shape: tuple[int, ...], layout: str) -> None:
    for (d, p), t, (r, a), aff, g in product(
        DTYPES, (True, False), JOINS, ("both", "none"), ("contiguous", "channels_last", "expanded")
    ):
        impl.compare(
            Case(
                shape=shape,
                dtype=d,
                param_dtype=p,
                layout=layout,
                training=t,
                residual=r,
                activation=a,
                affine=aff,
                grad_layout=g,
            )
        )


@pytest.mark.implementations("plain", "cpu", "emulated", "cuda")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=word)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", ["none", "tensor"])
def test_large(impl, dtype: torch.dtype, layout: str, residual: str) -> None:
    """Large enough for several threads and blocks, with sizes that no vector divides."""
    impl.compare(Case(shape=(8, 67, 29, 31), dtype=dtype, layout=layout, residual=residual))


# ---- statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean_small_deviation_stays_right(impl, layout: str) -> None:
    """Mean 1e4, deviation 1e-2 in float32: the variance to 1 %, where E[x^2] - E[x]^2 gives 0."""
    inputs = cases.make(Case(shape=(64, 8, 14, 14), values="offset", layout=layout), impl.device)
    mean, var = torch.zeros(8), torch.ones(8)
    y = impl.batch_norm_act(
        inputs.x, None, None, mean, var, training=True, momentum=1.0, eps=1e-9, activation=None
    )
    wide = inputs.x.double()
    dims = (0, 2, 3)
    torch.testing.assert_close(mean.double(), wide.mean(dims), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var(dims), rtol=1e-2, atol=0)
    assert (y.double().std(dims) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics_by_hand(impl, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * batch, the variance divided by n - 1."""
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
    mean, var = torch.tensor([7.0, 8.0]), torch.tensor([2.0, 3.0])
    impl.batch_norm_act(x, None, None, mean, var, training=True, momentum=momentum)
    keep = 1 - momentum
    want_mean = torch.tensor([keep * 7 + momentum * 3, keep * 8 + momentum * 20])
    want_var = torch.tensor([keep * 2 + momentum * 4, keep * 3 + momentum * 300])
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)


def test_eval_leaves_running_statistics_alone(impl) -> None:
    inputs = cases.make(Case(training=False), impl.device)
    before = inputs.running_mean.clone(), inputs.running_var.clone()
    oracle.run(impl.batch_norm_act, inputs, Case(training=False))
    assert torch.equal(inputs.running_mean, before[0])
    assert torch.equal(inputs.running_var, before[1])


@pytest.mark.parametrize("dtype", HALF, ids=word)
def test_half_statistics_are_not_rounded_on_the_way(impl, dtype: torch.dtype) -> None:
    """A batch variance beyond float16's range, times the momentum, is within it."""
    x = torch.tensor([[600.0], [-600.0], [100.0], [0.0]], dtype=dtype)
    mean, var = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    impl.batch_norm_act(x, None, None, mean, var, training=True, momentum=0.1)
    want = 0.9 + 0.1 * x.double().var(0)
    check("running_var", var, want.to(dtype), want)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_parameters_and_statistics_of_any_stride(impl, training: bool) -> None:
    """Every second element of a buffer, or one value for all channels; written where they lie."""
    case = Case(training=training, residual="tensor")
    inputs = cases.make(case, impl.device)
    want = oracle.run(impl.batch_norm_act, inputs, case)
    strided = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        room = torch.full((2 * 7 + 1,), -1.0)
        strided[name] = room[1::2]
        strided[name].copy_(getattr(inputs, name))
    y = impl.batch_norm_act(inputs.x, **strided, residual=inputs.residual, training=training)
    torch.testing.assert_close(y, want["y"])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(strided[name], want[name])
        assert (strided[name]._base[::2] == -1).all(), "written between the elements"
    one = torch.ones(1).expand(7)
    torch.testing.assert_close(
        impl.batch_norm_act(inputs.x, one, None, one.clone(), one.clone()),
        impl.batch_norm_act(inputs.x, one.clone(), None, one, one),
    )


# ---- special values ------------------------------------------------------------------------------
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("into", ["x", "weight", "bias", "running_mean", "running_var", "grad"])
@pytest.mark.parametrize("residual", ["none", "tensor"])
def test_special_values_go_where_eager_has_them(
    impl, special: float, into: str, residual: str
) -> None:
    """NOTE: not an infinite weight: x * inf - mean * inf, as eager has it, is NaN all over, while
    (x - mean) * inf is infinite with the right signs. NaN in a weight is tested."""
    special = float("nan") if into == "weight" else special
    for dtype, training in product((torch.float32, torch.bfloat16), (True, False)):
        case = Case(dtype=dtype, training=training, residual=residual)
        inputs = cases.make(case, impl.device)
        target = getattr(inputs, into)
        target[(1, 2, 3, 1) if target.dim() == 4 else 2] = special
        _assert_special_as_eager(impl, inputs, case)


def _assert_special_as_eager(impl, inputs: cases.Inputs, case: Case) -> None:
    ours = oracle.run(impl.batch_norm_act, inputs, case)
    eager = oracle.run(oracle.eager_batch_norm_act, inputs, case)
    for name, result in ours.items():
        # This is about where they are; the tables above are about how much the rest may differ.
        if name.startswith("running"):  # the mean of a channel with an infinity is inf or NaN
            assert torch.equal(result.isfinite(), eager[name].isfinite()), (name, case)
        else:
            huge = torch.full_like(result, 1e9, dtype=torch.float64)
            check(name, result, eager[name], eager[name].double(), magnitude=huge, context=case)


def test_special_values_in_the_residual(impl) -> None:
    for special, training in product((float("nan"), float("inf"), -float("inf")), (True, False)):
        case = Case(training=training, residual="tensor")
        inputs = cases.make(case, impl.device)
        inputs.residual[1, 2, 3, 1] = special
        _assert_special_as_eager(impl, inputs, case)


@pytest.mark.parametrize("residual", [None, "tensor"])
@pytest.mark.parametrize("gradient", [1.0, float("nan"), float("inf")], ids=str)
def test_gradient_at_exactly_zero_is_zero(impl, residual: str | None, gradient: float) -> None:
    """ReLU passes nothing where y is exactly 0, not even NaN or infinity; -0.0 is 0."""
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.zeros(3, requires_grad=True)
    bias = torch.tensor([0.0, -0.0, 0.0], requires_grad=True)
    other = None if residual is None else torch.zeros(2, 3, 4, 5, requires_grad=True)
    y = impl.batch_norm_act(x, weight, bias, None, None, residual=other, training=True)
    assert not y.detach().any()
    y.backward(torch.full_like(y, gradient))
    for t in (x, weight, bias, other):
        assert t is None or not t.grad.any()


def test_a_constant_channel_gives_the_bias(impl) -> None:
    x = torch.full((4, 2, 3, 3), 3.3)
    bias = torch.tensor([0.5, -0.5])
    y = impl.batch_norm_act(x, torch.ones(2), bias, None, None, training=True)
    want = bias.clamp_min(0).view(1, 2, 1, 1).expand_as(y)
    eager = F.relu(F.batch_norm(x, None, None, torch.ones(2), bias, training=True))
    magnitude = torch.full_like(y, 3.3 * 1e5**0.5 * 6, dtype=torch.float64)
    check("y", y, eager, want.double(), magnitude=magnitude)


# ---- empty and tiny ------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5)], ids=word)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_empty(shape: tuple[int, ...], training: bool, backend: str) -> None:
    """An empty batch: empty output, zero parameter gradients, as eager; statistics as eager's."""
    case = Case(shape=shape, training=training)
    inputs = cases.make(case)
    with rf.use_backend(backend):
        ours = oracle.run(rf.functional.batch_norm_act, inputs, case)
    eager = oracle.run(oracle.eager_batch_norm_act, inputs, case)
    assert ours.keys() == eager.keys()
    for name, result in ours.items():
        torch.testing.assert_close(result, eager[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)], ids=word)
def test_one_value_per_channel_raises_as_eager(impl, shape: tuple[int, ...]) -> None:
    x, mean, var = torch.randn(shape), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        F.batch_norm(x, mean, var, training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value") as ours:
        impl.batch_norm_act(x, None, None, mean, var, training=True)
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    impl.compare(Case(shape=shape, training=False))


# ---- autocast ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALF, ids=word)
@pytest.mark.parametrize("residual", ["none", "tensor"])
def test_under_autocast(impl, dtype: torch.dtype, residual: str) -> None:
    """A half x from a convolution, float32 parameters: what eager gives under autocast."""
    case = Case(dtype=dtype, layout="channels_last", residual=residual)

    def cast(op):
        def under_autocast(*args, **kwargs):
            with torch.autocast(impl.device, dtype=dtype):
                return op(*args, **kwargs)

        return under_autocast

    inputs = cases.make(case, impl.device)
    ours = oracle.run(cast(impl.batch_norm_act), inputs, case)
    eager = oracle.run(cast(oracle.eager_batch_norm_act), inputs, case)
    exact = oracle.run(oracle.exact_batch_norm_act, inputs.to(torch.float64), case)
    sizes = cases.magnitudes(inputs, case)
    for name, result in ours.items():
        check(name, result, eager[name], exact[name], magnitude=sizes[name], context=case)
