# SPDX-License-Identifier: BSD-3-Clause
"""Models by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
Model = TypeVar("Model", bound=nn.Module)

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Callable[P, Model]) -> Callable[P, Model]:
    """Make a builder known to create_model under its own name."""
    _BUILDERS[builder.__name__] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """The names create_model knows, sorted, that match a shell pattern such as "resnext*"."""
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """The model of that name; kwargs go to its builder (weights, num_classes, ...).

    Raises ValueError for a name that is not in list_models().
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(list_models())}; got {name!r}")
    return _BUILDERS[name](**kwargs)
