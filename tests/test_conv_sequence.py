# SPDX-License-Identifier: BSD-3-Clause
"""conv_sequence: the bits of the single operators, wherever the values lie; bad input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from packed_convs import OPS, rows
from torch import Tensor

import resnet_fast as rf
from resnet_fast import _conv, _conv_sequence
from resnet_fast._conv_sequence import DIRECT, IN_X, IN_Y, NUMBERS, POOLED_STEM, STEM, Step

NAN = float("nan")

pytestmark = pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))


@dataclass
class Given:
    """The arguments of conv_sequence, and what the single operators make of them."""

    memory: Tensor
    x: Tensor
    y: Tensor
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def arguments(self, **changes: Any) -> tuple[Any, ...]:
        """Memory, x and y are copies."""
        numbers = [number for step in self.steps for number in step.numbers()]
        given = vars(self) | {"steps": numbers} | changes
        for name in ("memory", "x", "y"):
            given[name] = given[name].clone(memory_format=torch.preserve_format)
        return tuple(given.values())

    def one_by_one(self) -> tuple[Tensor, Tensor, Tensor]:
        memory, x, y, weights, biases, _ = self.arguments()
        for step, weight, bias in zip(self.steps, weights, biases, strict=True):
            single(step, (memory, x, y), weight, bias)
        return memory, x, y


def place(at: int, shape: tuple[int, ...], where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    memory, x, y = where
    _, c, h, w = shape
    if at < 0:
        return x if at == IN_X else y
    return memory.as_strided(shape, (h * w * c, 1, w * c, c), at)


def single(step: Step, where: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor) -> None:
    """A step by the operator that returns a new tensor."""
    kernel, stride, padding, dilation = step.geometry
    x = place(step.source, tuple(step.sizes), where)
    y = place(step.target, (step.sizes[0], bias.numel(), *step.out_size()), where)
    residual = y.clone(memory_format=torch.preserve_format) if step.add else None
    if step.kind == DIRECT:
        rest = (kernel, stride, padding, dilation, step.relu)
        found = OPS.conv_direct(x, weight, bias, residual, *rest)
    elif step.kind in (STEM, POOLED_STEM):
        rest = (kernel, stride, padding, step.relu, step.kind == POOLED_STEM)
        found = OPS.conv_stem(x, weight, bias, *rest)
    else:
        found = OPS.conv_winograd(x, weight, bias, residual, padding, step.kind, step.relu)
    y.copy_(found)


def geometry(kernel: int, stride: int = 1, dilation: int = 1) -> list[list[int]]:
    pad = dilation * (kernel // 2)
    return [[kernel] * 2, [stride] * 2, [pad] * 2, [dilation] * 2]


def make(batch: int = 2, stem: int = POOLED_STEM, size: int = 37) -> Given:
    """A stem, two residual blocks of both of Winograd's tiles and of the direct convs, into y."""
    stem_step = Step(stem, IN_X, 0, (batch, 3, size, size + 4), geometry(7, 2), False, True)
    height, width = stem_step.out_size()
    small = [(side - 1) // 2 + 1 for side in (height, width)]
    wide, narrow = (batch, 64, height, width), (batch, 80, *small)
    floats, after = 64 * batch * height * width, 80 * batch * small[0] * small[1]
    second, third = floats + 16, 2 * floats + 48
    found = Given(
        torch.full((third + 3 * after,), NAN), rows(batch, 3, size, size + 4), rows(*narrow)
    )
    found.y.fill_(NAN)
    chain = [
        stem_step,
        Step(4, 0, second, wide, geometry(3), False, True),
        Step(2, second, 0, wide, geometry(3), True, True),
        Step(DIRECT, 0, IN_Y, wide, geometry(1, 2), False, False),
        Step(DIRECT, 0, third, wide, geometry(3, 2), False, True),
        Step(DIRECT, third, IN_Y, narrow, geometry(3, 1, 2), True, True),
        Step(4, IN_Y, third, narrow, geometry(3), False, True),
        Step(2, third, IN_Y, narrow, geometry(3), True, False),
    ]
    for step in chain:
        inner = step.sizes[1]
        outer = 64 if step.target in (0, second) else 80
        add(found, step, torch.randn(outer, inner, *step.geometry[0]) / (3 * inner**0.5))
    return found


def onto_x() -> Given:
    """A block on x, which ends up in x; y is x as well."""
    x = rows(2, 32, 9, 10)
    found = Given(torch.full((2 * x.numel(),), NAN), x, x)
    for tile in (4, 2):
        size = tuple(x.shape)
        add(found, Step(tile, IN_X, 0, size, geometry(3), False, True), torch.randn(32, 32, 3, 3))
        one = torch.randn(32, 32, 1, 1) / 50
        add(found, Step(DIRECT, 0, IN_X, size, geometry(1), True, True), one)
    return found


def add(to: Given, step: Step, weight: Tensor) -> None:
    tiles = step.kind in (2, 4)
    to.weights.append(_conv.pack_winograd(weight, step.kind) if tiles else _conv.pack(weight))
    to.biases.append(torch.randn(len(weight)))
    to.steps.append(step)


CASES = {
    "pooled stem": make,
    "stem": lambda: make(stem=STEM, size=21),
    "one picture": lambda: make(batch=1, size=12),
    "x is written": onto_x,
}


def same(ours: tuple[Any, ...], right: tuple[Tensor, ...]) -> None:
    """Bits, but for NaN that nobody wrote over."""
    for name, mine, theirs in zip(("memory", "x", "y"), ours, right, strict=False):
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_single_operators(
    two_threads: None, instruction_set: str, name: str
) -> None:
    """Of all kinds, in memory, in x and in y; by one thread and by two."""
    given = CASES[name]()
    right = given.one_by_one()
    assert not right[2].isnan().any()
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        ours = given.arguments()
        if name == "x is written":
            ours = (ours[0], ours[1], ours[1], *ours[3:])
            right = (right[0], right[1], right[1])
        assert OPS.conv_sequence(*ours) is None
        same(ours, right)
    if name != "x is written":
        assert torch.equal(ours[1], given.x)


def test_what_is_left_out_is_not_written() -> None:
    """Between the values, and behind the last one."""
    given = make()
    ours = given.arguments(memory=torch.full_like(given.memory, 7.0))
    OPS.conv_sequence(*ours)
    second, third = given.steps[1].target, given.steps[4].target
    used = 80 * ours[2][:, 0].numel()
    for gap in (
        ours[0][second - 16 : second],
        ours[0][third - 32 : third],
        ours[0][third + used :],
    ):
        assert gap.numel() > 0
        assert torch.equal(gap, torch.full_like(gap, 7.0))


@pytest.mark.parametrize("name", CASES)
def test_plain(name: str) -> None:
    """What runs where the extension was not built."""
    given = CASES[name]()
    ours, right = given.arguments(), given.arguments()
    if name == "x is written":
        ours, right = ((g[0], g[1], g[1], *g[3:]) for g in (ours, right))
    _conv_sequence.conv_sequence(*ours)
    OPS.conv_sequence(*right)
    for mine, theirs in zip(ours[1:3], right[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_numbers_of_a_step() -> None:
    for step in make().steps:
        assert len(step.numbers()) == NUMBERS
        again = Step.of(step.numbers())
        assert again.numbers() == step.numbers()
        assert again.out_size() == step.out_size()


def test_nothing_to_do() -> None:
    """No step, and an empty batch."""
    given = make()
    ours = given.arguments(weights=[], biases=[], steps=[])
    OPS.conv_sequence(*ours)
    same(ours, (given.memory, given.x, given.y))
    none = make(batch=0)
    for op in (OPS.conv_sequence, _conv_sequence.conv_sequence):
        ours = none.arguments()
        op(*ours)
        same(ours, (none.memory, none.x, none.y))


def test_opcheck() -> None:
    given = make(size=12)
    given.memory.zero_()  # opcheck compares, and NaN is not equal to itself
    given.y.zero_()
    torch.library.opcheck(OPS.conv_sequence.default, given.arguments())


# ---- in-place writers ----------------------------------------------------------------------------
def writers() -> Iterator[tuple[Any, Any, list[Any], list[Any]]]:
    """(operator, the one that writes, its arguments up to the residual, those behind)"""
    x, bias, weight = rows(2, 32, 9, 8), torch.randn(48), torch.randn(48, 32, 3, 3)
    for tile in (2, 4):
        packed = _conv.pack_winograd(weight, tile)
        yield OPS.conv_winograd, OPS.conv_winograd_, [x, packed, bias], [[1, 1], tile, True]
    rest = [*geometry(3, 2), True]
    yield OPS.conv_direct, OPS.conv_direct_, [x, _conv.pack(weight), bias], rest
    few = [rows(2, 3, 9, 8), _conv.pack(torch.randn(48, 3, 3, 3)), bias]
    for pool in (False, True):
        yield OPS.conv_stem, OPS.conv_stem_, few, [*geometry(3, 2)[:3], True, pool]


def test_what_lies_in_y_is_not_read(instruction_set: str) -> None:
    """Written over in any layout of y, whatever was there."""
    for op, write, args, rest in writers():
        stem = write is OPS.conv_stem_
        right = op(*args, *([] if stem else [None]), *rest)
        garbage = right.new_full(right.shape, NAN)
        for y in (garbage.to(memory_format=torch.channels_last), garbage.clone()):
            strides = y.stride()
            assert write(y, *args, *([] if stem else [False]), *rest) is None
            assert torch.equal(y, right)
            assert y.stride() == strides


def test_opcheck_of_the_writers() -> None:
    for op, write, args, rest in writers():
        stem = write is OPS.conv_stem_
        y = op(*args, *([] if stem else [None]), *rest)
        torch.library.opcheck(write.default, (y, *args, *([] if stem else [False]), *rest))


def test_a_stem_that_fails_leaves_y() -> None:
    *_, (_, write, args, rest) = writers()
    y = rows(2, 48, 3, 2)
    kept = y.clone()
    for wrong in (y[:1], y[:, :32], y[..., :1], y.double(), y[0]):
        with pytest.raises(RuntimeError, match=r"y must be float32 of shape \(2, 48, 3, 2\)"):
            write(wrong, *args, *rest)
    with pytest.raises(RuntimeError, match="weight must be packed"):
        write(y, args[0], args[1][:, 1:], args[2], *rest)
    assert torch.equal(y, kept)


# ---- bad input -----------------------------------------------------------------------------------
def refused(given: Given, message: str, **changes: Any) -> None:
    """Raises, with nothing written."""
    ours = given.arguments(**changes)
    before = [t.clone(memory_format=torch.preserve_format) for t in ours[:3]]
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_sequence(*ours)
    same(ours, tuple(before))


LAST = 7  # steps before it are good ones: nothing of them may run
WRONG_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"kind": 5}, "no such kind of step: 5"),
    ({"kind": -1}, "no such kind"),
    ({"kind": STEM}, "a stem adds nothing"),
    ({"kind": POOLED_STEM, "add": False, "geometry": geometry(3, 1, 2)}, "has no dilation"),
    ({"kind": 4, "geometry": geometry(3, 2)}, "need 3x3, stride 1"),
    ({"kind": 4}, "weight must be packed for this convolution"),
    ({"kind": DIRECT}, "weight must be packed for this convolution"),
    ({"geometry": geometry(5)}, "need 3x3"),
    ({"geometry": [[3, 3], [1, 1], [-1, 1], [1, 1]]}, "padding not negative"),
    ({"geometry": [[3, 3], [0, 1], [1, 1], [1, 1]]}, "must be positive"),
    ({"source": -3}, "does not fit at -3"),
    ({"target": -(2**62)}, "does not fit"),
    ({"target": 10**12}, "does not fit"),
    ({"source": 10**9}, "does not fit"),
    ({"sizes": (-1, 80, 6, 7)}, "sizes must be positive"),
    ({"sizes": (2, 80, 0, 7)}, "sizes must be positive"),
    ({"sizes": (2, 0, 6, 7)}, "sizes must be positive"),
    ({"sizes": (2, 96, 6, 7)}, "weight must be packed"),
    ({"sizes": (2, 72, 6, 7)}, "multiple of 16 channels"),
    ({"sizes": (10**6, 80, 6, 7)}, "does not fit"),
    ({"target": 2**63 - 1}, "does not fit"),
    ({"sizes": (2**56, 80, 6, 7)}, "too large"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_STEPS, ids=str)
def test_a_bad_step(changes: dict[str, Any], message: str) -> None:
    """The last of eight: those before it leave no trace."""
    given = make()
    assert len(given.steps) == LAST + 1
    given.steps[LAST] = given.steps[LAST]._replace(**changes)
    refused(given, message)


def test_a_value_that_ends_behind_the_memory() -> None:
    """By one float; as far as it goes is good."""
    given = make()
    step = given.steps[6]
    assert step.target >= 0
    room = given.memory.numel() - given.y.numel()
    given.steps[6] = step._replace(target=room)
    given.steps[7] = given.steps[7]._replace(source=room)
    OPS.conv_sequence(*given.arguments())
    given.steps[6] = step._replace(target=room + 1)
    refused(given, "does not fit")
    given.steps[6] = step
    refused(given, "does not fit", y=given.y[:1])
    refused(given, "does not fit", x=given.x[:1])


def test_bad_tensors() -> None:
    given = make()
    memory, x, y = given.memory, given.x, given.y
    refused(given, "memory, x and y must be float32", memory=memory.double())
    refused(given, "memory, x and y must be float32", x=x.double())
    refused(given, "memory, x and y must be float32", y=y.bfloat16())
    refused(given, "x must be channels-last", x=x.contiguous())
    refused(given, "x must be channels-last", x=x.flatten(1))
    refused(given, "y must be channels-last", y=y.contiguous())
    with pytest.raises(RuntimeError, match="memory must be dense"):
        OPS.conv_sequence(memory[::2], *given.arguments()[1:])
    with pytest.raises(RuntimeError, match="x must be channels-last"):
        OPS.conv_sequence(memory, rows(2, 3, 74, 41)[:, :, ::2], *given.arguments()[2:])


def test_bad_lists() -> None:
    given = make()
    weights, biases = given.weights, given.biases
    *_, numbers = given.arguments()
    counts = "8 weights must have as many biases and 17 numbers each"
    refused(given, counts, biases=biases[1:])
    refused(given, counts, steps=numbers[1:])
    refused(given, counts, steps=[*numbers, 0])
    refused(given, "7 weights must have", weights=weights[1:])
    packed, of_floats = "weight must be packed", "weights and biases must be float32"
    first = weights[:-1]
    refused(given, packed, weights=[*first, weights[-1][1:]])
    refused(given, packed, weights=[*first, weights[-1].transpose(2, 3)])
    refused(given, of_floats, weights=[*first, weights[-1].double()])
    refused(given, of_floats, biases=[*biases[:-1], biases[-1].double()])
    refused(given, of_floats, biases=[*biases[:-1], biases[-1][:72]])
    refused(given, of_floats, biases=[*biases[:-1], biases[-1][:0]])
    refused(given, of_floats, biases=[*biases[:-1], torch.randn(160)[::2]])
