# SPDX-License-Identifier: BSD-3-Clause
"""Tables of result rows."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .rows import Row

PROVIDERS = ("eager", "compile", "ours")


def _grouped(rows: Iterable[Row], *fields: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(
            "x".join(map(str, value)) if isinstance(value := row[field], list) else str(value)
            for field in fields
        )
        groups.setdefault(key, []).append(row)
    return groups


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _table(title: str, *columns: str, texts: int) -> Table:
    """A table whose first ``texts`` columns are left-aligned and the rest are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right")
    return table


def _by_provider(rows: Iterable[Row]) -> dict[str, Row]:
    return {row["provider"]: row for row in rows}


def _timed(of: dict[str, Row]) -> list[str]:
    """Cells: p50 of each provider, then ours against eager and compile."""
    ours = of.get("ours", {})
    times = [_seconds(of.get(name, {}).get("p50")) for name in PROVIDERS]
    return [*times, _ratio(ours.get("ratio_vs_eager")), _ratio(ours.get("ratio_vs_compile"))]


TIMED = (*PROVIDERS, "vs eager", "vs compile")


def layer_tables(rows: list[Row]) -> list[Table]:
    """Every layer: p50 of a forward + backward, ratios, bytes and share of copy bandwidth."""
    tables = []
    for setting, of_setting in _grouped(rows, "dtype", "layout", "allocator").items():
        title = f"Forward + backward (p50): {', '.join(setting)} allocator"
        table = _table(title, "op", "shape", "times", *TIMED, "MB", "of copy", texts=2)
        for key, group in _grouped(of_setting, "name", "shape").items():
            of = _by_provider(group)
            ours = of.get("ours", {})
            moved = f"{ours['bytes'] / 1e6:.0f}" if "bytes" in ours else "-"
            share = f"{ours['share_of_copy']:.0%}" if "share_of_copy" in ours else "-"
            table.add_row(*key, str(group[0]["count"]), *_timed(of), moved, share)
        tables.append(table)
    return tables


def total_table(rows: list[Row]) -> Table:
    """Sums over the network's layers."""
    columns = ("sum over layers", "images", "dtype", "layout", "allocator")
    table = _table(
        "Ops summed over ResNet-50's layers, times occurrence", *columns, *TIMED, texts=5
    )
    for key, group in _grouped(rows, "name", "shape", "dtype", "layout", "allocator").items():
        table.add_row(*key, *_timed(_by_provider(group)))
    return table


def model_tables(rows: list[Row]) -> list[Table]:
    """Training steps; ratios are of ours, within one process."""
    tables = []
    for (name, shape), of_model in _grouped(rows, "name", "shape").items():
        title = f"Training step of {name} on {shape} (p50; channels_last but for the first)"
        columns = ("dtype", "allocator", "eager nchw", *TIMED, "vs nchw")
        table = _table(title, *columns, texts=2)
        for key, group in _grouped(of_model, "dtype", "allocator").items():
            nchw = [row["p50"] for row in group if row["layout"] == "nchw"]
            of = _by_provider(row for row in group if row["layout"] != "nchw")
            against = _ratio(of.get("ours", {}).get("ratio_vs_eager_nchw"))
            table.add_row(*key, _seconds(nchw[0] if nchw else None), *_timed(of), against)
        tables.append(table)
    return tables


def apart_table(rows: list[Row]) -> Table:
    """What a user gains over PyTorch as it comes."""
    columns = ("model", "input", "dtype", *("eager nchw", "eager", "ours", "vs nchw", "vs eager"))
    table = _table("Training step: ours with tune_cpu_memory(), eager without", *columns, texts=3)
    for key, group in _grouped(rows, "name", "shape", "dtype").items():
        of = {(row["provider"], row["layout"]): row for row in group}
        nchw, last, ours = (
            of.get(at, {})
            for at in (("eager", "nchw"), ("eager", "channels_last"), ("ours", "channels_last"))
        )
        times = [_seconds(row.get("p50")) for row in (nchw, last, ours)]
        ratios = [_ratio(ours.get(f"ratio_vs_eager{base}")) for base in ("_nchw", "")]
        table.add_row(*key, *times, *ratios)
    return table


def memory_table(rows: list[Row]) -> Table:
    """Activations saved for backward."""
    columns = ("model", "input", "dtype", "eager", "ours", "eager / ours")
    table = _table("Activation memory of a training step", *columns, texts=3)
    for key, group in _grouped(rows, "name", "shape", "dtype").items():
        of = _by_provider(group)
        sizes = [
            f"{of[name]['memory_bytes'] / 2**20:.0f} MiB" if name in of else "-"
            for name in ("eager", "ours")
        ]
        table.add_row(*key, *sizes, _ratio(of.get("ours", {}).get("ratio_vs_eager")))
    return table


def inference_tables(rows: list[Row]) -> list[Table]:
    """Latency of every rival, one table per model, batch and dtype."""
    tables = []
    for key, group in _grouped(rows, "name", "shape", "dtype").items():
        columns = ("rival", "p50", "p95", "images/s", "MiB")
        table = _table("Inference of " + ", ".join(key), *columns, texts=1)
        for row in group:
            memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.0f}"
            name = f"{row['provider']} {row['layout']}"
            speed = f"{row['images_s']:.1f}"
            name += f" ({row['note']})" if "note" in row else ""
            table.add_row(name, _seconds(row["p50"]), _seconds(row["p95"]), speed, memory)
        ours = _by_provider(group).get("ours", {})
        if "best_rival" in ours:
            best = f"{_ratio(ours['ratio_vs_best'])} the best rival ({ours['best_rival']})"
            table.caption = f"ours: {best}, {_ratio(ours['ratio_vs_eager'])} eager"
        tables.append(table)
    return tables


def left_out_lines(failed: list[Row], measured: list[Row]) -> list[str]:
    """One line for each rival that could not run and has not run since."""

    def key(row: Row) -> tuple[str, ...]:
        fields = ("name", "shape", "dtype", "provider", "layout")
        return tuple(str(row[field]) for field in fields)

    newer = {key(row): row["time"] for row in measured}
    return [
        f"{row['name']} {'x'.join(map(str, row['shape']))} {row['dtype']}: {row['provider']} "
        f"{row['layout']} left out: {row['error']}"
        for row in failed
        if newer.get(key(row), "") < row["time"]
    ]


def overhead_table(rows: list[Row]) -> Table:
    """Whole networks on pictures so small that the calls are most of the time."""
    table = _table("The cost of the calls", "model", "input", "mode", *TIMED, texts=3)
    for key, group in _grouped(rows, "name", "shape", "mode").items():
        table.add_row(*key, *_timed(_by_provider(group)))
    return table


def uses_table(rows: list[Row]) -> Table:
    """A step of each way of use."""
    table = _table("Ways of use", "row", "step", "model", "input", *TIMED, texts=4)
    for key, group in _grouped(rows, "row", "mode", "name", "shape").items():
        table.add_row(*key, *_timed(_by_provider(group)))
    return table


def print_tables(rows: list[Row], console: Console, *, layers: bool) -> None:
    """Print every table that ``rows`` have something for, one machine after the other."""
    for (cpu, threads), machine in _grouped(rows, "cpu", "threads").items():
        kinds: dict[str, list[Row]] = {}
        for row in machine:
            kinds.setdefault(row["kind"], []).append(row)
        commits = ", ".join(sorted({f"{row['commit']} (torch {row['torch']})" for row in machine}))
        console.print(f"\n[bold]{cpu}, {threads} threads[/bold]; commit {commits}")
        for row in kinds.get("copy", []):
            speed = row["bytes_per_second"] / 1e9
            console.print(f"copy bandwidth, {row['allocator']} allocator: {speed:.1f} GB/s")
        if layers and "op" in kinds:
            console.print(*layer_tables(kinds["op"]), sep="\n")
        if "total" in kinds:
            console.print(total_table(kinds["total"]))
        if "model" in kinds:
            console.print(*model_tables(kinds["model"]), sep="\n")
        if "apart" in kinds:
            console.print(apart_table(kinds["apart"]))
        if "inference" in kinds:
            console.print(*inference_tables(kinds["inference"]), sep="\n")
        for line in left_out_lines(kinds.get("failed", []), kinds.get("inference", [])):
            console.print(line, highlight=False, markup=False)
        if "overhead" in kinds:
            console.print(overhead_table(kinds["overhead"]))
        if "use" in kinds:
            console.print(uses_table(kinds["use"]))
        if "memory" in kinds:
            console.print(memory_table(kinds["memory"]))
