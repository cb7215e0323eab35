# SPDX-License-Identifier: Apache-2.0
"""
Loss and accuracy of several runs together, over their epochs: training loss (dashed), held-out loss and accuracy.

--model takes folders of runs of run_image_classification.py, finished or not. Writes curves.png, .svg and .csv.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from image_classification.errors import InputError, reason_of
from image_classification.reports.curves import HISTORY, history
from image_classification.runs import checkpoints
from image_classification.runs.run_folder import RECORD

from . import options, style
from .models import read_state, run_folder
from .output import Output, figure_names


METRICS = {
    "train_loss": "training loss",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "eval_top5_accuracy": "held-out top-5 accuracy",
}


@dataclass(kw_only=True)
class Curves:
    """
    The curves of one run.

    Args:
        name: what figures call it.
        epochs: of its evaluations, (E,).
        metrics: by the keys of `METRICS`, (E,), NaN where one was not logged; accuracies from 0 to 1.
        rows: everything that history.json says of each evaluation.
    """

    name: str
    epochs: np.ndarray
    metrics: dict[str, np.ndarray]
    rows: list[dict]


def read(source: str, name: str | None = None) -> Curves:
    """
    Read the history of a run: history.json, or of a run that is not finished its last checkpoint's log.

    Raises:
        InputError: `source` is no run's folder, or it has not come to its first evaluation.
    """
    folder = run_folder(source)
    if folder is None:
        raise InputError(
            f"`--model` {source} is no folder of a run of run_image_classification.py: it holds no {RECORD}."
        )
    rows = []
    if (folder / HISTORY).is_file():
        rows = checkpoints.read_json(folder / HISTORY)
    elif (last := checkpoints.newest(folder)[0]) is not None:
        rows = history(read_state(last)["log_history"])
    if not rows:
        raise InputError(f"{folder} holds no evaluation yet: expected {HISTORY}, or a checkpoint with a log.")
    try:
        epochs = np.array([float(row["epoch"]) for row in rows])
        metrics = {key: np.array([float(row.get(key, np.nan)) for row in rows]) for key in METRICS}
        if not np.isfinite(epochs).all() or not np.isfinite(metrics["eval_loss"]).all():
            raise ValueError("an epoch or `eval_loss` that is no number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The history of {folder} ({HISTORY}) is damaged: {reason_of(error)}.") from error
    return Curves(name=name or folder.name, epochs=epochs, metrics=metrics, rows=rows)


def draw(curves: list[Curves], axes: Axes, metric: str) -> Axes:
    """Draw `"loss"`, held-out solid and of training dashed, or `"accuracy"`, held-out, in per cent."""
    for each, colour in zip(curves, _colours(curves)):
        held_out = each.metrics[f"eval_{metric}"] * (1 if metric == "loss" else 100)
        if metric == "loss":
            axes.plot(each.epochs, each.metrics["train_loss"], "--", color=colour, linewidth=0.9)
        marker: dict[str, Any] = {"marker": "o", "markersize": 2} if len(each.epochs) < 30 else {}
        axes.plot(each.epochs, held_out, "-", color=colour, label=each.name, **marker)
    axes.locator_params(axis="x", integer=True)
    label = "loss" if metric == "loss" else f"{METRICS['eval_accuracy']} in %"
    axes.set(xlabel="epoch", ylabel=label, ylim=(0 if metric == "loss" else None, None))
    return axes


def draw_all(curves: list[Curves], figure: Figure) -> Figure:
    """Draw loss and accuracy side by side, one legend."""
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        draw(curves, axes, metric)
    handles = [Line2D([], [], color=colour, label=_described(each)) for each, colour in zip(curves, _colours(curves))]
    handles += [Line2D([], [], color=style.INK, label="held out")]
    if any(np.isfinite(each.metrics["train_loss"]).any() for each in curves):
        handles += [Line2D([], [], color=style.INK, linestyle="--", linewidth=0.9, label="training")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), handlelength=2.2)
    return figure


def _described(each: Curves) -> str:
    last = each.metrics["eval_accuracy"][-1]
    return f"{each.name} ({100 * last:.1f} %)" if np.isfinite(last) else each.name


def _colours(curves: list[Curves]) -> list[str]:
    return [style.PALETTE[index % len(style.PALETTE)] for index in range(len(curves))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, nargs="+", metavar="DIR", help="folders of runs")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    output = Output(args.output, [*figure_names("curves"), "curves.csv"], args.overwrite)
    names = options.names(args.names, args.model)
    curves = [read(source, name) for source, name in zip(args.model, names)]
    with style.context():
        lines = -(-(len(curves) + 2) // 4)
        output.figure("curves", draw_all(curves, style.figure(style.PAGE, 2.0 + 0.18 * lines)))
    output.table("curves.csv", [{"run": each.name} | row for each in curves for row in each.rows])
    output.report()
