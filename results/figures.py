# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/results.md: accuracy over the epochs of the finals, and accuracy over the time of training."""

import json
import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style

from .screen import log_of


def groups(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows of the table by screen and arm: one per seed."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        found.setdefault(row["screen"], {}).setdefault(row["arm"], []).append(row)
    return found


def histories(runs: list[dict], logs: Path) -> tuple[np.ndarray, np.ndarray]:
    """The epochs (E,) and the accuracies in percent (seeds, E) of an arm, from the kept logs."""
    read = [json.loads((logs / log_of(run)).read_text(encoding="utf-8")) for run in runs]
    epochs = min(([row["epoch"] for row in history] for history in read), key=len)
    return np.array(epochs), np.array(
        [[100 * row["eval_accuracy"] for row in history[: len(epochs)]] for history in read]
    )


def draw_curves(arms: dict[str, list[dict]], logs: Path, axes: Axes) -> Axes:
    """Test accuracy of each arm's plain weights: the mean over its seeds, in a band from the lowest to the highest."""
    for index, (arm, runs) in enumerate(arms.items()):
        epochs, accuracies = histories(runs, logs)
        colour = style.PALETTE[index % len(style.PALETTE)]
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        axes.plot(epochs, accuracies.mean(0), color=colour, label=f"{arm}{seeds}")
        if len(runs) > 1:
            axes.fill_between(epochs, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy in %")
    axes.legend(loc="lower right")
    return axes


def draw_cost(arms: dict[str, list[dict]], axes: Axes) -> Axes:
    """The last accuracy of each arm over what an image costs in training, as a multiple of the arm `softmax`."""
    speeds = {arm: statistics.fmean(float(run["images_per_second"]) for run in runs) for arm, runs in arms.items()}
    for index, (arm, runs) in enumerate(arms.items()):
        cost = speeds["softmax"] / speeds[arm]
        last = [float(run["last"]) for run in runs]
        colour = style.PALETTE[index % len(style.PALETTE)]
        axes.plot([cost] * len(last), last, "o", color=colour, markersize=4, label=arm)
    axes.margins(0.15)
    axes.set_xlabel("time per image (softmax = 1)")
    axes.set_ylabel("accuracy in %")
    axes.legend(loc="best")
    return axes


def figures(rows: list[dict], logs: Path, test: str) -> dict[str, Figure]:
    """
    The figures that the rows allow, by name.

    Args:
        rows: of the table.
        logs: folder of histories.
        test: what `judged_on` says of runs on the test images.
    """
    finals = groups([row for row in rows if row["judged_on"] == test])
    compared = {name: arms for name, arms in groups(rows).items() if "softmax" in arms and len(arms) > 1}
    drawings = {
        "results_curves": (finals, lambda arms, axes: draw_curves(arms, logs, axes)),
        "results_cost": (compared, draw_cost),
    }
    made = {}
    for name, (screens, draw) in drawings.items():
        if not screens:
            continue
        columns = style.columns_of(len(screens))
        lines = -(-len(screens) // columns)
        made[name] = style.figure(style.COLUMN if columns == 1 else style.PAGE, 2.4 * lines)
        panels = made[name].subplots(lines, columns, squeeze=False).flat
        for (screen, arms), axes in zip(screens.items(), panels):
            draw(arms, axes).set_title(screen)
        for axes in panels:  # What is left of the last row.
            axes.remove()
    return made
