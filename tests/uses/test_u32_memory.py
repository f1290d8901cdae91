# SPDX-License-Identifier: BSD-3-Clause
"""U32: what a training step keeps for its backward, counted in bytes, less than eager keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from ways import Way, fast_twin, make, photos, small_basic, small_bottleneck, tv

import resnet_fast as rf

WAY = Way("U32", "memory")


def kept(model: Any, x: Tensor) -> int:
    """Bytes of distinct storages saved for the backward of one forward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), t)  # kept alive: no address twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    total = sum(size for size, _ in storages.values())
    y.sum().backward()
    return total


@pytest.mark.skipif(not rf.is_available(), reason="the reference keeps what PyTorch keeps")
@pytest.mark.parametrize("library", ["torchvision", "ours"])
@pytest.mark.parametrize("build", [small_basic, small_bottleneck])
def test_a_step_keeps_less(build: Any, library: str) -> None:
    untouched = make(build, tv).float()
    x = photos(96).float()
    plain = kept(untouched, x)
    fast = kept(fast_twin(library, build, untouched).float(), x)
    print(f"kept for the backward: {plain} bytes by PyTorch, {fast} by {library}")
    assert fast < 0.9 * plain


def test_nothing_is_kept_without_gradients() -> None:
    model = rf.accelerate(make(small_basic, tv)).requires_grad_(False)
    with torch.no_grad():
        y = model(photos())
    assert y.grad_fn is None
