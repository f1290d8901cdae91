# SPDX-License-Identifier: BSD-3-Clause
"""How the ops behave inside autograd: what is saved, what is computed, and when."""

from __future__ import annotations

from itertools import product

import cases
import pytest
import torch
from cases import Case, word
from torch import Tensor

from resnet_fast import functional

SHAPE = (3, 7, 5, 3)
CHANNELS = 7


def _tensors(*, residual: bool = False, needs: str = "xwbr") -> dict[str, Tensor | None]:
    """x, weight, bias, residual; `needs` names those that need a gradient."""
    made = {
        "x": torch.randn(SHAPE),
        "weight": torch.rand(CHANNELS) + 0.5,
        "bias": torch.randn(CHANNELS),
        "residual": torch.randn(SHAPE) if residual else None,
    }
    for name, t in made.items():
        if t is not None:
            t.requires_grad_(name[0] in needs)
    return made


def _call(impl, t: dict[str, Tensor | None], **changes) -> Tensor:
    settings = {"residual": t["residual"], "training": True} | changes
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    return impl.batch_norm_act(t["x"], t["weight"], t["bias"], mean, var, **settings)


# ---- what is saved -------------------------------------------------------------------------------
@pytest.mark.implementations("plain", "cpu", "emulated")
@pytest.mark.parametrize("shape", [SHAPE, (2, 16, 8, 8), (2, 1, 3, 3)], ids=word)
@pytest.mark.parametrize("residual", ["none", "tensor"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saved_tensors(impl, shape, residual: str, activation: str | None, layout: str) -> None:
    """x itself, the parameters, mean, invstd; for a join with ReLU one bit an element; no more."""
    case = Case(shape=shape, residual=residual, activation=activation, layout=layout)
    inputs = cases.make(case, impl.device)
    x = inputs.x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        impl.batch_norm_act(
            x,
            inputs.weight.requires_grad_(),
            inputs.bias.requires_grad_(),
            inputs.running_mean,
            inputs.running_var,
            residual=inputs.residual,
            training=True,
            activation=activation,
        )
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in saved}
    assert kept.pop(x.data_ptr()) == 4 * x.numel()
    mask_bytes = 2 * -(-x.numel() // 16)
    want = [4 * shape[1]] * 4  # weight, bias, mean, invstd
    want += [mask_bytes] if residual == "tensor" and activation == "relu" else []
    assert sorted(kept.values()) == sorted(want)
    masks = [t for t in saved if t.dtype == torch.uint8]
    assert [t.numel() for t in masks] == want[4:]


# ---- which gradients are computed ----------------------------------------------------------------
@pytest.mark.implementations("plain", "cpu", "emulated")
@pytest.mark.parametrize("needs", ["x", "w", "b", "r", "wb", "xr", "xwbr"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_only_what_needs_a_gradient_is_computed(
    impl, needs: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    raw = functional._batch_norm_act_backward

    def watched(*args):
        results = raw(*args)
        calls.append((list(args[-1]), results))
        return results

    monkeypatch.setattr(functional, "_batch_norm_act_backward", watched)
    tensors = _tensors(residual=True, needs=needs)
    _call(impl, tensors, training=training).backward(torch.randn(SHAPE))
    ((asked, results),) = calls
    assert asked == [letter in needs for letter in "xrwb"]
    for wanted, result in zip(asked, results, strict=True):
        assert (result.numel() > 0) == wanted
    for name, t in tensors.items():
        assert (t.grad is not None) == (name[0] in needs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_gradient_does_not_depend_on_who_else_needs_one(impl, training, residual) -> None:
    grad = torch.randn(SHAPE)
    tensors = _tensors(residual=residual)
    _call(impl, tensors, training=training).backward(grad)
    for needs in ("x", "w", "b", "r"):
        alone = {k: None if t is None else t.detach().clone() for k, t in tensors.items()}
        (name,) = (k for k in alone if k[0] == needs)
        if alone[name] is None:
            continue
        alone[name].requires_grad_()
        _call(impl, alone, training=training).backward(grad)
        assert torch.equal(alone[name].grad, tensors[name].grad)


def test_no_graph_when_nothing_needs_a_gradient(impl) -> None:
    frozen = _tensors(residual=True, needs="")
    assert not _call(impl, frozen).requires_grad
    with torch.no_grad():
        quiet = _call(impl, _tensors(residual=True))
    assert not quiet.requires_grad
    with torch.inference_mode():
        assert _call(impl, frozen).is_inference()


def test_running_statistics_that_need_no_gradient_get_none(impl) -> None:
    t = _tensors()
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    y = impl.batch_norm_act(t["x"], t["weight"], t["bias"], mean, var, training=True)
    y.sum().backward()
    assert not mean.requires_grad
    assert mean.grad is None
    assert mean.any()


# ---- order of calls ------------------------------------------------------------------------------
def test_two_forwards_before_two_backwards(impl) -> None:
    """One set of parameters, two inputs: each call's saved tensors are its own."""
    first, second = _tensors(residual=True), _tensors(residual=True)
    second |= {"weight": first["weight"], "bias": first["bias"]}
    grads = torch.randn(2, *SHAPE)

    def gradients(ys, ts, g):
        names = ("x", "weight", "bias", "residual")
        return [
            torch.autograd.grad(y, [t[n] for n in names], v)
            for y, t, v in zip(ys, ts, g, strict=True)
        ]

    apart = [
        gradients([_call(impl, t)], [t], [g])[0] for t, g in ((first, grads[0]), (second, grads[1]))
    ]
    together = gradients([_call(impl, first), _call(impl, second)], [first, second], grads)
    for a, b in zip(apart, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("residual", [True, False])
def test_retain_graph(impl, residual: bool) -> None:
    t = _tensors(residual=residual)
    leaves = [v for v in t.values() if v is not None]
    y = _call(impl, t)
    grad = torch.randn(SHAPE)
    once = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(y, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, grad)


@pytest.mark.implementations("reference", "plain", "cpu", "emulated")  # "cuda" saves copies
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_saved_tensor_modified_in_place_is_detected(impl, name: str, residual: bool) -> None:
    t = _tensors(residual=residual)
    y = _call(impl, t)
    with torch.no_grad():
        t[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.implementations("plain", "cpu", "emulated")  # eager's ReLU saves its output
def test_the_output_may_be_modified_in_place(impl) -> None:
    """y is not saved: the mask or x holds what the backward needs."""
    for residual, activation in product((True, False), ("relu", None)):
        t = _tensors(residual=residual)
        leaves = [v for v in t.values() if v is not None]
        want = torch.autograd.grad((2 * _call(impl, t, activation=activation)).sum(), leaves)
        y = _call(impl, t, activation=activation)
        y.mul_(2)
        got = torch.autograd.grad(y.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.implementations("plain", "cpu", "emulated")  # eager saves the running statistics
def test_the_residual_and_the_statistics_may_change_before_the_backward(impl) -> None:
    t = _tensors(residual=True)
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)

    def forward() -> Tensor:
        return impl.batch_norm_act(
            t["x"], t["weight"], t["bias"], mean, var, residual=t["residual"], training=True
        )

    leaves = list(t.values())
    want = torch.autograd.grad(forward().sum(), leaves)
    y = forward()
    with torch.no_grad():
        t["residual"].zero_()
        mean.fill_(7)
        var.fill_(7)
    got = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.implementations("plain", "cpu", "emulated")
def test_frozen_statistics_may_change_before_the_backward(impl) -> None:
    """Eval mode, then an optimiser or EMA step on the buffers: the call's own values count."""
    t = _tensors()
    mean, var = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5
    leaves = [t["x"], t["weight"], t["bias"]]

    def forward() -> Tensor:
        return impl.batch_norm_act(*leaves, mean, var, training=False)

    want = torch.autograd.grad(forward().sum(), leaves)
    y = forward()
    mean.add_(1)
    var.mul_(2)
    got = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_inputs_are_not_written(impl) -> None:
    for training, residual in product((True, False), (True, False)):
        t = _tensors(residual=residual)
        before = {k: None if v is None else v.detach().clone() for k, v in t.items()}
        _call(impl, t, training=training).sum().backward()
        for name, v in t.items():
            assert v is None or torch.equal(v, before[name]), name
