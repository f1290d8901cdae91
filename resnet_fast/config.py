# SPDX-License-Identifier: BSD-3-Clause
"""Which implementation is asked for: one process-wide setting and the environment's switches.

Environment (read once, at import):

``RESNET_FAST_DISABLE=1``  the compiled extension is not loaded: the reference runs everywhere.
``RESNET_FAST_REQUIRE=1``  raise instead of falling back to the reference.
``RESNET_FAST_LOG=0|1|2``  0 silent (default), 1 each new fallback once, 2 each new decision once.
"""

from __future__ import annotations

import os
from types import TracebackType

BACKENDS = ("auto", "reference", "cpu", "cuda")


def _flag(name: str) -> bool:
    return os.environ.get(name, "0").strip().lower() in ("1", "true", "yes", "on")


def _log_level() -> int:
    text = os.environ.get("RESNET_FAST_LOG", "0").strip()
    return int(text) if text in ("0", "1", "2") else 0


disabled: bool = _flag("RESNET_FAST_DISABLE")
required: bool = _flag("RESNET_FAST_REQUIRE")
log_level: int = _log_level()

# NOTE: a plain module attribute, not a context variable: it is read at every call of every op, and
# torch.compile guards on it (changing it recompiles, as it must).
_backend: str = "auto"


def backend() -> str:
    """The implementation asked for now: "auto", "reference", "cpu" or "cuda"."""
    return _backend


class use_backend:
    """Ask for one implementation, for a block of code or from here on.

    ``use_backend("reference")`` sets it for the process; ``with use_backend("reference"):`` sets it
    back at the end of the block. "auto" takes the fast implementation wherever it can run; "cpu"
    and "cuda" allow only that one. A call that the named implementation cannot serve runs the
    reference (or raises, under ``RESNET_FAST_REQUIRE=1``). The setting is shared by all threads.

    Raises ``ValueError`` for any other name.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"name must be one of {', '.join(BACKENDS)}; got {name!r}")
        self._previous = _backend
        _backend = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _backend
        _backend = self._previous
