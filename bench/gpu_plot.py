# SPDX-License-Identifier: BSD-3-Clause
"""The roofline picture of a card's rows: bytes a second against bytes moved, under the copy's."""

from __future__ import annotations

from pathlib import Path

from .plot import COLORS
from .rows import Row

MARKERS = {"bn": "o", "bn_relu": "s", "bn_add_relu": "^", "add_relu": "D"}


def points(rows: list[Row], layout: str, dtype: str) -> dict[tuple[str, str], list[Row]]:
    """(provider, op) -> rows that state their bytes, smallest first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (
            row["kind"] == "op"
            and "bytes" in row
            and (row["layout"], row["dtype"]) == (layout, dtype)
        ):
            found.setdefault((row["provider"], row["name"]), []).append(row)
    return {key: sorted(of, key=lambda r: r["bytes"]) for key, of in found.items()}


def draw(rows: list[Row], path: Path) -> Path | None:
    """One panel per dtype, channels_last; None where matplotlib or rows are missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows if r["kind"] == "op" and "bytes" in r))
    if not dtypes:
        return None
    copies = [row["bytes_per_second"] for row in rows if row["kind"] == "copy"]
    figure = Figure(figsize=(6 * len(dtypes), 4.8), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for index, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, len(dtypes), index + 1)
        for (provider, op), of in points(rows, "channels_last", dtype).items():
            axes.plot(
                [row["bytes"] for row in of],
                [row["bytes"] / row["p50"] / 1e9 for row in of],
                MARKERS[op],
                color=COLORS[provider],
                label=f"{provider} {op}",
            )
        if copies:
            axes.axhline(copies[-1] / 1e9, color="black", linewidth=0.8, label="copy")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("least bytes of the scheme, forward + backward")
        axes.set_ylabel("GB/s")
        axes.set_title(dtype, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[-1].get('card', '')}; channels_last, cold L2", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
