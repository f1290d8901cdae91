# SPDX-License-Identifier: BSD-3-Clause
"""Rows of what Nsight Compute measured: ``ncu --csv --print-units base`` of two metrics."""

from __future__ import annotations

import csv
import re

from .rows import Row

DURATION = "gpu__time_duration.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


def rows_of(text: str) -> list[Row]:
    """One row a kernel launch that has both metrics, in order of the launches.

    text: ncu's log; what stands before the table (its own messages) is passed over. Raises
    ValueError where there is no table, or a unit of time is unknown.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise ValueError("ncu wrote no table: " + " ".join(lines[-3:]))
    launches: dict[str, Row] = {}
    for entry in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        row = launches.setdefault(
            entry["ID"],
            {
                "kind": "profile",
                "name": entry["Kernel Name"].split("(")[0].split("<")[0].split("::")[-1],
                "shape": [int(n) for n in re.findall(r"\d+", entry["Grid Size"])],
                "dtype": "",
                "layout": "",
                "provider": "ours",
                "mode": "",
            },
        )
        value = float(entry["Metric Value"].replace(",", ""))
        if entry["Metric Name"] == DURATION:
            if entry["Metric Unit"] not in SECONDS:
                raise ValueError(f"a duration in {entry['Metric Unit']!r}")
            row["seconds"] = value * SECONDS[entry["Metric Unit"]]
        elif entry["Metric Name"] == DRAM:
            row["dram"] = value / 100
    return [row for row in launches.values() if {"seconds", "dram"} <= row.keys()]
