# SPDX-License-Identifier: Apache-2.0
"""
The rows of benchmarks/results/cuda.csv as a picture: training steps over softmax's, in GPU time and in peak memory.

    python -m benchmarks.plots [rows.csv] [picture.png]

Without arguments, the picture of docs/performance.md.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from .table import RESULTS, read


PICTURE = Path(__file__).parents[1] / "docs" / "performance.png"
NAMES = {"karat_triton": "fused", "karat_portable": "portable", "eager": "reference", "naive": "einsums"}
BASES = {"fourier G=1": "G1", "fourier G=3": "G3", "mexican_hat": "Mexican hat", "morlet": "Morlet", "dog": "DOG"}
BASES |= {"meyer": "Meyer", "shannon": "Shannon"}
TIME, MEMORY = "#0072b2", "#e69f00"  # Okabe and Ito's, which the colour-blind can tell apart.


def latest(path: Path) -> list[dict]:
    """Pick the last row measured of each training step of the eager mode, in the order of the file."""
    key = ("model", "provider", "basis", "batch", "tokens")
    rows = [machines[-1] for machines in read(path, key, what="train", mode="eager").values()]
    return [row for row in rows if row["provider"] != "softmax" and row["ratio_gpu"]]


def label(row: dict) -> str:
    tokens = "" if row["tokens"] == "197" else f", {int(row['tokens']):,} tokens"
    basis = BASES.get(row["basis"], row["basis"])
    return f"{row['model'].capitalize()} {basis}, {NAMES[row['provider']]}, batch {row['batch']}{tokens}"


def draw(rows: list[dict], path: Path) -> None:
    """Draw a bar of time and one of memory for each row, fastest first, on a logarithmic axis; a line is softmax."""
    rows = sorted(rows, key=lambda row: float(row["ratio_gpu"]), reverse=True)
    figure = Figure(figsize=(7.2, 0.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    for name, color, shift in (("ratio_gpu", TIME, 0.19), ("ratio_memory", MEMORY, -0.19)):
        values = [float(row[name]) for row in rows]
        bars = axes.barh([place + shift for place in places], [value - 1 for value in values], 0.36, 1, color=color)
        for place, value in zip(places, values):
            axes.text(1.015 * max(1.0, value), place + shift, f"{value:.2f}", va="center", fontsize=7)
        bars.set_label("GPU time of a training step" if name == "ratio_gpu" else "peak memory")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.85, 1.5 * max(float(row[name]) for row in rows for name in ("ratio_gpu", "ratio_memory")))
    ticks = [1, 1.5, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(places, [label(row) for row in rows], fontsize=8)
    cards = ", ".join(sorted({row["hardware"].removeprefix("NVIDIA ") for row in rows}))
    axes.set_xlabel(f"over the same ViT with PyTorch's fused softmax attention\n(bfloat16; {cards})", fontsize=8)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = [Path(argument) for argument in sys.argv[1:]]
    rows = arguments[0] if arguments else RESULTS / "cuda.csv"
    picture = arguments[1] if len(arguments) > 1 else rows.with_suffix(".png") if arguments else PICTURE
    draw(latest(rows), picture)
    print(f"Written to {picture}")


if __name__ == "__main__":
    main()
