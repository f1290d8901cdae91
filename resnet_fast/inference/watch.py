# SPDX-License-Identifier: BSD-3-Clause
"""Has a model changed since it was folded? Asked before every call, without keeping it alive."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from resnet_fast.layout import is_channels_last

_Entry = tuple[str, "weakref.ref[Tensor]", int, int]
_Record = tuple["weakref.ref[nn.Module]", list[_Entry], list[_Entry], list[tuple[str, int]]]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Samples:
    """A few values of every parameter: ``p.data.add_(...)`` moves them and counts no version up.

    Nearly every such change (a step, an average, a merge) moves every value; one that leaves the
    sampled ones alone is not seen.
    """

    EACH = 4

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[torch.dtype, tuple[list[Tensor], list[str]]] = {}
        for name, p in model.named_parameters():
            dense = p.layout is torch.strided and p.device.type == "cpu" and p.numel() > 0
            if dense and p.is_floating_point() and type(p) is nn.Parameter:
                views, names = self._groups.setdefault(p.dtype, ([], []))
                views.append(self._view(p.detach()))
                names.append(name)
        self._values = {dtype: _bits(views) for dtype, (views, _) in self._groups.items()}

    def _view(self, p: Tensor) -> Tensor:
        """Up to EACH values spread over the memory of p."""
        if is_channels_last(p):
            p = p.movedim(1, -1)
        if not p.is_contiguous():
            return p[(0,) * (p.dim() - 1)][:1]
        flat = p.view(-1)
        return flat[:: max(1, flat.numel() // self.EACH)][: self.EACH]

    def changed(self) -> str | None:
        for dtype, (views, names) in self._groups.items():
            now, then = _bits(views), self._values[dtype]
            if not torch.equal(now, then):
                return names[self._first(views, now, then)]
        return None

    def _first(self, views: list[Tensor], now: Tensor, then: Tensor) -> int:
        at = int((now != then).nonzero()[0]) // views[0].element_size()
        for number, view in enumerate(views):
            at -= view.numel()
            if at < 0:
                return number
        return len(views) - 1

    def drop(self) -> None:
        self._groups.clear()


def _bits(views: list[Tensor]) -> Tensor:
    """As bytes, so that a NaN is equal to itself."""
    return torch.cat(views).view(torch.uint8)


class Watch:
    """Identity, version and address of every parameter and buffer, and the tree of modules.

    Batch norm in training writes its running statistics without counting their version up; what
    shows it is num_batches_tracked, which it also counts.
    """

    def __init__(self, model: nn.Module) -> None:
        samples = _Samples(model)
        self._samples = samples  # they hold the weights, so they go when the model does
        self._model = weakref.ref(model, lambda _: samples.drop())
        self._records: list[_Record] = []
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names[len(self._records)] = name
            kinds = (module._parameters, module._buffers)
            parameters, buffers = (
                [
                    (key, weakref.ref(t), _version(t), t.data_ptr())
                    for key, t in kind.items()
                    if t is not None
                ]
                for kind in kinds
            )
            children = [(key, id(child)) for key, child in module._modules.items()]
            self._records.append((weakref.ref(module), parameters, buffers, children))

    def changed(self) -> str | None:
        """The name of something that is no longer what it was; None too where the model is gone."""
        if self._model() is None:
            return None
        for number, (ref, parameters, buffers, children) in enumerate(self._records):
            module = ref()
            if module is None:
                continue  # its parent has another child, and says so
            for kind, entries in ((module._parameters, parameters), (module._buffers, buffers)):
                for key, tensor, version, address in entries:
                    now = kind.get(key)
                    if (
                        now is None
                        or now is not tensor()
                        or (version >= 0 and now._version != version)
                        or now.data_ptr() != address
                    ):
                        return self._name(number, key)
            modules = module._modules
            if len(modules) != len(children):
                return self._name(number, "(children)")
            for key, identity in children:
                if id(modules.get(key)) != identity:
                    return self._name(number, key)
        return self._samples.changed()

    def _name(self, number: int, key: str) -> str:
        return f"{self._names[number]}.{key}".lstrip(".")
