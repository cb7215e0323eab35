# SPDX-License-Identifier: Apache-2.0
"""
The rows of benchmarks/results/ as tables for the documentation, whole runs first:

    python -m benchmarks.table [cuda.csv]

What depends on the host stands as a range over the machines met, the last three of those whose CPU the rows name.
"""

import csv
import itertools
import sys
from pathlib import Path


RESULTS = Path(__file__).parent / "results"
MACHINES = 3


def read(path: Path, key: tuple[str, ...], **wanted: str) -> dict[tuple, list[dict]]:
    """Read the rows with the wanted fields, by key: for each machine the last measured, newest machine last."""
    found: dict[tuple, dict] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if all(row[name] == value for name, value in wanted.items()):
                    machines = found.setdefault(tuple(row[name] for name in key), {})
                    machine = (row["hardware"], row["cpu"])
                    machines.pop(machine, None)
                    machines[machine] = row
    return {key: list(machines.values()) for key, machines in found.items()}


def spread(rows: list[dict], name: str) -> str:
    """Write out the range of a ratio over the machines."""
    values = [f"{float(row[name]):.2f}" for row in rows if row["cpu"] and row[name]][-MACHINES:]
    return " to ".join(sorted({min(values, key=float), max(values, key=float)}, key=float)) if values else ""


def last(rows: list[dict], name: str, form: str = ",.0f") -> str:
    return format(float(rows[-1][name]), form) if rows and rows[-1][name] else ""


def show(title: str, columns: str, lines: list[list[str]]) -> None:
    if lines:
        print(f"\n{title}\n\n| {columns} |\n|{' --- |' * (columns.count('|') + 1)}")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cuda.csv"
    key = ("model", "batch", "mode", "epochs", "provider", "start")
    runs = read(path.with_stem(f"{path.stem}_runs"), key, benchmark="runs")
    lines = []
    for name in dict.fromkeys(key[:4] for key in runs):
        cold, warm, softmax_cold, softmax_warm = (
            runs.get((*name, *end), []) for end in itertools.product(("karat", "softmax"), ("cold", "warm"))
        )
        starts = [last(rows, "startup_seconds") for rows in (cold, warm) if rows]
        # From empty caches, a first batch of another size compiles its kernels amid the run.
        karat, softmax = warm or cold, softmax_warm or softmax_cold
        lines.append([*name, last(softmax, "images_per_second"), last(karat, "images_per_second")])
        lines[-1] += [spread(karat, "ratio_time"), " / ".join(starts), last(karat, "seconds")]
    columns = "model | batch | step | epochs | softmax, images/s | KArAt, images/s | time over softmax"
    show("Whole runs", f"{columns} | first step, cold / warm, s | whole command, s", lines)

    rivals = read(path.with_stem(f"{path.stem}_runs"), ("model", "batch", "provider"), benchmark="rivals")
    lines = [[*key, last(rows, "images_per_second"), spread(rows, "ratio_time")] for key, rows in rivals.items()]
    show("Beside what one would take instead", "model | batch | trained by | images/s | time over softmax", lines)

    step_key = ("what", "mode", "model", "provider", "basis", "batch", "tokens")
    steps = {key: rows for key, rows in read(path, step_key, benchmark="model").items() if "softmax" not in key}
    lines = [
        [*key, last(rows, "ratio_gpu", ".2f"), last(rows, "ratio_memory", ".2f"), spread(rows, "ratio_time")]
        for key, rows in steps.items()
    ]
    columns = "what | mode | model | attention | basis | batch | tokens | GPU time | memory | wall time"
    show("Steps, over softmax", columns, lines)
    rows = [row for found in (runs, rivals, steps) for machines in found.values() for row in machines if row["cpu"]]
    for hardware, cpu in dict.fromkeys((row["hardware"], row["cpu"]) for row in rows):
        print(f"\n{hardware}, {cpu}")


if __name__ == "__main__":
    main()
