# SPDX-License-Identifier: BSD-3-Clause
"""on_device, with copies on the CPU in place of a GPU's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from devices import on_device


def test_gradients_and_statistics_come_back() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    ours, theirs = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    y = on_device("cpu", F.batch_norm, (x, *ours), {"training": True})
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    expected = F.batch_norm(x, *theirs, training=True)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, want)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_one_tensor_given_twice_stays_one() -> None:
    x = torch.randn(3)
    assert on_device("cpu", lambda a, b: torch.tensor(a is b), (x,), {"b": x})
    assert on_device("cpu", lambda a: torch.tensor(a is not x), (x,), {})


def test_unchanged_tensors_are_not_written() -> None:
    x = torch.randn(3)
    version = x._version
    on_device("cpu", torch.neg, (x,), {})
    assert x._version == version


def test_copies_lie_as_their_originals() -> None:
    for t in (torch.randn(2, 8, 3)[:, 1:6], torch.randn(3).expand(2, 3), torch.empty(0, 3)):
        y = on_device("cpu", lambda a: torch.tensor([a.storage_offset(), *a.stride()]), (t,), {})
        assert y.tolist() == [t.storage_offset(), *t.stride()]


def test_tensors_elsewhere_are_left_alone() -> None:
    x = torch.empty(3, device="meta")
    assert on_device("cpu", lambda a: a, (x,), {}) is x
