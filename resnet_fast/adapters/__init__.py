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
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from resnet_fast._ready import fell_back

# module that defines the classes -> our file for it, imported once the library itself has been
_LIBRARIES = {
    "segmentation_models_pytorch.encoders.resnet": "resnet_fast.adapters.segmentation_models",
    "torch.nn": "resnet_fast.adapters.sequential",
    "torchvision.models._utils": "resnet_fast.adapters.torchvision_getter",
    "torchvision.models.resnet": "resnet_fast.adapters.torchvision",
    "torchvision.ops.misc": "resnet_fast.adapters.torchvision_norms",
    "timm.layers.norm_act": "resnet_fast.adapters.timm_norms",
    "timm.models._features": "resnet_fast.adapters.timm_features",
    "timm.models.resnet": "resnet_fast.adapters.timm",
}

# What a block is given to run: the block, its input, and its plain forward.
Forward = Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Tensor]


class Adapter(NamedTuple):
    """A class, the accelerated subclass of it, and the one method that the subclass replaces.

    idle: of a module of the class, why there is nothing to gain in it, "" if there is.
    """

    original: type[nn.Module]
    accelerated: type[nn.Module]
    method: str
    function: Callable[..., Any]
    idle: Callable[[Any], str] | None


_ORIGINAL = "_resnet_fast_original"  # an accelerated class's attribute: the class it stands for

_ADAPTERS: dict[type[nn.Module], Adapter] = {}
_DERIVED: dict[type[nn.Module], type[nn.Module]] = {}  # for subclasses of the classes above


def register_adapter(
    original: type[nn.Module],
    accelerated: type[nn.Module] | Forward,
    method: str = "forward",
    idle: Callable[[Any], str] | None = None,
) -> None:
    """Let accelerate() turn objects of exactly `original` into objects of `accelerated`.

    accelerated: a subclass that overrides `method` and adds no state; or a function of (block, x,
    plain) that returns what the block's forward does with x, where plain(x) is that forward. For a
    block of torchvision's parts rf.blocks.basic_block and rf.blocks.bottleneck are such functions;
    for others write one with rf.blocks.bn_act:

        def fast(block, x, plain):
            out = rf.blocks.bn_act(block.bn1, block.conv1(x))
            return rf.blocks.bn_act(block.bn2, block.conv2(out), residual=block.shortcut(x))

    idle: tells of a module, in a sentence, that there is nothing to accelerate in it ("" if there
    is); such modules keep their class. Raises TypeError if accelerated is neither a subclass nor a
    function, ValueError if either class does not define the method.
    """
    if not inspect.isclass(accelerated) and callable(accelerated):
        accelerated = _class_for(original, accelerated, method)
    if not (inspect.isclass(accelerated) and issubclass(accelerated, original)):
        raise TypeError(f"accelerated must be a subclass of {original.__name__}; got {accelerated}")
    for cls in (original, accelerated):
        if method not in cls.__dict__:
            raise ValueError(f"method must be one that {cls.__name__} defines; got {method!r}")
    setattr(accelerated, _ORIGINAL, original)
    _ADAPTERS[original] = Adapter(original, accelerated, method, original.__dict__[method], idle)


def _class_for(original: type[nn.Module], forward: Forward, method: str) -> type[nn.Module]:
    """A subclass of a block's class whose method is `forward`."""
    plain = getattr(original, method, None)

    def fused(self: nn.Module, x: Tensor) -> Tensor:
        if replaced(self, x, method, plain):
            return cast(Tensor, getattr(original, method)(self, x))
        return forward(self, x, lambda x: cast(Tensor, getattr(original, method)(self, x)))

    names = {method: fused, "_resnet_fast_norms": (), "_resnet_fast_block": True}
    return _subclass(original, (original,), names)


def replaced(module: Any, x: object, method: str, known: object) -> bool:
    """True, and recorded, if somebody has put another method in the place of the library's."""
    if getattr(module._resnet_fast_original, method) is known:
        return False
    name = type(module).__name__
    fell_back(name, x, f"{name}.{method} was replaced")
    return True


def load() -> None:
    """Import the adapters of the libraries that this process has imported."""
    for library, adapter in _LIBRARIES.items():
        # A library still being imported, or one whose import failed, has no classes to adapt.
        if library in sys.modules and adapter not in sys.modules:
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
    why = _why_not_class(module)
    adapter = adapter_of(type(module))
    return why if why or adapter is None or adapter.idle is None else adapter.idle(module)


def _why_not_class(module: nn.Module) -> str:
    """why_not() but for what the module holds."""
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
        _DERIVED[cls] = _subclass(cls, (adapter.accelerated, cls), {})
    return _DERIVED[cls]


def _subclass(
    cls: type[nn.Module], bases: tuple[type[nn.Module], ...], names: dict[str, Any]
) -> type[nn.Module]:
    """A subclass that passes for cls by its names, and pickles as an object of cls."""
    names |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _ORIGINAL: cls,
    }
    if cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
        names["__reduce_ex__"] = _reduce
    return type(cls.__name__, bases, names)


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy an object of a derived class by its original class, which has a name."""
    return _rebuild, (original_class(self),), self.__getstate__()


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    load()
    module = cls.__new__(cls)
    if not _why_not_class(module):
        object.__setattr__(module, "__class__", accelerated_class(cls))
    return module
