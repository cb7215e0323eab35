# SPDX-License-Identifier: Apache-2.0
"""
Singular values of the attention matrices of one block, before the activation (the scores) and after it: mean, smallest
and largest over heads and images, with the bounds that the head size d and the operator's rank r set. Beside it the
effective rank of every block: exp(entropy of the normalised singular values), Roy and Vetterli 2007. With --compare,
another model (a softmax ViT, say) beside it.

Writes `spectrum_block<B>.png`, .svg and .npz (all singular values and effective ranks). Computed in fp64 where the
device has it; what is zero up to rounding is not drawn.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from image_classification.models.families import vision

from . import options, style
from .images import find_images, prepare
from .models import Checkpoint
from .output import Output, figure_names
from .recording import record_batches


STAGES = {"before": "scores", "after": "maps"}


@dataclass(kw_only=True)
class Spectrum:
    """
    The singular values of one model; B images, h heads, N tokens, L blocks.

    Args:
        name: what figures call the model.
        kind: `"karat"` or `"softmax"`.
        head_kinds: for each block, `"karat"` or `"softmax"` for each head.
        head_size: d, which bounds the rank of the scores.
        rank: r, which bounds the rank of the activated maps of KArAt heads; `None` where the operator does not.
        block: of `before` and `after`.
        before, after: its singular values, descending, (B, h, N).
        effective_before, effective_after: effective ranks of all blocks, (L, B, h).
        resolution: relative to the largest, the singular value that rounding may have made.
    """

    name: str
    kind: str
    head_kinds: list[list[str]]
    head_size: int
    rank: int | None
    block: int
    before: np.ndarray
    after: np.ndarray
    effective_before: np.ndarray
    effective_after: np.ndarray
    resolution: float


def compute(checkpoint: Checkpoint, pixels: torch.Tensor, block: int, batch_size: int = 8) -> Spectrum:
    """
    Compute the singular values of one block's attention, and the effective ranks of all blocks.

    Args:
        pixels: (B, 3, height, width).
        block: whose singular values to keep.
    """
    checkpoint.check_whole_maps()
    dtype = torch.float32 if checkpoint.model.device.type == "mps" else torch.float64
    kept: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    effective: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    for recorded in record_batches(checkpoint, pixels, list(range(checkpoint.blocks)), batch_size, dtype):
        for stage, name in STAGES.items():
            values = [torch.linalg.svdvals(getattr(attention, name)).numpy() for attention in recorded.values()]
            kept[stage].append(values[block])
            effective[stage].append(np.stack([effective_rank(each) for each in values]))
    rank = None
    if checkpoint.is_karat and not checkpoint.is_residual:
        first = next(index for index in range(checkpoint.blocks) if "karat" in checkpoint.head_kinds(index))
        config = checkpoint.operator(first).config
        rank = config.karat_rank if config.modular_mode == "phi1_w2" and not config.project_l1 else None
    return Spectrum(
        name=checkpoint.name,
        kind=checkpoint.kind,
        head_kinds=[checkpoint.head_kinds(index) for index in range(checkpoint.blocks)],
        head_size=vision(checkpoint.model.config).hidden_size // checkpoint.heads,
        rank=rank,
        block=block,
        before=np.concatenate(kept["before"]),
        after=np.concatenate(kept["after"]),
        effective_before=np.concatenate(effective["before"], axis=1),
        effective_after=np.concatenate(effective["after"], axis=1),
        resolution=checkpoint.tokens * torch.finfo(dtype).eps,
    )


def effective_rank(values: np.ndarray) -> np.ndarray:
    """
    Compute exp(-sum p log p) of p = values / sum (Roy and Vetterli 2007): from 1, one singular value, to N, all equal.

    Args:
        values: singular values, (..., N).

    Returns:
        (...), 0 where all are zero.
    """
    total = values.sum(-1, keepdims=True)
    shares = values / np.where(total > 0, total, 1)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    return np.where(total[..., 0] > 0, np.exp(-(shares * logarithms).sum(-1)), 0.0)


def series(data: Spectrum, block: int) -> list[tuple[str, str, str, list[int]]]:
    """List the lines drawn of a block: (stage, label, colour, heads), the kinds of heads apart after the activation."""
    kinds = data.head_kinds[block]
    found = [("before", "before (scores)", style.GREY, list(range(len(kinds))))]
    for kind in ("karat", "softmax"):
        heads = [head for head, of in enumerate(kinds) if of == kind]
        if heads:
            found.append(("after", f"after ({style.KIND_NAMES[kind]})", style.KIND_COLOURS[kind], heads))
    return found


def draw(data: Spectrum, axes: Axes) -> Axes:
    """Draw the singular values of one block: mean (line), smallest to largest (band), over heads and images."""
    lowest = np.inf
    for stage, label, colour, heads in series(data, data.block):
        values = getattr(data, stage)[:, heads].reshape(-1, getattr(data, stage).shape[-1])
        # Where all are zero up to rounding the line ends; a band that reaches zero leaves through the bottom.
        floor = data.resolution * values.max()
        real = values.max(0) > floor
        index = np.arange(1, values.shape[-1] + 1)[real]
        values = np.maximum(values[:, real], floor)
        axes.fill_between(index, values.min(0), values.max(0), color=colour, alpha=0.22, linewidth=0)
        axes.plot(index, values.mean(0), color=colour, label=label)
        lowest = min(lowest, values.mean(0).min())
    axes.set(yscale="log", xlabel="index of singular value", ylabel="singular value")
    axes.set(xlim=(0.5, data.before.shape[-1]), ylim=(lowest / 10, None))
    karat = "karat" in data.head_kinds[data.block]
    bounds = [(data.head_size, "d", style.GREY)]
    if data.rank is not None and karat:
        bounds.append((data.rank, "r", style.KIND_COLOURS["karat"]))
    for line, (bound, symbol, colour) in enumerate(sorted(bounds)):
        if bound < data.before.shape[-1]:
            axes.axvline(bound, color=colour, linewidth=0.8, linestyle=":")
            how = {"va": "top", "color": colour, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
            style.note(axes, f"${symbol}={bound}$", (bound, 1), (2, -8 * line), ("data", "axes fraction"), **how)
    return axes


def draw_effective(spectra: list[Spectrum], axes: Axes, labels: list[str] | None = None) -> Axes:
    """
    Draw the effective rank over the blocks: before the activation (dashed, mean) and after it (solid, mean and range
    over heads and images).
    """
    labels = labels or [data.name for data in spectra]
    for data, colour, label in zip(spectra, style.colours_of(spectra), labels):
        prefix = f"{label}, " if label else ""
        blocks = np.arange(len(data.head_kinds))
        axes.plot(blocks, data.effective_before.mean((1, 2)), "--", color=colour, label=f"{prefix}before")
        kinds = np.array(data.head_kinds)
        # Softmax heads beside KArAt heads have a line of their own.
        lines = {data.kind: "-"} if data.kind == "softmax" else {"karat": "-", "softmax": "-."}
        for kind, dashes in lines.items():
            here = kinds == kind
            if not here.any():
                continue
            low, mean, high = (
                np.array([summary(of[:, own]) if own.any() else np.nan for of, own in zip(data.effective_after, here)])
                for summary in (np.min, np.mean, np.max)
            )
            axes.fill_between(blocks, low, high, color=colour, alpha=0.18, linewidth=0)
            heads = "" if (kinds == data.kind).all() else f" ({style.KIND_NAMES[kind]} heads)"
            axes.plot(blocks, mean, dashes, color=colour, label=f"{prefix}after{heads}")
        if data.rank is not None:
            axes.axhline(data.rank, color=colour, linewidth=0.8, linestyle=":")
            style.note(axes, f"$r={data.rank}$", (1, data.rank), (2, 0), ("axes fraction", "data"), color=colour)
    axes.locator_params(integer=True)
    axes.set(ylim=(0, None), xlabel="block", ylabel="effective rank")
    return axes


def draw_all(spectra: list[Spectrum], figure: Figure) -> Figure:
    """Draw a panel of singular values for each model, on one scale, and the effective ranks of all."""
    panels = figure.subplots(1, len(spectra) + 1)
    names = style.tell_apart(spectra)
    for data, name, axes in zip(spectra, names, panels):
        draw(data, axes)
        axes.set_title(f"{name}, block {data.block}" if len(spectra) > 1 else f"block {data.block}")
    style.share_heights(panels[:-1])
    draw_effective(spectra, panels[-1], names if len(spectra) > 1 else [""])
    panels[-1].set_title("all blocks")
    # Beneath the panels, where they hide no line.
    for group, side, title in ((panels[:-1], "left", "singular values"), (panels[-1:], "right", "effective rank")):
        lines = {line.get_label(): line for axes in group for line in axes.get_legend_handles_labels()[0]}
        how: dict[str, Any] = {"loc": f"outside lower {side}", "title": title, "alignment": "left"}
        figure.legend(handles=list(lines.values()), handlelength=2.2, ncols=2, title_fontsize=7, **how)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, compare=True)
    options.add_block(parser)
    options.add_images(parser, count=5)
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    checkpoints = options.load_models(args.model, args.compare, options.device_of(args.device))
    blocks = [options.block_of(args.block, each) for each in checkpoints]
    stem = f"spectrum_block{blocks[0]}"
    output = Output(args.output, [*figure_names(stem), f"{stem}.npz"], args.overwrite)
    found = find_images(checkpoints, args.images, args.num_images, args.seed, args.data_set)
    spectra = [
        compute(each, prepare(each, found).pixels, block, args.batch_size) for each, block in zip(checkpoints, blocks)
    ]
    with style.context():
        output.figure(stem, draw_all(spectra, style.figure(style.PAGE, 2.5)))
    arrays = {
        f"{prefix}_{name}": getattr(data, name)
        for prefix, data in zip(("model", "compare"), spectra)
        for name in ("before", "after", "effective_before", "effective_after")
    }
    output.arrays(f"{stem}.npz", **arrays)
    output.report()
