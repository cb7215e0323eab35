# SPDX-License-Identifier: Apache-2.0
"""The history of a training: a row for each evaluation, as JSON and as curves."""

import json
from pathlib import Path
from typing import Any

from ..errors import one_line


HISTORY = "history.json"
CURVES = "training_curves.png"


def history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """
    The Trainer's log as one row for each step that was evaluated: `epoch`, `step`, `train_loss` (mean since the last
    row, if it was logged), `learning_rate`, and the `eval_*` metrics.
    """
    rows, losses, rate, steps = [], [], None, set()
    for entry in log:
        if "loss" in entry:
            losses.append(entry["loss"])
            rate = entry.get("learning_rate", rate)
        if "eval_loss" in entry and entry["step"] not in steps:
            steps.add(entry["step"])
            row: dict[str, Any] = {"epoch": entry["epoch"], "step": entry["step"]}
            row |= {"train_loss": sum(losses) / len(losses), "learning_rate": rate} if losses else {}
            rows.append(row | {key: value for key, value in entry.items() if key.startswith("eval_")})
            losses = []
    return rows


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def draw_curves(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy over the epochs, side by side, as a PNG."""
    # Without pyplot, so that no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(rows) < 30 else None
    for axes, key, label, factor in (
        (loss, "train_loss", "training (augmented)", 1),
        (loss, "eval_loss", "held out", 1),
        (accuracy, "eval_accuracy", "top-1", 100),
        (accuracy, "eval_top5_accuracy", "top-5", 100),
        (loss, "eval_ema_loss", "held out, averaged weights", 1),
        (accuracy, "eval_ema_accuracy", "top-1, averaged weights", 100),
    ):
        if points := [(row["epoch"], factor * row[key]) for row in rows if key in row]:
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
    for axes, name in ((loss, "loss"), (accuracy, "held-out accuracy in %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(one_line(title), parse_math=False)
    figure.savefig(path, dpi=120)
