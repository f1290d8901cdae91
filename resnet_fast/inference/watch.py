# SPDX-License-Identifier: BSD-3-Clause
"""Has a model changed since it was folded? Asked before every call, without keeping it alive."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.layout import is_channels_last

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_parameters_of = attrgetter("_parameters")
_buffers_of = attrgetter("_buffers")
_children_of = attrgetter("_modules")
_hooks_of = attrgetter("_forward_pre_hooks", "_forward_hooks")
_version_of = attrgetter("_version")


class _Samples:
    """A few values of every parameter: ``p.data.add_(...)`` moves them and counts no version up.

    Nearly every such change (a step, an average, a merge) moves every value; one that leaves the
    sampled ones alone is not seen.
    """

    EACH = 4

    def __init__(self, model: nn.Module) -> None:
        self._held: list[Tensor] = []  # so that the memory stays, whatever the model does
        places: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for name, p in model.named_parameters():
            dense = p.layout is torch.strided and p.device.type == "cpu" and p.numel() > 0
            if dense and p.is_floating_point() and type(p) is nn.Parameter:
                self._held.append(p.detach())
                size, start = p.element_size(), p.data_ptr()
                found = places.setdefault((size, start % size), [])
                found += [(start + n * size, name) for n in self._picked(p)]
        self._groups = [
            (_Gather([address for address, _ in found], size), [name for _, name in found])
            for (size, _), found in places.items()
            if size in _INTEGERS
        ]
        self._values = [gather() for gather, _ in self._groups]

    def _picked(self, p: Tensor) -> list[int]:
        """Up to EACH places spread over the memory of p, counted in elements."""
        if not (p.is_contiguous() or is_channels_last(p)):
            return [0]
        step = max(1, p.numel() // self.EACH)
        return list(range(0, p.numel(), step))[: self.EACH]

    def changed(self) -> str | None:
        """The name of a parameter whose values moved. Each must lie where it lay at the start."""
        for (gather, names), then in zip(self._groups, self._values, strict=True):
            now = gather()
            if not torch.equal(now, then):
                return names[int((now != then).nonzero()[0])]
        return None

    def drop(self) -> None:
        self._groups, self._values = [], []
        self._held.clear()


class _Gather:
    """The integers at some addresses, in one operator; concatenating views takes many times more.

    The tensor that it picks from spans all that lies between the addresses, and only what is picked
    is ever read. As integers, so that a NaN is equal to itself.
    """

    def __init__(self, addresses: list[int], size: int) -> None:
        start = min(addresses)
        span = (ctypes.c_char * (max(addresses) + size - start)).from_address(start)
        self._memory = torch.frombuffer(span, dtype=_INTEGERS[size])
        self._places = torch.tensor([(address - start) // size for address in addresses])

    def __call__(self) -> Tensor:
        return self._memory.index_select(0, self._places)


def _nothing() -> None:
    """Stands for the reference to a child that is None."""


class Watch:
    """Identity, version and address of every parameter and buffer, the tree of modules, the hooks.

    Batch norm in training writes its running statistics without counting their version up; what
    shows it is num_batches_tracked, which it also counts.

    The usual answer, no, comes from comparing whole lists; only where they differ is each module
    asked by itself, for the name and for what makes no difference (the order of parameters).
    """

    def __init__(self, model: nn.Module) -> None:
        names, modules = zip(*model.named_modules(), strict=True)
        self._names: tuple[str, ...] = names
        self._modules = [weakref.ref(module) for module in modules]
        self._records = [_Record(module) for module in modules]
        self._numbers = _hooks(modules)
        self._replaced: list[object] = []  # dictionaries of hooks that are gone
        self._hooks = [
            weakref.ref(found, self._replaced.append)
            for module in modules
            for found in _hooks_of(module)
        ]
        held, samples = _Tensors(modules), _Samples(model)
        self._held, self._samples = held, samples

        def gone(_: object) -> None:
            samples.drop()
            held.drop()

        self._model = weakref.ref(model, gone)
        place = {id(module): number for number, module in enumerate(modules)}
        children = [child for module in modules for child in module._modules.values()]
        place[id(None)] = len(modules)
        # Two more, as itemgetter gives a tuple only of several.
        self._children = itemgetter(*(place[id(child)] for child in children), -1, -1)

    def changed(self) -> str | None:
        """The name of something that is no longer what it was; None too where the model is gone."""
        if self._model() is None:
            return None
        modules = [ref() for ref in self._modules]
        if None in modules or not self._same(modules):
            name = self._different(modules)
            if name is not None:
                return name
        return self._samples.changed()

    def _same(self, modules: list[Any]) -> bool:
        """Whether everything is as it was; False too where only an order is another."""
        if self._replaced or self._numbers:
            if _hooks(modules) != self._numbers:
                return False
        elif any([ref() for ref in self._hooks]):
            return False
        nested = filter(None, map(_children_of, modules))
        children = [*chain.from_iterable(map(dict.values, nested)), None, None]
        expected = self._children([*modules, None])
        return (
            len(children) == len(expected)
            and all(map(is_, children, expected))
            and self._held.same(modules)
        )

    def _different(self, modules: list[Any]) -> str | None:
        for name, module, record in zip(self._names, modules, self._records, strict=True):
            if module is None:
                continue  # its parent has another child, and says so
            key = record.different(module)
            if key is not None:
                return f"{name}.{key}".lstrip(".")
        return None


class _Tensors:
    """The dictionaries of parameters and buffers, as they are and as they were.

    They hold tensors, and so, but for a hook on one, nothing that holds the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = list(modules)
        parameters = [(n, m._parameters) for n, m in enumerate(owners) if m._parameters]
        buffers = [(n, m._buffers) for n, m in enumerate(owners) if m._buffers]
        self._kinds = [
            (of, [n for n, _ in kind], [d for _, d in kind])
            for of, kind in ((_parameters_of, parameters), (_buffers_of, buffers))
        ]
        self._dicts: list[dict[str, Any]] = [d for _, _, dicts in self._kinds for d in dicts]
        self._keys = list(chain.from_iterable(self._dicts))
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._placed = [t for t in self._values if t is not None]
        self._counted = [t for t in self._placed if not t.is_inference()]
        self._addresses = list(map(Tensor.data_ptr, self._placed))
        self._versions = list(map(_version_of, self._counted))

    def same(self, modules: list[Any]) -> bool:
        for of, places, dicts in self._kinds:
            if not all(map(is_, map(of, map(modules.__getitem__, places)), dicts)):
                return False
        return (
            list(chain.from_iterable(self._dicts)) == self._keys
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values))
            and list(map(_version_of, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self._placed)) == self._addresses
        )

    def drop(self) -> None:
        """Let go of everything."""
        self._kinds = []
        self._dicts, self._values, self._placed, self._counted = [], [], [], []


class _Record:
    """What one module was."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: list[list[tuple[str, Any, int, int]]] = [
            [
                (key, weakref.ref(t), -1 if t.is_inference() else t._version, t.data_ptr())
                for key, t in kind.items()
                if t is not None
            ]
            for kind in (module._parameters, module._buffers)
        ]
        self._children = [
            (key, _nothing if child is None else weakref.ref(child))
            for key, child in module._modules.items()
        ]
        self._hooks = _hooks([module])

    def different(self, module: nn.Module) -> str | None:
        """The key of a parameter, buffer or child that is another one now; "(hooks)" for hooks."""
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind, entries in zip(kinds, self._tensors, strict=True):
            for key, tensor, version, address in entries:
                now: Any = kind.get(key)
                if (
                    now is None
                    or now is not tensor()
                    or (version >= 0 and now._version != version)
                    or now.data_ptr() != address
                ):
                    return str(key)
        if len(module._modules) != len(self._children):
            return "(children)"
        for key, child in self._children:
            if module._modules.get(key, self) is not child():
                return str(key)
        return None if _hooks([module]) == self._hooks else "(hooks)"


def _hooks(modules: Iterable[nn.Module]) -> list[int]:
    """The numbers of all forward hooks; PyTorch uses none twice."""
    return [number for module in modules for found in _hooks_of(module) for number in found]
