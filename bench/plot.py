# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the stored rows: ``python -m bench.plot [ROWS.jsonl [OUT.png]]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .rows import RESULTS, Row, load, newest

COLORS = {"eager nchw": "#b9bec6", "eager": "#7f8794", "compile": "#d08a2e", "ours": "#1f6fb2"}


def _label(value: float, unit: str) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _bars(axes: Any, groups: list[tuple[str, dict[str, float]]], unit: str) -> None:
    """Horizontal bars, one group per label, fastest last; the value is written at each bar."""
    place = 0.0
    ticks: list[tuple[float, str]] = []
    seen: set[str] = set()
    longest = max((max(of.values()) for _, of in groups), default=1.0)
    for label, of in groups:
        ticks.append((place + (len(of) - 1) / 2, label))
        for name, value in of.items():
            axes.barh(place, value, 0.85, color=COLORS[name], label=None if name in seen else name)
            axes.text(value + longest * 0.01, place, _label(value, unit), va="center", fontsize=8)
            seen.add(name)
            place += 1
        place += 0.8
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.06))


def _order(of: dict[str, float]) -> dict[str, float]:
    return {name: of[name] for name in COLORS if name in of}


def _groups(rows: list[Row], scale: float) -> list[tuple[str, dict[str, float]]]:
    """Seconds times scale by what is compared, of its newest run: an older one met another load."""
    groups: dict[str, dict[str, float]] = {}
    times: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: str(row["time"])):
        nchw = row["layout"] == "nchw"
        if nchw and row["kind"] == "total":
            continue
        label = f"{row['dtype']}\n{row['allocator']} malloc"
        if times.setdefault(label, row["time"]) != row["time"]:
            times[label], groups[label] = row["time"], {}
        provider = f"{row['provider']} nchw" if nchw else row["provider"]
        groups.setdefault(label, {})[provider] = row["p50"] * scale
    return [(label, _order(of)) for label, of in groups.items()]


def draw(rows: list[Row], path: Path) -> Path | None:
    """Draw the newest machine's totals and training steps; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    machine = (rows[-1]["cpu"], rows[-1]["threads"]) if rows else ("", 0)
    rows = [row for row in rows if (row["cpu"], row["threads"]) == machine]
    totals = [r for r in rows if r["kind"] == "total" and r["name"] == "resnet50 all norms"]
    steps = [row for row in rows if row["kind"] == "model"]
    norms = "All 53 batch norms with ReLU and add,\nforward + backward (ms)"
    panels = [
        (norms, _groups(totals, 1e3), "ms"),
        (f"{steps[0]['name'] if steps else ''} training step (s)", _groups(steps, 1.0), "s"),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(6.2 * max(len(panels), 1), 5.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for index, (title, groups, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _bars(axes, groups, unit)
        axes.set_title(title, fontsize=10)
    figure.suptitle(f"{machine[0]}, {machine[1]} threads; channels_last unless said", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    print(draw(newest(load(source)), target) or "matplotlib is missing")
