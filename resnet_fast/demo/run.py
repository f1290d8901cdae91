# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnet_fast demo``: both parts, the printed report, demo.json and demo.png."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import resnet_fast as rf
from resnet_fast import env
from resnet_fast.cli import UserError
from resnet_fast.demo import digits, figure, photos
from resnet_fast.demo.images import folder_photos, shipped_photos
from resnet_fast.demo.turns import FAST, PLAIN, Turns

ACCURACY = 0.97
# Relative; what different rounding alone can do is a hundred times less.
LOSS_TOLERANCE = 1e-3
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """How much work: pixels, most training steps, photographs and seconds of timing."""

    digit: int = 32
    steps: int | None = None
    photo: int = 224
    photos: int | None = None
    budget: float = 25.0


QUICK = Sizes(digit=16, steps=6, photo=64, photos=2, budget=0.5)


class Check(NamedTuple):
    """Something the demo promises."""

    name: str
    passed: bool
    detail: str


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
    )


def _train(options: Namespace, sizes: Sizes, console: Console) -> digits.Training:
    with _bar(console) as bar:
        task = bar.add_task("digits: plain / accelerated", total=None, text="")

        def report(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        return digits.train(sizes.digit, options.epochs, options.seed, sizes.steps, report)


def _prepare(options: Namespace, sizes: Sizes) -> photos.Prepared:
    chosen = folder_photos(options.images) if options.images else shipped_photos()
    return photos.prepare(
        chosen[: sizes.photos],
        options.model,
        options.weights,
        seed=options.seed,
        size=sizes.photo,
    )


def _compare(prepared: photos.Prepared, budget: float, console: Console) -> photos.Comparison:
    with _bar(console) as bar:
        task = bar.add_task("photographs: plain / accelerated", total=1.0, text="")

        def report(share: float) -> None:
            bar.update(task, completed=share)

        return photos.compare(prepared, budget, report)


def checks(training: digits.Training, comparison: photos.Comparison, quick: bool) -> list[Check]:
    """What must hold; the accuracy is not asked of a quick run's few steps."""
    early, relative = training.early_difference, comparison.relative_difference
    found = [
        Check("same losses at first", early <= LOSS_TOLERANCE, f"relative {early:.1e}, 2 steps"),
        Check("same logits", relative <= LOGIT_TOLERANCE, f"relative {relative:.1e}"),
        Check("same best class", comparison.agreement == 1.0, f"{comparison.agreement:.0%}"),
    ]
    for name, side in training.sides.items() if not quick else ():
        detail = f"{side.accuracy:.2%} of {training.test_count} test digits"
        found.append(Check(f"{name} accuracy", side.accuracy >= ACCURACY, detail))
    return found


def _print_training(training: digits.Training, console: Console) -> None:
    table = Table(
        title="Digits: loss, one row for each tenth of the training", title_justify="left"
    )
    for column in ("step", PLAIN, FAST):
        table.add_column(column, justify="right")
    steps = len(training.sides[PLAIN].losses)
    for at in sorted({round(i * (steps - 1) / 10) for i in range(11)}):
        losses = [f"{training.sides[name].losses[at]:.4f}" for name in (PLAIN, FAST)]
        table.add_row(str(at + 1), *losses)
    table.add_section()
    accuracies = [f"{training.sides[name].accuracy:.2%}" for name in (PLAIN, FAST)]
    table.add_row("test accuracy", *accuracies)
    times = [f"{1e3 * training.turns.median(name):.1f} ms" for name in (PLAIN, FAST)]
    table.add_row("median step", *times)
    console.print(table)
    console.print(
        "Equal at first, then apart: each step amplifies rounding, in any two float32 runs."
    )
    console.print(_ratio_line("training step", training.turns))


def _ratio_line(what: str, turns: Turns) -> str:
    ratio = turns.ratio()
    return f"{what}: accelerated runs at [bold]{ratio:.2f}x[/bold] plain PyTorch's speed (median of {len(turns.seconds[PLAIN])} rounds in turn)"  # noqa: E501  # fmt: skip


def _print_photos(comparison: photos.Comparison, name: str, console: Console) -> None:
    prepared = comparison.prepared
    console.print(f"{prepared.source}'s {name}; weights: {prepared.weights}")
    table = Table(title="Photographs", title_justify="left")
    for column in ("photograph", f"best, {PLAIN}", f"best, {FAST}", "largest logit difference"):
        table.add_column(column)
    difference = (comparison.logits[PLAIN] - comparison.logits[FAST]).abs().amax(1).tolist()
    rows = zip(
        prepared.names, comparison.top1(PLAIN), comparison.top1(FAST), difference, strict=True
    )
    for photo, plain, fast, value in rows:
        table.add_row(Text(photo), plain, fast, f"{value:.1e}")
    console.print(table)
    if not prepared.trained:
        console.print("Untrained: the class means nothing, that both sides agree on it does.")
    each = [f"{1e3 * comparison.turns.median(s) / comparison.batch:.1f} ms" for s in (PLAIN, FAST)]
    console.print(
        f"per photograph, batch {comparison.batch}: {each[0]} plain, {each[1]} accelerated"
    )
    console.print(_ratio_line("inference", comparison.turns))


def _timing(turns: Turns) -> dict[str, Any]:
    return {
        "seconds": turns.seconds,
        "median_seconds": {name: turns.median(name) for name in (PLAIN, FAST)},
        "ratio": turns.ratio(),
    }


def result(
    options: Namespace,
    training: digits.Training,
    comparison: photos.Comparison,
    explanation: str,
    found: list[Check],
) -> dict[str, Any]:
    """Everything the demo found, for demo.json. Ratios are plain / accelerated seconds."""
    return {
        "version": rf.__version__,
        "quick": options.quick,
        "seed": options.seed,
        "environment": env.report(),
        "digits": {
            "train_count": training.train_count,
            "test_count": training.test_count,
            "loss": {name: side.losses for name, side in training.sides.items()},
            "test_accuracy": {name: side.accuracy for name, side in training.sides.items()},
            "early_loss_difference": training.early_difference,
            "step": _timing(training.turns),
        },
        "photos": {
            "model": f"{comparison.prepared.source}:{options.model}",
            "weights": comparison.prepared.weights,
            "names": comparison.prepared.names,
            "top1": {name: comparison.top1(name) for name in (PLAIN, FAST)},
            "top1_agreement": comparison.agreement,
            "largest_logit_difference": comparison.largest_difference,
            "relative_logit_difference": comparison.relative_difference,
            "batch": comparison.batch,
            "step": _timing(comparison.turns),
        },
        "explain": explanation.splitlines(),
        "checks": [check._asdict() for check in found],
    }


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made a folder: {error.strerror}") from None


def main(options: Namespace) -> int:
    """Run the demo; 0 if every check holds, 1 if one fails. UserError for what a user can mend."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    sizes = QUICK if options.quick else Sizes()
    if options.threads:
        torch.set_num_threads(options.threads)
    # First what can be wrong at once: nobody should wait a minute for a misspelt folder.
    _make_folder(options.out)
    figure.check_available()
    prepared = _prepare(options, sizes)
    if not rf.is_available():
        console.print(f"[bold]Both sides run plain PyTorch here:[/bold] {rf.why_unavailable()}")

    training = _train(options, sizes, console)
    _print_training(training, console)
    comparison = _compare(prepared, sizes.budget, console)
    _print_photos(comparison, options.model, console)
    explanation = str(rf.explain(comparison.model, prepared.images[:1]))
    console.print("\nWhat ran where (rf.explain):")
    console.print(Text(explanation))

    found = checks(training, comparison, options.quick)
    for check in found:
        mark = "[green]ok[/green]    " if check.passed else "[red]FAILED[/red]"
        console.print(f"{mark} {check.name}: {check.detail}")
    text = json.dumps(result(options, training, comparison, explanation, found), indent=1)
    (options.out / "demo.json").write_text(text + "\n", encoding="utf-8")
    picture = options.out / "demo.png"
    figure.draw(training, comparison, options.model, torch.get_num_threads(), picture)
    console.print(f"written: {picture} and {options.out / 'demo.json'}")
    return 0 if all(check.passed for check in found) else 1
