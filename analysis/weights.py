# SPDX-License-Identifier: Apache-2.0
"""
Distributions of a run's weights over its checkpoints: all weights together; the coefficients of the learned functions,
each harmonic (or kind of coefficient, for other bases) apart; and the projector W. For a softmax ViT: all weights.

The run must have kept its checkpoints (--save_total_limit 0). Its start, before the first step, is rebuilt from the
seed in run.json. Writes weights.png, .svg and .csv (counts of every bin, mean and standard deviation).
"""

import argparse
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from image_classification.errors import InputError

from . import options, style
from .models import Checkpoint, load_moment, moments
from .output import Output, figure_names


BINS = 80


@dataclass(kw_only=True)
class Distributions:
    """
    A group of weights at M moments of a run.

    Args:
        title: what they are.
        edges: borders of the bins, which span all values of all moments, (BINS + 1,).
        counts: (M, BINS).
        means, deviations: (M,).
    """

    title: str
    edges: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


def groups(checkpoint: Checkpoint, block: int | None = None, head: int | None = None) -> dict[str, np.ndarray]:
    """
    Group the weights of a model by what they are.

    Args:
        block, head: take coefficients and W of this block and head only; `None` for all.

    Returns:
        One-dimensional arrays by title: "all weights" always; for KArAt the coefficients, one group for each harmonic
        (a_m and b_m together), spline, wavelet parameter or power, and "W" where the operator has one.

    Raises:
        InputError: the block or head is softmax.
    """
    parts = {"all weights": [parameter.flatten() for parameter in checkpoint.model.parameters()]}
    if checkpoint.is_karat:
        operators, heads = _operators(checkpoint, block, head)
        for operator in operators:
            for step in operator.edges:
                for name in step.parameter_names:
                    parameter = getattr(step, name)
                    if parameter is not None:
                        for title, values in _titled(name, parameter[heads]):
                            parts.setdefault(title, []).append(values.flatten())
        if operators[0].projector is not None:
            parts["projector $W$"] = [operator.projector[heads].flatten() for operator in operators]
    elif block is not None or head is not None:
        raise InputError(f"{checkpoint.source} is a softmax ViT: `--block` and `--head` choose KArAt weights.")
    return {title: torch.cat(values).detach().cpu().numpy() for title, values in parts.items()}


def _operators(checkpoint: Checkpoint, block: int | None, head: int | None) -> tuple[list[Any], slice]:
    """Find the operators that `groups` takes, and the slice of their heads."""
    chosen = range(checkpoint.blocks) if block is None else [block]
    with_heads = [index for index in chosen if "karat" in checkpoint.head_kinds(index)]
    if not with_heads:
        checkpoint.operator(chosen[0])  # raises, and says which blocks have KArAt heads
    # One universal operator is counted once.
    operators: list[Any] = list(dict.fromkeys(map(checkpoint.operator, with_heads)))
    if head is not None and head >= len(operators[0].edges[0].scale_basis):
        raise InputError(f"Head {head} is softmax, and has no learned functions.")
    return operators, slice(None) if head is None else slice(head, head + 1)


def _titled(name: str, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Split a parameter of the basis, (h, K, P, Q) or (h, P, Q), into titled groups."""
    if name in ("cos_coef", "sin_coef"):
        return [
            (f"harmonic {m}: $a_{{{m}}}$, $b_{{{m}}}$", parameter[:, m - 1]) for m in range(1, parameter.shape[1] + 1)
        ]
    if name == "spline_coef":
        return [("spline coefficients $c_i$", parameter)]
    if name in ("numerator", "denominator"):
        symbol, first = ("a", 0) if name == "numerator" else ("b", 1)
        return [(f"{name} ${symbol}_{{{first + j}}}$", parameter[:, j]) for j in range(parameter.shape[1])]
    titles = {"amplitude": "amplitude $w$", "translation": r"translation $\tau$", "width": "width $s$"}
    return [(titles[name], parameter)]


def compute(values: list[dict[str, np.ndarray]]) -> list[Distributions]:
    """
    Count histograms on common bins.

    Args:
        values: the `groups` of each moment.
    """
    result = []
    for title in values[0]:
        of_moments = [moment[title] for moment in values]
        low = min(float(each.min()) for each in of_moments)
        high = max(float(each.max()) for each in of_moments)
        if low == high:  # all equal: a bin of its own in the middle
            low, high = low - 0.5, high + 0.5
        counts, edges = zip(*(np.histogram(each, bins=BINS, range=(low, high)) for each in of_moments))
        result.append(
            Distributions(
                title=title,
                edges=edges[0],
                counts=np.stack(counts),
                means=np.array([each.mean(dtype=np.float64) for each in of_moments]),
                deviations=np.array([each.std(dtype=np.float64) for each in of_moments]),
            )
        )
    return result


def draw(data: Distributions, axes: Axes, labels: list[str]) -> Axes:
    """Draw the density of one group at each moment, early ones light and late ones dark, on a logarithmic axis."""
    widths = np.diff(data.edges)
    density = data.counts / data.counts.sum(1, keepdims=True) / widths
    for values, colour, label in zip(density, style.shades(len(labels)), labels):
        axes.stairs(values, data.edges, color=colour, linewidth=0.9, label=label)
    axes.set(yscale="log", ylim=(density[density > 0].min() * 0.7, None), title=data.title)
    return axes


def draw_all(groups: list[Distributions], figure: Figure, labels: list[str]) -> Figure:
    """Draw a panel for each group, four in a row."""
    columns = style.columns_of(len(groups))
    grid = figure.subplots(-(-len(groups) // columns), columns, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for data, axes in zip(groups, grid.flat):
        draw(data, axes, labels)
        axes.set_xlabel("value")
    for axes in grid[:, 0]:
        axes.set_ylabel("density")
    handles, _ = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 3 if columns < 3 else 8))
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--moments",
        type=options.at_least(2),
        default=4,
        metavar="COUNT",
        help="how many moments of the run: the start, the end, and others evenly between (default: 4)",
    )
    parser.add_argument("--no-start", action="store_true", help="leave out the start, which is rebuilt from the seed")
    parser.add_argument("--block", type=int, help="coefficients and W of this block only (default: all together)")
    parser.add_argument("--head", type=int, help="coefficients and W of this head only (default: all together)")
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    device = options.device_of(args.device)
    output = Output(args.output, [*figure_names("weights"), "weights.csv"], args.overwrite)
    found = [moment for moment in moments(args.model) if moment.step > 0 or not args.no_start]
    places = np.linspace(0, len(found) - 1, min(args.moments, len(found))).round().astype(int)
    found = [found[place] for place in dict.fromkeys(places.tolist())]
    values, block, head = [], args.block, args.head
    for moment in tqdm(found, desc="Checkpoints", leave=False, delay=1):
        checkpoint = load_moment(args.model, moment, device)
        if block is not None:
            block = options.block_of(block, checkpoint)
        if head is not None:
            (head,) = options.numbers([head], checkpoint.heads, "--head", "head")
        values.append(groups(checkpoint, block, head))
    data = compute(values)
    labels = ["start" if moment.step == 0 else f"epoch {round(moment.epoch, 1):g}" for moment in found]
    with style.context():
        columns = style.columns_of(len(data))
        rows = -(-len(data) // columns)
        width = style.COLUMN if columns <= 2 else style.PAGE
        output.figure("weights", draw_all(data, style.figure(width, 0.3 + 1.55 * rows), labels))
    output.table(
        "weights.csv",
        [
            {
                "group": re.sub(r"[${}\\]", "", each.title),
                "epoch": moment.epoch,
                "step": moment.step,
                "mean": each.means[index],
                "standard deviation": each.deviations[index],
                "low": each.edges[position],
                "high": each.edges[position + 1],
                "count": each.counts[index, position],
            }
            for each in data
            for index, moment in enumerate(found)
            for position in range(len(each.edges) - 1)
        ],
    )
    output.report()
