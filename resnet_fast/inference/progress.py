# SPDX-License-Identifier: BSD-3-Clause
"""What loading is at, for whoever waits: nothing where it is quick or nobody reads it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from resnet_fast.dispatch import logger

AFTER = 2.0  # seconds of quiet on a terminal

# (steps done, steps in all, what comes now); the last call has done == steps in all.
Tell = Callable[[int, int, str], None]


class Progress:
    """``with Progress(wanted) as say: say(done, total, what)`` before each step.

    wanted: True writes lines to stderr from the start, None only to a terminal and once it took
    longer than AFTER seconds, False nothing. A function is called with every step instead. What it
    took in all goes to the logger in any case, as INFO.
    """

    def __init__(self, wanted: bool | Tell | None) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._line, self._shown = "", False
        self._began = time.perf_counter()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Tell:
        self._began = time.perf_counter()
        self._shown = self._wanted is True
        if self._wanted is None and sys.stderr is not None and sys.stderr.isatty():
            # The longest step, tracing, says nothing while it runs: what it is comes from outside.
            self._timer = threading.Timer(AFTER, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self._wanted if callable(self._wanted) else self._say

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            seconds = time.perf_counter() - self._began
            ended = f"loaded in {seconds:.1f} s" if error is None else f"failed: {kind.__name__}"  # type: ignore[union-attr]
            if self._shown:
                self._write(ended, "\n")
            self._shown = False
            self._wanted = False
        logger.info("optimize_for_inference: %s", ended)

    def _say(self, done: int, total: int, what: str) -> None:
        with self._lock:
            self._line = f"{100 * done // max(total, 1):3d} % {what}"
            if self._shown:
                self._write(self._line, "")

    def _show(self) -> None:
        with self._lock:
            if self._wanted is None:
                self._shown = True
                self._write(self._line, "")

    def _write(self, what: str, end: str) -> None:
        """Over the line before, on a terminal; a line of its own elsewhere."""
        if sys.stderr is None:
            return
        if sys.stderr.isatty():
            print(f"\r\033[Koptimize_for_inference: {what}", end=end, file=sys.stderr, flush=True)
        else:
            print(f"optimize_for_inference: {what}", file=sys.stderr, flush=True)
