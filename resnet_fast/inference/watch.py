# SPDX-License-Identifier: BSD-3-Clause
"""Has a model changed since it was folded? Asked before every call, without keeping it alive."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

_Entry = tuple[str, "weakref.ref[Tensor]", int, int]
_Record = tuple["weakref.ref[nn.Module]", list[_Entry], list[_Entry], list[tuple[str, int]]]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Watch:
    """Identity, version and address of every parameter and buffer, and the tree of modules.

    Batch norm in training writes its running statistics without counting their version up; what
    shows it is num_batches_tracked, which it also counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
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
        return None

    def _name(self, number: int, key: str) -> str:
        return f"{self._names[number]}.{key}".lstrip(".")
