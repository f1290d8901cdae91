# SPDX-License-Identifier: BSD-3-Clause
"""The demo's picture: loss curves, time per training step, time per photograph."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from resnet_fast.cli import need
from resnet_fast.demo.digits import Training
from resnet_fast.demo.photos import Comparison
from resnet_fast.demo.turns import FAST, PLAIN

COLORS = {PLAIN: "#e0913a", FAST: "#1f5fa8"}


def _losses(axes: Any, training: Training) -> None:
    """Both curves; the plain one wide and pale beneath, so that both show where they coincide."""
    styles = {PLAIN: {"linewidth": 5, "alpha": 0.45}, FAST: {"linewidth": 1.3}}
    for name, side in training.sides.items():
        label = f"{name}: {side.accuracy:.1%} of test digits right"
        steps = range(1, len(side.losses) + 1)
        axes.plot(steps, side.losses, color=COLORS[name], label=label, **styles[name])
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross entropy of the batch")
    axes.set_title(f"ResNet-20, {training.train_count:,} handwritten digits")
    axes.legend(frameon=False)


def _step_times(axes: Any, training: Training) -> None:
    """Every step as a dot, the medians as lines."""
    turns = training.turns
    for name, seconds in turns.seconds.items():
        times = [1e3 * value for value in seconds]
        median = 1e3 * turns.median(name)
        axes.plot(range(1, len(times) + 1), times, ".", color=COLORS[name], alpha=0.45)
        axes.axhline(median, color=COLORS[name], label=f"{name}: median {median:.0f} ms")
    # Disturbed steps must not flatten the rest: they are counted, not drawn.
    top = 2 * max(1e3 * turns.median(name) for name in turns.seconds)
    beyond = sum(1e3 * value > top for times in turns.seconds.values() for value in times)
    axes.set_ylim(0, top)
    if beyond:
        axes.text(0.02, 0.02, f"{beyond} slower steps not shown", transform=axes.transAxes)
    axes.set_xlabel("training step, the two in turn")
    axes.set_ylabel("ms per step")
    axes.set_title(f"Training step: {turns.ratio():.2f}x as fast")
    axes.legend(frameon=False, loc="upper right")


def _photo_times(axes: Any, comparison: Comparison, model: str) -> None:
    turns = comparison.turns
    for place, name in enumerate(turns.seconds):
        each = 1e3 * turns.median(name) / comparison.batch
        axes.bar(place, each, 0.6, color=COLORS[name])
        axes.text(place, each, f"{each:.1f} ms", ha="center", va="bottom")
    axes.set_xticks(range(len(turns.seconds)), list(turns.seconds))
    axes.set_ylabel(f"ms per photograph, inference at batch {comparison.batch}")
    axes.set_title(f"{model}: {turns.ratio():.2f}x as fast")
    axes.margins(y=0.12)


def check_available() -> None:
    """UserError where matplotlib is missing: asked before the work, not after it."""
    need("matplotlib.figure", "matplotlib", "the demo's picture")


def draw(training: Training, comparison: Comparison, model: str, threads: int, path: Path) -> None:
    """Write the picture (PNG) to ``path``."""
    backend = importlib.import_module("matplotlib.backends.backend_agg")
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(13.5, 4.4), layout="constrained", dpi=130
    )
    backend.FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    _losses(left, training)
    _step_times(middle, training)
    _photo_times(right, comparison, model)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"resnet_fast demo: plain PyTorch and accelerated; CPU threads: {threads}")
    figure.savefig(path)
