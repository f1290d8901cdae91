# SPDX-License-Identifier: BSD-3-Clause
"""What choosing and capturing ask of CUDA: names, switches, a timer of events, graphs."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast import env
from resnet_fast._version import __version__
from resnet_fast.inference.capture import Captured

ROUNDS = 7
AIM = 2e-4  # seconds of work between two events: well above their resolution of 0.5 us
MOST_CALLS = 20
SLEEP_CYCLES = 2_000_000  # about 1 ms: the queue fills meanwhile, and launches are not timed
WARM_UP = 3


class Cuda:
    """The platform of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def name(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def versions(self) -> str:
        kernels = "" if env.is_available("cuda") else " without kernels"
        cudnn = torch.backends.cudnn.version() or "none"
        return f"torch {torch.__version__}, cuDNN {cudnn}, resnet_fast {__version__}{kernels}"

    def settings(self, dtype: torch.dtype) -> str:
        cudnn = torch.backends.cudnn
        deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        found = {
            "tf32": dtype is torch.float32 and tf32(),
            "benchmark": cudnn.benchmark,
            "deterministic": deterministic,
            "no cuDNN": not cudnn.enabled,
        }
        return ", ".join(name for name, on in found.items() if on)

    def graph_settings(self, dtype: torch.dtype) -> str:
        if dtype is not torch.float32:
            return self.settings(dtype)
        return f"{self.settings(dtype)}; matmul {torch.backends.cuda.matmul.fp32_precision}"

    def compute_dtype(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        if dtype is torch.bfloat16:
            with torch.cuda.device(self._device):
                if not torch.cuda.is_bf16_supported(including_emulation=False):
                    return torch.float32, "calculated in float32: this card has no bfloat16"
        return dtype, ""

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        """Tensor cores want channels-last; cuDNN's other float32 kernels are made for NCHW."""
        half = dtype in (torch.bfloat16, torch.float16)
        if half or (dtype is torch.float32 and tf32()):
            return torch.channels_last
        return torch.contiguous_format

    def recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds on the GPU of each call, a few at a time between two events.

        Inputs are in the L2 cache as far as they fit there, as in a network, whose last layer has
        just written them.
        """
        with torch.cuda.device(self._device):
            for call in calls.values():
                call()  # cuDNN looks for an engine, the allocator for memory
            repeats = {}
            for name, call in calls.items():
                once = max(_between(call, 1), 1e-6)
                repeats[name] = max(1, min(MOST_CALLS, int(AIM / once)))
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    times[name].append(_between(call, repeats[name]))
        return {name: statistics.median(of) for name, of in times.items()}


def tf32() -> bool:
    """Whether PyTorch's settings let float32 convs round their inputs to TF32."""
    # NOTE: allow_tf32 raises where the newer setting was used for convs alone.
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return str(conv.fp32_precision) == "tf32"


def _between(call: Callable[[], object], count: int) -> float:
    """Seconds of a call between two events around ``count`` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


# Only one capture may be under way in a process.
_capturing = threading.Lock()


class CudaGraphs:
    """Records functions as CUDA graphs that share one memory pool.

    Sharing it is right only while no two of them run at once and what a graph leaves behind is
    taken before the next one runs: see capture.GraphCache, which sees to both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def capture(self, function: Callable[..., list[Any]], inputs: Sequence[Tensor]) -> Captured:
        """The function of these very tensors as a graph; what it raises is raised."""
        with torch.cuda.device(self._device), _capturing:
            if self._stream is None:
                self._stream = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()
            # Lazy work first, on another stream than the current: libraries' handles and
            # workspaces, the choice of candidates.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Of other threads nothing is asked while this one captures. A capture that fails may
            # leave its own stream as the current one: the outer `with` takes care of that.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = function(*inputs)
        return Captured(graph.replay, list(inputs), outputs)

    def enter(self) -> None:
        """The current stream waits until the last graph and the copies of its outputs are done."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def leave(self) -> None:
        """What was put into the current stream until here is what the next enter() waits for."""
        with torch.cuda.device(self._device):
            if self._done is None:
                self._done = torch.cuda.Event()
            self._done.record()

    def finish(self) -> None:
        """Wait until no graph runs, before one is dropped."""
        if self._done is not None:
            self._done.synchronize()

    def recording(self) -> bool:
        """Whether the caller records a graph of its own."""
        return torch.cuda.is_current_stream_capturing()
