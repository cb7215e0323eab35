# SPDX-License-Identifier: Apache-2.0
"""
Attention maps of one block: what one query ([CLS], or a patch) sees of each image.

`attention_heads_<i>`, one for each image: every head, before the activation (the scores) and after it, signed, with
zero in the middle of the colours. attention_summary, all images: the map of the dominant head, the region that holds
most of it, which head is strongest at each patch, and attention rollout over all blocks. With --compare, another
model (a softmax ViT, say) beside it. attention.npz has the numbers.

The dominant head is the one whose map is the longest vector over the patches. Regions and overlays show what is
positive. Rollout (Abnar and Zuidema 2020) needs rows that are distributions: KArAt's signed maps go in as magnitudes,
averaged over the heads, each row divided by its sum; for softmax this changes nothing.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from image_classification.errors import InputError

from . import options, style
from .images import Images, find_images, prepare
from .models import Checkpoint
from .output import Output, figure_names
from .recording import record_batches


STAGES = ("before", "after")
HEADS_PER_ROW = 6


@dataclass(kw_only=True)
class Maps:
    """
    The attention of one query, in one block of one model. B images, h heads, N tokens: [CLS] and rows x columns
    patches.

    Args:
        name: what figures call the model.
        kind: `"karat"` or `"softmax"`.
        head_kinds: `"karat"` or `"softmax"` for each head.
        grid: rows and columns of patches.
        block: which.
        query: token whose rows these are; 0 is [CLS].
        before: scores, (B, h, N).
        after: activated maps, (B, h, N).
        rollout: of all blocks, (B, N).
    """

    name: str
    kind: str
    head_kinds: list[str]
    grid: tuple[int, int]
    block: int
    query: int
    before: np.ndarray
    after: np.ndarray
    rollout: np.ndarray


def compute(checkpoint: Checkpoint, pixels: torch.Tensor, block: int, query: int = 0, batch_size: int = 8) -> Maps:
    """
    Compute what one query of one block sees.

    Args:
        pixels: (B, 3, height, width).
        block: which block's maps.
        query: token, 0 for [CLS].
    """
    return compute_all(checkpoint, pixels, query, batch_size)[block]


def compute_all(checkpoint: Checkpoint, pixels: torch.Tensor, query: int = 0, batch_size: int = 8) -> list[Maps]:
    """Compute what one query of every block sees, in the same forward passes: rollout needs the maps of all anyway."""
    before, after, rolled = [], [], []
    checkpoint.check_whole_maps()
    prefix = [checkpoint.prefix(block) for block in range(checkpoint.blocks)]
    for recorded in record_batches(checkpoint, pixels, list(range(checkpoint.blocks)), batch_size):
        # Copies, so that the whole N x N maps are not kept alive: (L, B, h, N).
        before.append(np.stack([row_of(each.scores.numpy(), query, prefix[block]) for block, each in recorded.items()]))
        after.append(np.stack([row_of(each.maps.numpy(), query, prefix[block]) for block, each in recorded.items()]))
        rolled.append(row_of(rollout([each.maps.numpy() for each in recorded.values()]), query, max(prefix)))
    stages = zip(np.concatenate(before, axis=1), np.concatenate(after, axis=1))
    rolled_out = np.concatenate(rolled)
    return [
        Maps(
            name=checkpoint.name,
            kind=checkpoint.kind,
            head_kinds=checkpoint.head_kinds(block),
            grid=checkpoint.grid,
            block=block,
            query=query,
            before=scores,
            after=maps,
            rollout=rolled_out,
        )
        for block, (scores, maps) in enumerate(stages)
    ]


def row_of(maps: np.ndarray, query: int, prefix: int) -> np.ndarray:
    """
    Take one query's row of maps of all tokens, without special tokens but [CLS].

    Args:
        maps: (..., N, N).
        query: 0 for [CLS], 1 for the first patch. Without a [CLS], its row is the mean of those of all patches.
        prefix: special tokens before the patches, the first of which is [CLS].

    Returns:
        (..., 1 + patches): [CLS], or 0 where there is none, and the patches.
    """
    if query > 0:
        row = maps[..., query - 1 + prefix, :]
    else:
        row = maps[..., 0, :] if prefix else maps.mean(-2)
    patches = row[..., prefix:]
    first = row[..., :1] if prefix else np.zeros_like(patches[..., :1])
    return np.concatenate([first, patches], axis=-1)


def rollout(maps: list[np.ndarray]) -> np.ndarray:
    """
    Compute attention rollout (Abnar and Zuidema 2020): the product over the blocks of (A + I)/2, A the mean over heads.

    Signed maps go in as magnitudes, each row of the mean divided by its sum. A row of zeros passes on its own token, as
    do special tokens that come later (ConViT's).

    Args:
        maps: of every block, first to last, (B, h, N, N), N of the last the largest.

    Returns:
        (B, N, N), rows sum to 1.
    """
    identity = np.eye(maps[-1].shape[-1])
    joint = identity[None]
    for block in maps:
        absent = len(identity) - block.shape[-1]
        mean = np.pad(np.abs(block.astype(np.float64)).mean(1), ((0, 0), (absent, 0), (absent, 0)))
        sums = mean.sum(-1, keepdims=True)
        mean = np.where(sums > 0, mean / np.where(sums > 0, sums, 1), identity)
        joint = (mean + identity) / 2 @ joint
    return joint


def on_grid(rows: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Arrange (..., N) as (..., rows, columns): the patches, without [CLS]."""
    return rows[..., 1:].reshape(*rows.shape[:-1], *grid)


def dominant_head(maps: np.ndarray) -> np.ndarray:
    """Find the head whose map is the longest vector over the patches: (..., h, N) to (...)."""
    return np.linalg.norm(maps[..., 1:], axis=-1).argmax(-1)


def strongest_heads(maps: np.ndarray) -> np.ndarray:
    """Find at each token the head of the largest magnitude: (..., h, N) to (..., N)."""
    return np.abs(maps).argmax(-2)


def region(rows: np.ndarray, share: float) -> np.ndarray:
    """
    Find the smallest set of patches that holds `share` of what is positive.

    Args:
        rows: (..., N). [CLS] takes no part.
        share: from 0 to 1.

    Returns:
        Boolean, (..., N), False at [CLS]; nowhere True where no patch is positive.
    """
    positive = np.clip(rows.astype(np.float64), 0, None)
    positive[..., 0] = 0
    order = np.argsort(-positive, axis=-1, kind="stable")
    ordered = np.take_along_axis(positive, order, -1)
    before = ordered.cumsum(-1) - ordered
    total = positive.sum(-1, keepdims=True)
    inside = np.zeros(rows.shape, dtype=bool)
    # Without the rounding of the sum, the last patch that is needed is the last that is taken.
    np.put_along_axis(inside, order, (before < share * total * (1 - 1e-12)) & (ordered > 0), -1)
    return inside


def draw_picture(picture: np.ndarray, grid: tuple[int, int], query: int, axes: Axes) -> Axes:
    """Draw the image (height, width, 3), with the query's patch framed."""
    style.blank(axes).imshow(picture)
    if query > 0:
        height, width = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
        row, column = divmod(query - 1, grid[1])
        corner = (column * width - 0.5, row * height - 0.5)
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=style.VERMILLION, linewidth=1.5))
    return axes


def draw_signed(values: np.ndarray, axes: Axes, norm: Normalize | None = None) -> AxesImage:
    """
    Draw signed values on the grid of patches.

    Args:
        values: (rows, columns).
        norm: from `style.symmetric`, to share one scale.

    Returns:
        The image, for a colour bar.
    """
    return style.blank(axes).imshow(values, cmap=style.DIVERGING, norm=norm or style.symmetric(values))


def draw_overlay(
    picture: np.ndarray, values: np.ndarray, axes: Axes, low: float | None = 0.0, opacity: float = 0.85
) -> Axes:
    """
    Draw a map as a red veil over the image in pale grey.

    Args:
        picture: (height, width, 3).
        values: (rows, columns); enlarged smoothly.
        low: the value that is clear, as is all below it (0 clips what is negative); `None` for the smallest. The
            largest is the densest.
        opacity: of the veil where it is densest, from 0 to 1.
    """
    # Fine enough for a smooth veil over the smallest image.
    factor = -(-160 // min(picture.shape[:2]))
    # Clipped, since the mean of three ones may be rounded to more than 1.
    grey = np.kron(picture.mean(-1).clip(0, 1), np.ones((factor, factor)))
    low = values.min() if low is None else low
    veil = np.clip(values - low, 0, None)
    veil = torch.as_tensor(veil / (veil.max() or 1.0), dtype=torch.float32)[None, None]
    veil = torch.nn.functional.interpolate(veil, grey.shape, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    dense = opacity * veil.numpy()[..., None]
    pale = (0.35 + 0.65 * grey)[..., None]
    style.blank(axes).imshow((1 - dense) * pale + dense * np.array(to_rgb(style.RED)))
    return axes


def draw_region(picture: np.ndarray, inside: np.ndarray, axes: Axes) -> Axes:
    """Draw the image, pale outside a region (rows, columns) and with a line around it."""
    height, width = picture.shape[:2]
    rows, columns = inside.shape
    enlarged = np.kron(inside, np.ones((height // rows, width // columns))) > 0
    # What the patches leave over on the right and below is outside.
    enlarged = np.pad(enlarged, [(0, height - enlarged.shape[0]), (0, width - enlarged.shape[1])])
    style.blank(axes).imshow(np.where(enlarged[..., None], picture, 1 - 0.25 * (1 - picture)))
    # Lines between patches of which one is inside: where they begin, downwards and to the right.
    padded = np.pad(inside, 1)
    beneath = np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1])
    beside = np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:])
    for starts, step in ((beneath, (0, 1)), (beside, (1, 0))):
        for start in starts:
            y, x = np.stack([start, start + step]).T * [[height / rows], [width / columns]] - 0.5
            axes.plot(x, y, color=style.VERMILLION, linewidth=1.0, clip_on=False)
    return axes


def draw_strongest(heads: np.ndarray, count: int, axes: Axes) -> AxesImage:
    """Draw the strongest head at each patch, (rows, columns) of numbers below `count`, in a colour each."""
    return style.blank(axes).imshow(heads, cmap=style.categories(count), vmin=-0.5, vmax=count - 0.5)


def draw_overview(rows: np.ndarray, grid: tuple[int, int], axes: Axes) -> Axes:
    """
    Draw each head of each block as a small signed map, side by side: blocks to the right, heads downwards.

    Each map has its own scale, so that those of all blocks can be seen. On the axes, head k of block b is the square
    about (b, k).

    Args:
        rows: (blocks, heads, N).
    """
    blocks, heads = rows.shape[:2]
    largest = np.abs(rows[..., 1:]).max(-1, keepdims=True)
    maps = on_grid(rows / np.where(largest > 0, largest, 1), grid)
    # Enlarged, for white lines between the maps that are a sixth of their sides.
    factor = -(-24 // min(grid))
    gap = factor * min(grid) // 12
    tiles = np.pad(np.kron(maps, np.ones((factor, factor))), ((0, 0), (0, 0), (gap, gap), (gap, gap)))
    height, width = tiles.shape[2:]
    mosaic = tiles.transpose(1, 2, 0, 3).reshape(heads * height, blocks * width)
    extent = (-0.5, blocks - 0.5, heads - 0.5, -0.5)
    axes.imshow(mosaic, cmap=style.DIVERGING, vmin=-1, vmax=1, extent=extent, aspect=height / width)
    axes.set(xticks=range(blocks), yticks=range(heads), xlabel="block", ylabel="head")
    return axes


def draw_heads(maps: list[Maps], picture: np.ndarray, image: int, figure: Figure) -> Figure:
    """
    Draw every head before and after the activation, for one image: a row of heads for each model and stage.

    Args:
        maps: of one model or several.
        picture: the image, (height, width, 3).
        image: its number in the maps.
    """
    lines = []  # (maps, stage, heads)
    for each in maps:
        for stage in STAGES:
            heads = range(len(each.head_kinds))
            lines += [(each, stage, heads[i : i + HEADS_PER_ROW]) for i in range(0, len(heads), HEADS_PER_ROW)]
    columns = max(len(heads) for _, _, heads in lines)
    grid = figure.add_gridspec(len(lines), columns + 1, width_ratios=[1.25, *[1] * columns])
    shown = figure.add_subplot(grid[:2, 0])
    draw_picture(picture, maps[0].grid, maps[0].query, shown)
    query = "[CLS]" if maps[0].query == 0 else "framed patch"
    shown.set_title(f"query:\n{query}")
    names = style.tell_apart(maps)
    bars: dict[tuple[int, str], tuple[AxesImage, list[Axes]]] = {}
    for row, (each, stage, heads) in enumerate(lines):
        values = on_grid(getattr(each, stage)[image], each.grid)
        norm = style.symmetric(values)
        for column, head in enumerate(heads):
            axes = figure.add_subplot(grid[row, column + 1])
            drawn = draw_signed(values[head], axes, norm)
            if stage == "before":
                # Said only where there are both.
                kind = f"\n{style.KIND_NAMES[each.head_kinds[head]]}" if len(set(each.head_kinds)) > 1 else ""
                axes.set_title(f"head {head}{kind}")
            if column == 0:
                axes.set_ylabel(f"{names[maps.index(each)]}\n{stage}" if len(maps) > 1 else stage)
            bars.setdefault((maps.index(each), stage), (drawn, []))[1].append(axes)
    for drawn, beside in bars.values():
        bar = figure.colorbar(drawn, ax=beside, fraction=0.05, pad=0.015, aspect=12)
        bar.ax.tick_params(labelsize=6, length=1.5, pad=1.5)
        bar.ax.locator_params(nbins=4)
        bar.outline.set_linewidth(0.4)
    return figure


def draw_summary(
    maps: list[Maps], pictures: list[np.ndarray], labels: list[str], figure: Figure, stage: str, share: float
) -> Figure:
    """
    Draw a row for each image, four pictures for each model.

    Args:
        maps: of one model or several.
        pictures: for each model (B, height, width, 3).
        labels: of the rows.
        stage: `"before"` or `"after"`: which maps.
        share: of the region.
    """
    names = style.tell_apart(maps)
    titles = ("dominant\nhead", f"{100 * share:g} %\nregion", "strongest\nhead", "\nrollout")
    # A narrow empty column before each model.
    ratios = [1.0, *[0.06, 1.0, 1.0, 1.0, 1.0] * len(maps)]
    grid = figure.add_gridspec(len(labels), len(ratios), width_ratios=ratios)
    query = "[CLS]" if maps[0].query == 0 else "patch"
    for row, label in enumerate(labels):
        axes = draw_picture(pictures[0][row], maps[0].grid, maps[0].query, figure.add_subplot(grid[row, 0]))
        axes.set_ylabel(label)
        if row == 0:
            axes.set_title(f"query\n{query}")
        for index, (each, shown) in enumerate(zip(maps, pictures)):
            panels = [figure.add_subplot(grid[row, 2 + 5 * index + offset]) for offset in range(4)]
            values = getattr(each, stage)[row]
            head = int(dominant_head(values))
            draw_overlay(shown[row], on_grid(values[head], each.grid), panels[0])
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            panels[0].text(0.04, 0.96, f"head {head}", transform=panels[0].transAxes, fontsize=6, va="top", bbox=box)
            draw_region(shown[row], on_grid(region(values[head], share), each.grid), panels[1])
            draw_strongest(on_grid(strongest_heads(values), each.grid), len(each.head_kinds), panels[2])
            draw_overlay(shown[row], on_grid(each.rollout[row], each.grid), panels[3], low=None)
            if row == 0:
                for panel, title in zip(panels, titles):
                    panel.set_title(title)
                if len(maps) > 1:
                    # Over the middle of the four; the empty title of the figure keeps the room.
                    how = {"ha": "center", "va": "baseline", "fontsize": 9, "fontweight": "bold"}
                    name = style.note(panels[1], names[index], (1.06, 1), (0, 27), "axes fraction", **how)
                    name.set_annotation_clip(False)
                    name.set_in_layout(False)
    if len(maps) > 1:
        figure.suptitle(" ")
    heads = max(len(each.head_kinds) for each in maps)
    colours = style.categories(heads)
    handles = [Patch(color=colours(head), label=f"head {head}") for head in range(heads)]
    figure.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(heads, len(maps)))
    return figure


def _legend_columns(heads: int, models: int) -> int:
    return min(heads, 8 if models > 1 else 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, compare=True)
    options.add_block(parser)
    parser.add_argument(
        "--query",
        nargs="+",
        default=["cls"],
        metavar=("cls|ROW", "COLUMN"),
        help="whose row of the map: cls, or a patch by its row and column from 0 (default: cls)",
    )
    parser.add_argument(
        "--stage", choices=STAGES, default="after", help="which maps the summary shows (default: after)"
    )
    options.add_share(parser, "of what is positive, how much the region holds")
    options.add_images(parser, count=3)
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    checkpoints = options.load_models(args.model, args.compare, options.device_of(args.device))
    blocks = [options.block_of(args.block, each) for each in checkpoints]
    query = _query(args.query, checkpoints)
    found = find_images(checkpoints, args.images, args.num_images, args.seed, args.data_set)
    stems = [f"attention_heads_{index}" for index in range(len(found))]
    files = [name for stem in (*stems, "attention_summary") for name in figure_names(stem)]
    output = Output(args.output, [*files, "attention.npz"], args.overwrite)
    images = [prepare(each, found) for each in checkpoints]
    maps = [
        compute(each, these.pixels, block, query, args.batch_size)
        for each, these, block in zip(checkpoints, images, blocks)
    ]
    pictures = [these.pictures for these in images]
    with style.context():
        for index, stem in enumerate(stems):
            figure = style.figure(*_heads_size(maps))
            output.figure(stem, draw_heads(maps, pictures[0][index], index, figure))
        width = style.PAGE if len(maps) > 1 else 0.62 * style.PAGE
        side = width / (1.2 + 4.1 * len(maps))
        titles = 0.65 if len(maps) > 1 else 0.5
        heads = max(len(each.head_kinds) for each in maps)
        legend = 0.05 + 0.17 * -(-heads // _legend_columns(heads, len(maps)))
        figure = style.figure(width, titles + legend + len(found) * side)
        draw_summary(maps, pictures, _row_labels(images[0]), figure, args.stage, args.share)
        output.figure("attention_summary", figure)
    output.arrays("attention.npz", **_arrays(maps, images, args.share, args.stage))
    output.report()


def _heads_size(maps: list[Maps]) -> tuple[float, float]:
    """Choose width and height of `draw_heads`' figure, whose panels are at most an inch wide."""
    columns = min(max(len(each.head_kinds) for each in maps), HEADS_PER_ROW)
    lines = sum(len(STAGES) * -(-len(each.head_kinds) // HEADS_PER_ROW) for each in maps)
    width = min(style.PAGE, 0.75 + 1.0 * (columns + 1.25))
    return width, 0.1 + lines * ((width - 0.75) / (columns + 1.25) + 0.13)


def _query(words: list[str], checkpoints: list[Checkpoint]) -> int:
    if words == ["cls"]:
        return 0
    rows, columns = checkpoints[0].grid
    if any(each.grid != (rows, columns) for each in checkpoints):
        raise InputError("A patch of `--query` is one patch of both models only where their grids are equal.")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise InputError(f"`--query` is {' '.join(words)}, expected cls, or the row and column of a patch.")
    row, column = map(int, words)
    if row >= rows or column >= columns:
        raise InputError(f"`--query` is {row} {column}, and there are {rows} x {columns} patches, from 0 0.")
    return 1 + row * columns + column


def _row_labels(images: Images) -> list[str]:
    return [label if label is not None else name[:16] for name, label in zip(images.names, images.labels)]


def _arrays(maps: list[Maps], images: list[Images], share: float, stage: str) -> dict[str, np.ndarray]:
    arrays = {"names": np.array(images[0].names), "query": np.array(maps[0].query)}
    for prefix, each, these in zip(("model", "compare"), maps, images):
        values = getattr(each, stage)
        dominant = dominant_head(values)
        found = {name: np.array(getattr(each, name)) for name in ("grid", "block", *STAGES, "rollout")}
        found |= {
            "pictures": these.pictures,
            "dominant_head": dominant,
            "strongest_head": strongest_heads(values),
            "region": region(values[np.arange(len(values)), dominant], share),
        }
        arrays |= {f"{prefix}_{name}": array for name, array in found.items()}
    return arrays
