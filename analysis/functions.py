# SPDX-License-Identifier: Apache-2.0
"""
The learned functions phi_pq of one block: for each KArAt head the mean over all edges with its spread, the strongest
edges and a chosen one, base function included, over the range of inputs that really occur (measured on images, and
drawn beneath as a density). With --before, the same edges before training beside them.

Writes `functions_block<B>.png`, .svg (the figure) and .csv (its curves and densities).
"""

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tqdm.auto import tqdm

from image_classification.errors import InputError
from image_classification.models.building import check_same_model
from modeling_karat_vit.karat_operator import KArAtOperator

from . import options, style
from .images import load_images
from .models import Checkpoint, load_checkpoint, load_start
from .output import Output, figure_names
from .recording import record


# Points of a curve, bins of a density, and inputs (rows of scores) on which the strength of an edge is measured.
POINTS, BINS, ROWS = 301, 60, 1024
# What is drawn spans all inputs but the outermost of either side.
OUTSIDE = 0.001


@dataclass(kw_only=True)
class Functions:
    """
    The functions of one head: P outputs, Q inputs (r and N for the paper's operator), T points.

    Args:
        head: which.
        x: points, (T,).
        mean, deviation: over all P * Q edges, (T,).
        edges: the selected edges (p, q), strongest first.
        curves: their functions, (len(edges), T).
        strength: standard deviation of what each edge adds to the activated row over the inputs that occur, (P, Q).
        density: of the inputs, (BINS,).
        bins: their borders, (BINS + 1,).
    """

    head: int
    x: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    edges: list[tuple[int, int]]
    curves: np.ndarray
    strength: np.ndarray
    density: np.ndarray
    bins: np.ndarray


@torch.inference_mode()
def inputs_of(operator: KArAtOperator, scores: torch.Tensor, step: int = 0) -> torch.Tensor:
    """
    Compute the inputs that the functions of a step are applied to.

    Args:
        scores: of its heads, (B, h, N, N).
        step: which step of learnable functions.

    Returns:
        (B, h, N, Q): the scores themselves for the first step of `phi1_w2`, W s for `w1_phi2`.
    """
    x = scores @ operator.projector.mT if operator.mode == "w1_phi2" else scores
    for earlier in operator.edges[:step]:
        x = earlier.activate(x, earlier(x.dtype))
    return x


def input_name(operator: KArAtOperator, step: int = 0) -> str:
    """Name for figures the inputs of a step: scores, or what an earlier step made of them."""
    return "input $x$" if operator.mode == "w1_phi2" or step > 0 else "score $x$"


@torch.inference_mode()
def evaluate(operator: KArAtOperator, head: int, x: torch.Tensor, step: int = 0) -> torch.Tensor:
    """
    Compute phi_pq(x) of all edges of one head.

    Args:
        x: (T, 1) for the same points on every edge, or (T, Q) for one value per input.
        step: which step of learnable functions.

    Returns:
        (T, P, Q)
    """
    edges: Any = operator.edges[step]
    tensors = {name: tensor[head : head + 1] for name, tensor in edges(x.dtype).items()}
    x = x.expand(-1, edges.in_features)[None, :, None]
    # Some thousand rows of a full-rank operator would fill the memory.
    rows = max(1, 2**24 // (edges.in_features * edges.out_features))
    return torch.cat([edges.edges(part, tensors)[0] for part in x.split(rows, dim=1)])


@torch.inference_mode()
def strength_of(operator: KArAtOperator, head: int, inputs: torch.Tensor, step: int = 0) -> torch.Tensor:
    """
    Measure the strength of each edge, by how far it moves the activated row: the standard deviation of phi_pq over the
    inputs that occur, times the length of column p of W where W follows (phi1_w2).

    Args:
        inputs: (rows, Q).

    Returns:
        (P, Q)
    """
    edges: Any = operator.edges[step]
    rows = max(1, 2**24 // (edges.in_features * edges.out_features))
    total = squares = torch.zeros(())
    for part in inputs.double().split(rows):
        values = evaluate(operator, head, part, step)
        total, squares = total + values.sum(0), squares + values.square().sum(0)
    mean = total / len(inputs)
    deviation = (squares / len(inputs) - mean.square()).clamp(min=0).sqrt()
    if operator.projector is not None and operator.mode == "phi1_w2":
        deviation = deviation * operator.projector[head].double().norm(dim=0)[:, None]
    return deviation


def compute(
    checkpoint: Checkpoint,
    pixels: torch.Tensor,
    block: int,
    heads: list[int],
    *,
    edge: tuple[int, int] | None = None,
    strongest: int = 5,
    step: int = 0,
    same_as: list[Functions] | None = None,
    batch_size: int = 8,
) -> list[Functions]:
    """
    Compute the functions of some heads of a block.

    Args:
        pixels: images that say which inputs occur, (B, 3, height, width).
        block, heads: which; the heads must be KArAt heads.
        edge: one to keep beside the strongest, (p, q); it comes last.
        strongest: how many of the strongest edges to keep.
        step: which step of learnable functions, where the operator has several.
        same_as: take the edges and points of these instead of the strongest of this model.

    Raises:
        InputError: the block has no KArAt heads, a head is softmax, or there is no such step or edge.
    """
    # The curves are a matter of fp64, which not every device has.
    operator = copy.deepcopy(checkpoint.operator(block)).cpu()
    kinds = checkpoint.head_kinds(block)
    _check(operator, kinds, block, heads, step, edge)
    scores = record(checkpoint, pixels, [block], batch_size)[block].scores[:, : kinds.count("karat")]
    entering = inputs_of(operator, scores, step)
    result = []
    bar = tqdm(heads, desc=f"Functions of {checkpoint.name}", unit="head", leave=False, delay=1)
    for index, head in enumerate(bar):
        values = entering[:, head].flatten(0, 1)
        x = _points(values) if same_as is None else torch.as_tensor(same_as[index].x)
        curves = evaluate(operator, head, x[:, None], step)
        rows = values[torch.linspace(0, len(values) - 1, min(ROWS, len(values))).round().long()]
        strength = strength_of(operator, head, rows, step)
        chosen = _strongest(strength, strongest, edge) if same_as is None else same_as[index].edges
        # Not `density=True`, which divides by zero where all inputs lie outside, as before training they may.
        counts, bins = np.histogram(values.numpy(), bins=BINS, range=(float(x[0]), float(x[-1])))
        result.append(
            Functions(
                head=head,
                x=x.numpy(),
                mean=curves.mean((1, 2)).numpy(),
                deviation=curves.std((1, 2), correction=0).numpy(),
                edges=chosen,
                curves=np.array([curves[:, p, q].numpy() for p, q in chosen]).reshape(-1, len(x)),
                strength=strength.numpy(),
                density=counts / max(1, counts.sum()) / np.diff(bins),
                bins=bins,
            )
        )
    return result


def _check(
    operator: KArAtOperator, kinds: list[str], block: int, heads: list[int], step: int, edge: tuple[int, int] | None
) -> None:
    """Raise the errors of `compute`."""
    softmax = [head for head in heads if kinds[head] == "softmax"]
    if softmax:
        raise InputError(f"Head {softmax[0]} of block {block} is softmax, and has no learned functions.")
    if not 0 <= step < len(operator.edges):
        raise InputError(
            f"`--step` is {step}, and the operator has {len(operator.edges)} step(s) of functions, from 0."
        )
    edges: Any = operator.edges[step]
    outputs, inputs = edges.out_features, edges.in_features
    if edge is not None and not (0 <= edge[0] < outputs and 0 <= edge[1] < inputs):
        raise InputError(
            f"`--edge` is {edge[0]} {edge[1]}, and there are {outputs} x {inputs} edges (p, q): 0 0 to {outputs - 1} "
            f"{inputs - 1}."
        )


def _points(values: torch.Tensor) -> torch.Tensor:
    """Choose the points of the curves, (T,), so that they span the values but the outermost."""
    # Not `torch.quantile`, which takes 16 million values at most.
    low, high = np.quantile(values.numpy(), [OUTSIDE, 1 - OUTSIDE])
    if low == high:  # an untrained model may score everything alike
        low, high = low - 0.5, high + 0.5
    return torch.linspace(low, high, POINTS, dtype=torch.float64)


def _strongest(strength: torch.Tensor, count: int, last: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Find the strongest edges, strongest first; `last` comes at the end."""
    order = strength.flatten().argsort(descending=True)[:count].tolist()
    found = [edge for position in order if (edge := divmod(position, strength.shape[1])) != last]
    return found if last is None else [*found, last]


def draw(data: Functions, axes: Axes, edge: tuple[int, int] | None = None) -> Axes:
    """
    Draw one head's functions.

    Args:
        edge: which of its edges to highlight.
    """
    beneath = axes.twinx()
    beneath.stairs(data.density, data.bins, fill=True, color=style.PALE)
    beneath.set_ylim(0, 3.6 * max(data.density.max(), 1e-12))
    beneath.axis("off")
    axes.set_zorder(beneath.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.fill_between(
        data.x, data.mean - data.deviation, data.mean + data.deviation, color=style.ORANGE, alpha=0.3, linewidth=0
    )
    for (p, q), curve in zip(data.edges, data.curves):
        if (p, q) != edge:
            axes.plot(data.x, curve, color=style.BLUE, linewidth=0.7, alpha=0.8)
    axes.plot(data.x, data.mean, color=style.INK, linewidth=1.4)
    if edge is not None:
        axes.plot(data.x, data.curves[data.edges.index(edge)], color=style.VERMILLION, linewidth=1.4, linestyle="--")
    axes.set_xlim(data.x[0], data.x[-1])
    axes.margins(y=0.06)
    return axes


def draw_all(
    after: list[Functions],
    figure: Figure,
    before: list[Functions] | None = None,
    edge: tuple[int, int] | None = None,
    inputs: str = "score $x$",
) -> Figure:
    """Draw all heads of a block; with `before`, two panels a head, on one scale: see `layout`."""
    stages = [(after, "")] if before is None else [(before, ", before training"), (after, ", after training")]
    rows, columns, places = layout(len(after), len(stages))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for index, of_head in enumerate(places):
        panels = [grid[place] for place in of_head]
        for (data, stage), axes in zip(stages, panels):
            axes.set_visible(True)
            draw(data[index], axes, edge)
            axes.set_title(f"head {data[index].head}{stage}")
        style.share_heights(panels)
    for axes in grid[:, 0]:
        axes.set_ylabel(r"$\varphi_{pq}(x)$")
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel(inputs)
    figure.legend(handles=_legend(after[0], edge), loc="outside lower center", ncols=2 if columns < 3 else 5)
    return figure


def layout(heads: int, stages: int) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """
    Place the panels: the stages of one or two heads side by side in one row, of more heads beneath each other.

    Returns:
        Rows, columns, and for each head the (row, column) of its stages.
    """
    if heads * stages <= 4:
        return 1, heads * stages, [[(0, head * stages + stage) for stage in range(stages)] for head in range(heads)]
    columns = style.columns_of(heads)
    places = [[(head // columns * stages + stage, head % columns) for stage in range(stages)] for head in range(heads)]
    return -(-heads // columns) * stages, columns, places


def _legend(data: Functions, edge: tuple[int, int] | None) -> list[Artist]:
    handles: list[Artist] = [
        Line2D([], [], color=style.INK, linewidth=1.4, label="mean over edges"),
        Patch(color=style.ORANGE, alpha=0.3, linewidth=0, label="± 1 s.d. over edges"),
    ]
    others = [pair for pair in data.edges if pair != edge]
    if others:
        handles.append(Line2D([], [], color=style.BLUE, linewidth=0.7, label=f"strongest {len(others)} edges"))
    if edge is not None:
        label = rf"edge $p={edge[0]}$, $q={edge[1]}$"
        handles.append(Line2D([], [], color=style.VERMILLION, linewidth=1.4, linestyle="--", label=label))
    return [*handles, Patch(color=style.PALE, label="density of the inputs")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--before",
        metavar="DIR_OR_REPO",
        help="checkpoint to show beside it, such as an earlier one of the same run; `start` is the model before the "
        "run's first step, rebuilt from the seed in run.json",
    )
    options.add_block(parser)
    parser.add_argument("--heads", type=int, nargs="+", help="which heads, from 0 (default: all KArAt heads)")
    parser.add_argument("--edge", type=int, nargs=2, metavar=("P", "Q"), help="an edge to highlight: output p, input q")
    parser.add_argument(
        "--strongest", type=options.at_least(0), default=5, help="how many of the strongest edges to draw (default: 5)"
    )
    parser.add_argument(
        "--step", type=int, default=0, help="which step of functions, for operators of several (default: 0)"
    )
    options.add_images(parser, count=16)
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    device = options.device_of(args.device)
    checkpoint = load_checkpoint(args.model, device=device)
    block = options.block_of(args.block, checkpoint)
    stem = f"functions_block{block}"
    output = Output(args.output, [*figure_names(stem), f"{stem}.csv"], args.overwrite)
    operator = checkpoint.operator(block)
    if args.heads is None:
        heads = [head for head, kind in enumerate(checkpoint.head_kinds(block)) if kind == "karat"]
    else:
        heads = options.numbers(args.heads, len(checkpoint.head_kinds(block)), "--heads", "head")
    edge = None if args.edge is None else tuple(args.edge)
    earlier = None
    if args.before == "start":
        earlier = load_start(args.model, device)
    elif args.before is not None:
        earlier = load_checkpoint(args.before, "--before", device)
        check_same_model(checkpoint.model.config, earlier.model.config, args.before)
    pixels = load_images(checkpoint, args.images, args.num_images, args.seed, args.data_set).pixels
    common = {"edge": edge, "strongest": args.strongest, "step": args.step, "batch_size": args.batch_size}
    after = compute(checkpoint, pixels, block, heads, **common)
    before = None
    if earlier is not None:
        before = compute(earlier, pixels, block, heads, **common, same_as=after)
    with style.context():
        rows, columns, _ = layout(len(heads), 1 if before is None else 2)
        width = style.COLUMN if columns <= 2 else style.PAGE
        legend = 0.6 if columns < 3 else 0.3
        figure = style.figure(width, 0.15 + legend + 1.35 * rows)
        draw_all(after, figure, before, edge, input_name(operator, args.step))
        output.figure(stem, figure)
    output.table(f"{stem}.csv", _rows(after, before, block))
    output.report()


def _rows(after: list[Functions], before: list[Functions] | None, block: int) -> list[dict]:
    rows = []
    for when, group in (("before", before or []), ("after", after)):
        for data in group:
            base = {"when": when, "block": block, "head": data.head}
            for position, x in enumerate(data.x):
                rows.append(base | {"curve": "mean", "x": x, "y": data.mean[position]})
                rows.append(base | {"curve": "standard deviation", "x": x, "y": data.deviation[position]})
            for (p, q), curve in zip(data.edges, data.curves):
                strength = data.strength[p, q]
                rows += [
                    base | {"curve": f"phi[{p},{q}]", "x": x, "y": y, "strength": strength}
                    for x, y in zip(data.x, curve)
                ]
            centres = (data.bins[1:] + data.bins[:-1]) / 2
            rows += [base | {"curve": "density", "x": x, "y": y} for x, y in zip(centres, data.density)]
    return rows
