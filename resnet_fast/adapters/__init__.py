# SPDX-License-Identifier: BSD-3-Clause
"""Other libraries' classes and our accelerated subclasses of them; one file for each library.

An accelerated class differs from the one it stands for in one method. Objects change over by their
``__class__`` alone: the module tree, parameters, buffers and hooks are not touched.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

# module that defines the classes -> our file for it, imported once the library itself has been
_LIBRARIES = {"torchvision.models.resnet": "resnet_fast.adapters.torchvision"}


class Adapter(NamedTuple):
    """A class, the accelerated subclass of it, and the one method that the subclass replaces."""

    original: type[nn.Module]
    accelerated: type[nn.Module]
    method: str
    function: Callable[..., Any]


_ORIGINAL = "_resnet_fast_original"  # an accelerated class's attribute: the class it stands for

_ADAPTERS: dict[type[nn.Module], Adapter] = {}
_DERIVED: dict[type[nn.Module], type[nn.Module]] = {}  # for subclasses of the classes above


def register_adapter(
    original: type[nn.Module], accelerated: type[nn.Module], method: str = "forward"
) -> None:
    """Let accelerate() turn objects of exactly `original` into objects of `accelerated`.

    accelerated: a subclass that overrides `method` and adds no state. Raises TypeError if it is not
    a subclass, ValueError if either does not define the method.
    """
    if not (inspect.isclass(accelerated) and issubclass(accelerated, original)):
        raise TypeError(f"accelerated must be a subclass of {original.__name__}; got {accelerated}")
    for cls in (original, accelerated):
        if method not in cls.__dict__:
            raise ValueError(f"method must be one that {cls.__name__} defines; got {method!r}")
    setattr(accelerated, _ORIGINAL, original)
    _ADAPTERS[original] = Adapter(original, accelerated, method, original.__dict__[method])


def load() -> None:
    """Import the adapters of the libraries that this process has imported."""
    for library, adapter in _LIBRARIES.items():
        if library in sys.modules:
            importlib.import_module(adapter)


def adapter_of(cls: type) -> Adapter | None:
    """The adapter of a class or of the nearest base that has one."""
    return next((_ADAPTERS[base] for base in cls.__mro__ if base in _ADAPTERS), None)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class an accelerated module had before; None if it is not accelerated."""
    return type(module).__dict__.get(_ORIGINAL)


def is_accelerated(module: nn.Module) -> bool:
    """True if the module's class is an accelerated one, or was made from one by somebody else."""
    return hasattr(type(module), _ORIGINAL)


def why_not(module: nn.Module) -> str:
    """Why accelerate() would leave a module as it is; "" if it would not."""
    cls = type(module)
    if is_accelerated(module):
        return "it is accelerated"
    adapter = adapter_of(cls)
    if adapter is None:
        return f"no adapter for {cls.__module__}.{cls.__qualname__}"
    name, function = adapter.method, adapter.function
    if function.__module__ != adapter.original.__module__ or hasattr(function, "__wrapped__"):
        return f"{function.__qualname__} had been replaced when resnet_fast looked at it"
    if getattr(cls, name) is not function:
        return f"{cls.__name__} overrides {name}"
    for replaced in {"forward", name}:
        if replaced in module.__dict__:
            return f"its {replaced} was replaced on the object"
    return "" if _accelerated_class(cls, adapter) is not None else f"{cls.__name__} has a metaclass"


def accelerated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that objects of cls change to; why_not() must have answered ""."""
    adapter = adapter_of(cls)
    accelerated = None if adapter is None else _accelerated_class(cls, adapter)
    if accelerated is None:
        raise TypeError(f"no adapter for {cls.__qualname__}")
    return accelerated


def _accelerated_class(cls: type[nn.Module], adapter: Adapter) -> type[nn.Module] | None:
    if adapter.original is cls:
        return adapter.accelerated
    if type(cls) is not type:
        return None
    if cls not in _DERIVED:
        names: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            _ORIGINAL: cls,
        }
        if cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
            names["__reduce_ex__"] = _reduce
        _DERIVED[cls] = type(cls.__name__, (adapter.accelerated, cls), names)
    return _DERIVED[cls]


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy an object of a derived class by its original class, which has a name."""
    return _rebuild, (original_class(self),), self.__getstate__()


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    load()
    plain = cls.__new__(cls)
    if not why_not(plain):
        object.__setattr__(plain, "__class__", accelerated_class(cls))
    return plain
