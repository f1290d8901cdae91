# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: a sentence that names the argument, what came and what it must be; no crash; and
running statistics as they were.

The public functions first, under every implementation, then the raw operators called directly.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _plain, dispatch, functional

C, SHAPE = 3, (2, 3, 4, 5)


def arguments() -> dict[str, Any]:
    """A good call of batch_norm_act in training."""
    return {
        "x": torch.randn(SHAPE),
        "weight": torch.ones(C),
        "bias": torch.zeros(C),
        "running_mean": torch.full((C,), 0.25),
        "running_var": torch.full((C,), 0.75),
        "residual": None,
        "training": True,
    }


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# changes to the good call, the exception, and what its sentence must hold
PUBLIC: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "x-list": ({"x": [1.0]}, TypeError, ("x must be a tensor", "got list")),
    "x-none": ({"x": None}, TypeError, ("x must be a tensor", "got NoneType")),
    "x-1d": ({"x": torch.ones(3)}, ValueError, ("x must have 2 or more dim", "got shape (3,)")),
    "x-integer": ({"x": torch.ones(SHAPE, dtype=torch.int32)}, TypeError, ("x ", "int32")),
    "weight-long": ({"weight": torch.ones(4)}, ValueError, ("weight", "(3,)", "got (4,)")),
    "weight-2d": ({"weight": torch.ones(3, 1)}, ValueError, ("weight", "(3,)", "got (3, 1)")),
    "weight-scalar": ({"weight": torch.ones(())}, ValueError, ("weight", "(3,)", "got ()")),
    "weight-float": ({"weight": 1.0}, TypeError, ("weight must be a tensor", "got float")),
    "weight-integer": (
        {"weight": torch.ones(C, dtype=torch.int64)},
        TypeError,
        ("weight", "int64"),
    ),
    "weight-double": ({"weight": torch.ones(C).double()}, TypeError, ("weight", "float64")),
    "bias-short": ({"bias": torch.ones(2)}, ValueError, ("bias", "(3,)", "got (2,)")),
    "bias-list": ({"bias": [0.0] * 3}, TypeError, ("bias must be a tensor", "got list")),
    "mean-long": (
        {"running_mean": torch.ones(30)},
        ValueError,
        ("running_mean", "(3,)", "got (30,)"),
    ),
    "var-short": ({"running_var": torch.ones(1)}, ValueError, ("running_var", "(3,)", "got (1,)")),
    "var-half": ({"running_var": torch.ones(C).half()}, TypeError, ("running_var", "float16")),
    "mean-alone": ({"running_var": None}, ValueError, ("running_mean", "running_var", "None")),
    "var-alone": ({"running_mean": None}, ValueError, ("running_mean", "running_var", "None")),
    "eval-no-mean": (
        {"running_mean": None, "training": False},
        ValueError,
        ("running_mean must be a tensor when training is False", "got None"),
    ),
    "eval-no-var": (
        {"running_var": None, "training": False},
        ValueError,
        ("running_var must be a tensor when training is False", "got None"),
    ),
    "residual-shape": (
        {"residual": torch.ones(2, 3, 4, 6)},
        ValueError,
        ("residual", "(2, 3, 4, 5)", "got (2, 3, 4, 6)"),
    ),
    "residual-int": ({"residual": 3}, TypeError, ("residual must be a tensor", "got int")),
    "activation-gelu": ({"activation": "gelu"}, ValueError, ("activation", '"relu"', "'gelu'")),
    "activation-false": ({"activation": False}, ValueError, ("activation", '"relu"', "False")),
    "activation-list": ({"activation": ["relu"]}, ValueError, ("activation", '"relu"', "['relu']")),
    "eps-zero": ({"eps": 0.0}, ValueError, ("eps", "positive", "got 0.0")),
    "eps-negative": ({"eps": -1.0}, ValueError, ("eps", "positive", "got -1.0")),
    "eps-negative-eval": (
        {"eps": -1.0, "training": False},
        ValueError,
        ("eps", "non-negative", "got -1.0"),
    ),
    "eps-text": ({"eps": "small"}, TypeError, ("eps", "float", "str")),
    "eps-none": ({"eps": None}, TypeError, ("eps", "float", "NoneType")),
    "momentum-none": ({"momentum": None}, TypeError, ("momentum", "float", "NoneType")),
    "momentum-text": ({"momentum": "0.1"}, TypeError, ("momentum", "float", "str")),
    "one-value": ({"x": torch.ones(1, 3, 1, 1)}, ValueError, ("more than 1 value", "[1, 3, 1, 1]")),
}


@pytest.mark.parametrize("what", PUBLIC)
def test_batch_norm_act(impl, what: str) -> None:
    changes, exception, words = PUBLIC[what]
    given = arguments() | changes
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    with pytest.raises(exception) as caught:
        functional.batch_norm_act(**given)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    for name, was in before.items():
        assert torch.equal(given[name], was), f"{name} was written"


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_another_device(impl, name: str, training: bool) -> None:
    """A tensor on another device (meta stands for any) raises, as it does in PyTorch."""
    given = arguments() | {name: meta(*(SHAPE if name == "residual" else (C,)))}
    given["training"] = training
    statistics = [
        (given[k], given[k].clone())
        for k in ("running_mean", "running_var")
        if given[k].device.type == "cpu"
    ]
    with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
        functional.batch_norm_act(**given)
    for now, was in statistics:
        assert torch.equal(now, was)


@pytest.mark.parametrize(
    ("x", "residual", "exception", "words"),
    [
        (1.0, torch.ones(2), TypeError, ("x must be a tensor", "got float")),
        (torch.ones(2), None, TypeError, ("residual must be a tensor", "got NoneType")),
        (torch.ones(2), torch.ones(3), ValueError, ("residual", "(2,)", "got (3,)")),
        (torch.ones(SHAPE), torch.ones(3, 4), ValueError, ("residual", str(SHAPE), "got (3, 4)")),
        (torch.ones(2), meta(2), (RuntimeError, ValueError), ("device",)),
    ],
    ids=["x-float", "residual-none", "length", "shape", "device"],
)
def test_add_relu(impl, x: Any, residual: Any, exception: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(exception) as caught:
        functional.add_relu(x, residual)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "exception", "words"),
    [
        ({"conv_weight": None}, TypeError, ("conv_weight must be a tensor", "got NoneType")),
        ({"x": 3.0}, TypeError, ("x must be a tensor", "got float")),
        ({"conv_weight": torch.ones(4, 7, 1, 1)}, RuntimeError, ("channels",)),
        ({"weight": torch.ones(5)}, ValueError, ("weight", "(4,)", "got (5,)")),
        ({"residual": torch.ones(2, 4, 1, 2)}, ValueError, ("residual", "(2, 4, 4, 5)")),
    ],
    ids=["conv_weight", "x", "conv-shape", "weight", "residual"],
)
def test_conv_bn_act(impl, changes: dict, exception: Any, words: tuple[str, ...]) -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    given = {"x": torch.randn(SHAPE), "conv_weight": torch.randn(4, 3, 1, 1), "weight": None}
    given |= {"bias": None, "running_mean": mean, "running_var": var, "training": True}
    with pytest.raises(exception) as caught:
        functional.conv_bn_act(**given | changes)
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))


# ---- the raw operators ---------------------------------------------------------------------------
FORWARD = ("x", "weight", "bias", "residual", "running_mean", "running_var")
FORWARD += ("training", "momentum", "eps", "relu", "save_mask")
BACKWARD = ("grad", "x", "mean", "invstd", "weight", "bias", "mask", "training", "relu", "asked")
LONG = torch.ones(C, dtype=torch.int64)


def forward_arguments() -> dict[str, Any]:
    given = arguments() | {"residual": torch.randn(SHAPE)}
    given |= {"momentum": 0.1, "eps": 1e-5, "relu": True, "save_mask": True}
    return {name: given[name] for name in FORWARD}


def backward_arguments() -> dict[str, Any]:
    mask = torch.full((2 * -(-120 // 16),), 255, dtype=torch.uint8)
    values = (torch.randn(SHAPE), torch.randn(SHAPE), torch.zeros(C), torch.ones(C))
    values += (torch.ones(C), torch.zeros(C), mask, True, True, [True] * 4)
    return dict(zip(BACKWARD, values, strict=True))


FORWARD_BAD: dict[str, dict[str, Any]] = {
    "x-0d": {"x": torch.ones(())},
    "x-1d": {"x": torch.ones(3)},
    "x-integer": {"x": torch.ones(SHAPE, dtype=torch.int32), "residual": None},
    "x-complex": {"x": torch.ones(SHAPE, dtype=torch.complex64), "residual": None},
    "x-bool": {"x": torch.ones(SHAPE, dtype=torch.bool), "residual": None},
    "weight-long": {"weight": torch.ones(4)},
    "weight-empty": {"weight": torch.ones(0)},
    "weight-2d": {"weight": torch.ones(1, 3)},
    "weight-integer": {"weight": LONG},
    "bias-short": {"bias": torch.ones(1)},
    "bias-integer": {"bias": LONG},
    "mean-long": {"running_mean": torch.ones(300)},
    "mean-integer": {"running_mean": LONG},
    "var-short": {"running_var": torch.ones(2)},
    "var-integer": {"running_var": LONG},
    "eval-without-mean": {"training": False, "running_mean": None},
    "eval-without-var": {"training": False, "running_var": None},
    "residual-shape": {"residual": torch.randn(2, 3, 4, 4)},
    "residual-dims": {"residual": torch.randn(2, 3, 20)},
    "residual-half": {"residual": torch.randn(SHAPE).half()},
    "x-none": {"x": None},
    "relu-text": {"relu": "relu"},
    "momentum-none": {"momentum": None},
} | {f"{n}-meta": {n: meta(C)} for n in ("weight", "bias", "running_mean", "running_var")}
FORWARD_BAD["residual-meta"] = {"residual": meta(*SHAPE)}

_MASK = torch.zeros(16, dtype=torch.uint8)
BACKWARD_BAD: dict[str, dict[str, Any]] = {
    "grad-shape": {"grad": torch.randn(2, 3, 4, 4)},
    "grad-half": {"grad": torch.randn(SHAPE).half()},
    "grad-integer": {"grad": torch.ones(SHAPE, dtype=torch.int32)},
    "grad-meta": {"grad": meta(*SHAPE)},
    "x-1d": {"x": torch.ones(3), "grad": torch.ones(3)},
    "x-integer": {k: torch.ones(SHAPE, dtype=torch.int32) for k in ("x", "grad")},
    "mean-long": {"mean": torch.ones(4)},
    "mean-short": {"mean": torch.ones(1)},
    "mean-meta": {"mean": meta(C)},
    "invstd-2d": {"invstd": torch.ones(3, 1)},
    "invstd-meta": {"invstd": meta(C)},
    "weight-long": {"weight": torch.ones(4)},
    "weight-integer": {"weight": LONG},
    "weight-meta": {"weight": meta(C)},
    "bias-short": {"bias": torch.ones(2)},
    "bias-meta": {"bias": meta(C)},
    "mask-short": {"mask": _MASK[:14]},
    "mask-long": {"mask": torch.zeros(18, dtype=torch.uint8)},
    "mask-empty": {"mask": _MASK[:0]},
    "mask-2d": {"mask": _MASK.view(2, 8)},
    "mask-bool": {"mask": _MASK.bool()},
    "mask-int8": {"mask": _MASK.to(torch.int8)},
    "mask-int32": {"mask": torch.zeros(4, dtype=torch.int32)},
    "mask-meta": {"mask": _MASK.to("meta")},
    "asked-short": {"asked": [True] * 3},
    "asked-long": {"asked": [True] * 5},
}
ADD_FORWARD_BAD: dict[str, tuple[Any, ...]] = {
    "shape": (torch.ones(SHAPE), torch.ones(2, 3, 4, 4), True),
    "broadcast": (torch.ones(SHAPE), torch.ones(5), True),
    "dtype": (torch.ones(SHAPE), torch.ones(SHAPE).half(), True),
    "integer": (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32), True),
    "complex": (torch.ones(3) + 0j, torch.ones(3) + 0j, True),
    "meta": (torch.ones(SHAPE), meta(*SHAPE), True),
    "none": (torch.ones(SHAPE), None, True),
}
ADD_BACKWARD_BAD: dict[str, tuple[Any, ...]] = {
    "mask-short": (torch.ones(SHAPE), _MASK[:14], False),
    "mask-long": (torch.ones(SHAPE), torch.zeros(32, dtype=torch.uint8), False),
    "mask-dtype": (torch.ones(SHAPE), _MASK.to(torch.int16), False),
    "mask-2d": (torch.ones(SHAPE), _MASK.view(4, 4), False),
    "mask-meta": (torch.ones(SHAPE), _MASK.to("meta"), False),
    "channels_last-3d": (torch.ones(6, 4, 5), _MASK, True),
    "integer": (torch.ones(SHAPE, dtype=torch.int32), _MASK, False),
}
# What the plain implementation computes all the same: PyTorch promotes, or takes any truth value.
PROMOTED = {"x-integer", "x-bool", "weight-integer", "bias-integer", "integer", "relu-text"}
PROMOTED |= {"mean-integer", "var-integer"}


@pytest.fixture(params=["registered", "plain"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The registered operators (C++ where the extension is loaded) and the plain ones."""
    what = request.node.callspec.params.get("what")
    plain = request.param == "plain" or not rf.is_available()
    if plain and what in PROMOTED:
        pytest.skip("the plain implementation promotes")
    return _plain if plain else torch.ops.resnet_fast


def refused(op: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  any Python exception will do
        op(*args)
    assert str(caught.value), "the exception says nothing"


@pytest.mark.parametrize("what", FORWARD_BAD)
def test_raw_forward(ops, what: str) -> None:
    given = forward_arguments() | FORWARD_BAD[what]
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    refused(ops.batch_norm_act_forward, tuple(given.values()))
    for name, was in before.items():
        assert given[name].is_meta or torch.equal(given[name], was), f"{name} was written"


@pytest.mark.parametrize("what", BACKWARD_BAD)
def test_raw_backward(ops, what: str) -> None:
    given = backward_arguments() | BACKWARD_BAD[what]
    refused(ops.batch_norm_act_backward, tuple(given.values()))


@pytest.mark.parametrize("what", ADD_FORWARD_BAD)
def test_raw_add_relu_forward(ops, what: str) -> None:
    refused(ops.add_relu_forward, ADD_FORWARD_BAD[what])


@pytest.mark.parametrize("what", ADD_BACKWARD_BAD)
def test_raw_add_relu_backward(ops, what: str) -> None:
    refused(ops.add_relu_backward, ADD_BACKWARD_BAD[what])


def test_good_arguments_are_good(ops) -> None:
    """The tables above change one thing of calls that work."""
    results = ops.batch_norm_act_forward(*forward_arguments().values())
    assert [tuple(t.shape) for t in results] == [SHAPE, (C,), (C,), (16,)]
    results = ops.batch_norm_act_backward(*backward_arguments().values())
    assert [tuple(t.shape) for t in results] == [SHAPE, SHAPE, (C,), (C,)]
    assert ops.add_relu_forward(torch.ones(SHAPE), torch.ones(SHAPE), True)[0].shape == SHAPE
    assert ops.add_relu_backward(torch.ones(SHAPE), _MASK, True).shape == SHAPE


def test_raw_operators_on_meta_tensors_give_meta_tensors() -> None:
    def to_meta(given: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(v.to("meta") if isinstance(v, Tensor) else v for v in given.values())

    for op, given in (
        (torch.ops.resnet_fast.batch_norm_act_forward, forward_arguments()),
        (torch.ops.resnet_fast.batch_norm_act_backward, backward_arguments()),
    ):
        for on_meta, real in zip(op(*to_meta(given)), op(*given.values()), strict=True):
            assert on_meta.is_meta
            assert (on_meta.shape, on_meta.stride()) == (real.shape, real.stride())


@pytest.mark.parametrize("name", ["mean", "invstd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_raw_statistics_of_another_dtype(ops, name: str, dtype: torch.dtype) -> None:
    """Refused or converted: never read as what they are not."""
    given = backward_arguments()
    want = ops.batch_norm_act_backward(*given.values())
    try:
        got = ops.batch_norm_act_backward(*(given | {name: given[name].to(dtype)}).values())
    except (RuntimeError, TypeError, ValueError):
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3)], ids=str)
def test_raw_operators_on_empty_tensors(ops, shape: tuple[int, ...]) -> None:
    """No element: refused, or empty outputs; statistics untouched either way."""
    given = forward_arguments() | {"x": torch.ones(shape), "residual": torch.ones(shape)}
    before = given["running_mean"].clone(), given["running_var"].clone()
    with suppress(RuntimeError):
        y, mean, _, mask = ops.batch_norm_act_forward(*given.values())
        assert (y.shape, mask.shape, mean.shape) == (shape, (0,), (C,))
    assert torch.equal(given["running_mean"], before[0])
    assert torch.equal(given["running_var"], before[1])
    back = backward_arguments() | {"x": torch.ones(shape), "grad": torch.ones(shape)}
    back["mask"] = torch.ones(0, dtype=torch.uint8)
    with suppress(RuntimeError):
        dx, dresidual, dweight, dbias = ops.batch_norm_act_backward(*back.values())
        assert (dx.shape, dresidual.shape) == (shape, shape)
        assert not dweight.any()
        assert not dbias.any()


def test_eager_raises_too() -> None:
    """Where the sentences above are PyTorch's own cases, it indeed raises them."""
    x, mean, var = torch.randn(SHAPE), torch.zeros(C), torch.ones(C)
    with pytest.raises(ValueError, match="eps must be positive"):
        F.batch_norm(x, mean, var, training=True, eps=0.0)
    with pytest.raises(ValueError, match="either both be None or neither"):
        F.batch_norm(x, mean, None, training=True)
    with pytest.raises(RuntimeError, match="dtype"):
        F.batch_norm(x, mean, var, torch.ones(C).double(), training=True)


def test_a_failed_call_is_not_the_end(impl) -> None:
    """After a refused call the same tensors serve a good one, counted once."""
    given = arguments()
    with pytest.raises(ValueError, match="activation"):
        functional.batch_norm_act(**given, activation="tanh")
    with dispatch.recording() as events:
        functional.batch_norm_act(**given)
    assert [e.op for e in events] == ["batch_norm_act"]
    assert not torch.equal(given["running_mean"], arguments()["running_mean"])
