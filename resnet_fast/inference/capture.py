# SPDX-License-Identifier: BSD-3-Clause
"""A function's calls as replays of recorded graphs, one for each shape, at most so many of them.

A graph reads and writes fixed memory, so each call copies its inputs in and its outputs out: what
a call returns is the caller's own and no later call writes to it. The copies are queued on the
caller's stream under one lock, and each call first waits (on the GPU) for the one before it, so
threads and streams may share the graphs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resnet_fast.dispatch import logger

MAX_GRAPHS = 8  # shapes; each graph keeps its inputs and outputs, and all share what lies between
MAX_FAILED = 256


class Captured(NamedTuple):
    """A recorded call: replay() reads ``inputs`` and writes ``outputs``, always the same ones."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: list[Any]


class Recorder(Protocol):
    """What records: cuda.CudaGraphs, or what the tests put in its place."""

    def capture(self, function: Callable[..., list[Any]], inputs: Sequence[Tensor]) -> Captured: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def finish(self) -> None: ...
    def recording(self) -> bool: ...


class GraphCache:
    """``function`` by graphs; where one cannot be recorded, by itself.

    function: of tensors, giving a list whose tensors are results; its weights must stay where they
    are. ready: brings an input to the dtype and layout that the function takes. limit: graphs kept
    at the most, by default MAX_GRAPHS; the one used longest ago is dropped.
    """

    def __init__(
        self,
        function: Callable[..., list[Any]],
        ready: Callable[[Tensor], Tensor],
        recorder: Recorder,
        limit: int | None = None,
    ) -> None:
        self._function, self._ready, self._recorder = function, ready, recorder
        self._limit = MAX_GRAPHS if limit is None else limit
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failed: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        # Memory given back while a graph still runs on another stream could be written by others.
        with contextlib.suppress(Exception):
            self._recorder.finish()

    def __len__(self) -> int:
        return len(self._graphs)

    def reasons(self) -> list[str]:
        """Why some shapes run without a graph."""
        return list(dict.fromkeys(dict(self._failed).values()))

    def __call__(self, inputs: Sequence[Tensor], settings: str = "") -> list[Any]:
        """What the function gives for these inputs, in tensors of the caller's own.

        settings: PyTorch's switches, which a graph recorded under others does not follow.
        """
        key = (settings, *(tuple(x.shape) for x in inputs))
        empty = any(x.numel() == 0 for x in inputs)
        if empty or key in self._failed or self._recorder.recording():
            return self._function(*map(self._ready, inputs))
        with self._lock:
            self._recorder.enter()
            try:
                graph = self._graph(key, inputs)
                if graph is not None:
                    for static, x in zip(graph.inputs, inputs, strict=True):
                        static.copy_(x)
                    graph.replay()
                    return [y.clone() if isinstance(y, Tensor) else y for y in graph.outputs]
            finally:
                self._recorder.leave()
        return self._function(*map(self._ready, inputs))

    def _graph(self, key: Hashable, inputs: Sequence[Tensor]) -> Captured | None:
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        while len(self._graphs) >= self._limit:
            self._recorder.finish()
            self._graphs.popitem(last=False)
        try:
            # Tensors made in inference mode could not be copied into outside it.
            with torch.inference_mode(False), torch.no_grad():
                statics = [torch.empty_like(self._ready(x)).copy_(x) for x in inputs]
                graph = self._recorder.capture(self._function, statics)
        except Exception as error:
            self._fail(key, error)
            return None
        self._graphs[key] = graph
        return graph

    def _fail(self, key: Hashable, error: Exception) -> None:
        told = (str(error).strip().splitlines() or [""])[0][:200]
        why = f"no CUDA graph: {type(error).__name__}: {told}"
        logger.warning("optimize_for_inference: %s", why)
        if len(self._failed) >= MAX_FAILED:
            self._failed.clear()
        self._failed[key] = why
