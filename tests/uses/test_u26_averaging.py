# SPDX-License-Identifier: BSD-3-Clause
"""U26: federated and stochastic weight averaging, copies, pickles, files."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, update_bn
from twins import Results
from ways import Way, batches, photos, small_basic, small_bottleneck, state, train

WAY = Way("U26", "averaging")


def federated(model: Any) -> Results:
    """McMahan et al. 2017: two clients train copies, parameters and buffers are averaged."""
    for _ in range(2):
        clients = [copy.deepcopy(model) for _ in range(2)]
        for client, lr in zip(clients, (0.01, 0.02), strict=True):
            train(client, steps=1, lr=lr)
        states = [client.state_dict() for client in clients]
        mean = {k: (states[0][k] + states[1][k]) / 2 for k in states[0]}
        model.load_state_dict({k: t.to(states[0][k].dtype) for k, t in mean.items()})
    return state(model) | {"y": model.eval()(photos()).detach()}


def swa(model: Any) -> Results:
    """Izmailov et al. 2018: an average of weights, its statistics taken anew."""
    averaged = AveragedModel(model)
    for lr in (0.01, 0.02):
        train(model, steps=1, lr=lr)
        averaged.update_parameters(model)
    update_bn([images for images, _ in batches(2)], averaged)
    return state(averaged) | {"y": averaged.eval()(photos()).detach()}


def carried(model: Any) -> Results:
    """Through deepcopy, pickle and torch.save, trained a step after each."""
    model = copy.deepcopy(model)
    results = train(model, 1)
    model = pickle.loads(pickle.dumps(model))
    results |= {f"2 {k}": t for k, t in train(model, 1).items()}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    return results | {f"3 {k}": t for k, t in train(model, 1).items()}


def test_federated() -> None:
    WAY.check(small_basic, federated)


def test_stochastic_weight_averaging() -> None:
    WAY.check(small_basic, swa)


def test_copies_pickles_and_files() -> None:
    WAY.check(small_bottleneck, carried)
