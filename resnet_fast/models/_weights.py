# SPDX-License-Identifier: BSD-3-Clause
"""The ``weights=`` of every model builder: a state_dict, from memory or from a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Weights = str | os.PathLike[str] | Mapping[str, Tensor] | None
Model = TypeVar("Model", bound=nn.Module)

_NO_DOWNLOAD = (
    "resnet_fast downloads nothing: weights must be None, the path of a state_dict file, "
    "or a state_dict"
)


def build(model: type[Model], args: tuple[Any, ...], weights: Weights, **kwargs: Any) -> Model:
    """``model(*args, **kwargs)`` with `weights` loaded, strictly, if there are any.

    num_classes is taken from the weights unless it is given. ``pretrained=False``, of older code,
    is the same as no weights. Raises ValueError for anything that is not a state_dict, and for a
    num_classes other than that of the weights; RuntimeError where keys or shapes differ.
    """
    if kwargs.pop("pretrained", None):
        raise ValueError(f"pretrained=True: {_NO_DOWNLOAD}")
    if weights is None:
        return model(*args, **kwargs)
    state = _state_dict(weights)
    _set_num_classes(kwargs, state)
    built = model(*args, **kwargs)
    built.load_state_dict(state)
    return built


def _state_dict(weights: object) -> Mapping[str, Tensor]:
    if isinstance(weights, (str, os.PathLike)):
        if not os.path.isfile(weights):
            raise ValueError(f"weights={weights!r} is not a file. {_NO_DOWNLOAD}")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"weights={os.fspath(weights)!r} cannot be read as a state_dict: {error}"
            ) from error
        return _checked(state, f"weights={os.fspath(weights)!r} holds")
    return _checked(weights, "weights is")


def _checked(state: object, what: str) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} a {type(state).__name__}. {_NO_DOWNLOAD}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{what} a mapping whose {key!r} is a {type(value).__name__}, not a tensor: "
                "give the state_dict that is in it"
            )
    return state


def _set_num_classes(kwargs: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    if "fc.weight" not in state:
        return  # load_state_dict names what is missing
    classes = state["fc.weight"].shape[0]
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(
            f"num_classes must be that of the weights, {classes}; got {kwargs['num_classes']}"
        )
