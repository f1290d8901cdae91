# SPDX-License-Identifier: BSD-3-Clause
"""The call of a compiled trace, on whatever device it is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fast.dispatch import logger
from resnet_fast.inference.capture import GraphCache, Recorder
from resnet_fast.inference.fold import MAX_SIZES
from resnet_fast.inference.kernels import Kernels
from resnet_fast.inference.program import Program
from resnet_fast.inference.schedule import Schedule
from resnet_fast.inference.trace import Trace, check_shape
from resnet_fast.inference.watch import Watch


class Call:
    """One compiled trace: checks, layout and dtype of the inputs, pieces of the batch, graphs."""

    def __init__(
        self,
        program: Program,
        trace: Trace,
        kernels: Kernels,
        dtypes: tuple[torch.dtype, torch.dtype],
        guard: Guard | None,
    ) -> None:
        self._program, self._trace, self._guard = program, trace, guard
        self._kernels = kernels
        self._graphs: GraphCache | None = None
        self._why_no_graphs = ""
        self._dtype, self._compute = dtypes
        # Not a method: the cache of graphs has it, and is to go as soon as nobody calls this.
        layout = kernels.memory_format(self._compute)
        self._ready = functools.partial(_ready, self._compute, layout)
        self._seen: dict[Any, Schedule] = {}
        self._out_spec = trace.out_spec
        self._single = trace.out_spec.is_leaf()

    def record(self, recorder: Recorder) -> None:
        """From here on run as graphs, if every step is one that a graph can hold."""
        if self._trace.points:
            self._why_no_graphs = "no CUDA graph: forward hooks run in Python at every call"
            logger.warning("optimize_for_inference: %s", self._why_no_graphs)
        else:
            self._graphs = GraphCache(self._program, self._ready, recorder)

    @property
    def kept_bytes(self) -> int:
        """See OptimizedModule.kept_bytes."""
        return self._program.kept_bytes

    def reasons(self) -> list[str]:
        """Why graphs were asked for and do not run."""
        graphs = [] if self._graphs is None else self._graphs.reasons()
        return [self._why_no_graphs, *graphs]

    def __call__(self, *inputs: Any) -> Any:
        leaves = pytree.tree_leaves(inputs) if len(inputs) != 1 else list(inputs)
        key = (
            tuple((x.shape, x.dtype, x.device) for x in leaves)
            if all(map(_is_tensor, leaves))
            else None
        )
        found = self._seen.get(key)
        if found is None:
            found = self._admit(leaves)
            if len(self._seen) >= MAX_SIZES:
                self._seen.clear()
            self._seen[key] = found
        settings = self._kernels.begin(self._compute)
        if self._graphs is not None:
            outputs = self._graphs(leaves, settings)
        else:
            outputs = self._program.run(leaves, found, self._ready)
        if self._guard is not None:
            self._guard.check()
        if self._dtype is not self._compute:
            outputs = [
                y.to(self._dtype) if isinstance(y, Tensor) and y.dtype is self._compute else y
                for y in outputs
            ]
        return outputs[0] if self._single else pytree.tree_unflatten(outputs, self._out_spec)

    def _admit(self, leaves: list[Any]) -> Schedule:
        """Check inputs of shapes not seen before; returns how they run."""
        if len(leaves) != len(self._trace.shapes):
            raise TypeError(f"expected {len(self._trace.shapes)} inputs; got {len(leaves)}")
        for x in leaves:
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs must be tensors; got {type(x).__name__}")
            self._check(x)
        sizes = check_shape(self._trace, leaves)
        batch = len(leaves[0]) if leaves and leaves[0].dim() else 1
        return self._program.schedule(sizes, batch)

    def _check(self, x: Tensor) -> None:
        if x.device != self._kernels.device:
            device = self._kernels.device
            raise ValueError(f"input is on {x.device}; the optimized module is on {device}")
        if not x.is_floating_point():
            raise TypeError(f"input must be floating point; got {x.dtype}")


class Guard:
    """What is folded does not see what a hook writes to the modules it is given."""

    def __init__(self, twin: nn.Module) -> None:
        self._twin, self._watch = twin, Watch(twin)

    def check(self) -> None:
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(
                f"a forward hook changed {changed} of its private copy, which is folded: hooks "
                "may read and replace what passes; for this one call the model itself"
            )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _ready(dtype: torch.dtype, layout: torch.memory_format, x: Tensor) -> Tensor:
    """The input as the graph takes it."""
    if x.dim() == 4:
        return x.to(dtype, memory_format=layout)
    return x.to(dtype)
