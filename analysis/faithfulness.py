# SPDX-License-Identifier: Apache-2.0
"""
What attention maps are worth, as numbers: does the model rely on the patches that its map names, and do they show the
object?

  deletion    patches vanish, the map's strongest first: area under the curve of the probability of the class that the
              model predicted (Petsiuk et al. 2018). Low is good.
  insertion   the same patches appear, in the same order, in a blurred image: area under the curve. High is good.
  pointing    whether the strongest patch touches the object (Zhang et al. 2018, whose tolerance is about a patch)
  IoU         of the object with the smallest set of patches that holds --share of the map

The first two need images alone, the others --annotated images. Each is given for the map, for a random map and for one
that is strongest at the centre, where photographs have their object; with --compare for another model (a softmax ViT,
say) on the same images, and for the differences, image by image. Intervals are of the mean over the images, by the
bootstrap (percentiles of resampled means).

The map is what [CLS] sees in --block: `mean` is the mean of the magnitudes over the heads, `dominant` what is positive
in the dominant head, `rollout` attention rollout over all blocks. Patches that vanish take the mean colour of their
image, or its blur (Gaussian, standard deviation of one patch); equal patches go in random order. An unsure model has
low curves, so compare models by the distance from their random maps, which `attention - random` gives.

Writes faithfulness.csv (means and intervals), .npz (the curves and measures of every image), .png and .svg.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

from image_classification.errors import InputError

from . import options, style
from .annotations import BOX_FORMATS, as_seen, find_annotated
from .attention import Maps, dominant_head, on_grid, region
from .attention import compute as attention_maps
from .images import find_images, prepare
from .models import Checkpoint, use_default_attention
from .output import Output, figure_names


KINDS = ("mean", "dominant", "rollout")
FILLS = ("mean", "blur")
# What is measured, with its title and the direction that is good.
MEASURES = {
    "deletion": ("deletion", "↓"),
    "insertion": ("insertion", "↑"),
    "pointing": ("pointing game", "↑"),
    "iou": ("IoU", "↑"),
}
SOURCES = ("attention", "random", "centre")
DASHES = {"attention": "-", "random": "--", "centre": ":"}
LEVEL = 0.95


@dataclass(kw_only=True)
class Faithfulness:
    """
    The measures of one model; B images, steps + 1 points of the curves. The first axis of the arrays is `SOURCES`: the
    model's map, a random one, one that is strongest at the centre.

    Args:
        name: what tables and figures call the model.
        kind: `"karat"` or `"softmax"`.
        shares: of the patches that have vanished or appeared, ascending from 0 to 1.
        deletion_curves, insertion_curves: probability of the class predicted, (3, B, steps + 1).
        predicted: the class, (B,).
        pointing: 1 where the strongest patch touches the object and 0 where not, NaN where the model sees nothing of
            the object, (3, B); `None` without objects.
        iou: (3, B), NaN and `None` likewise.
    """

    name: str
    kind: str
    shares: np.ndarray
    deletion_curves: np.ndarray
    insertion_curves: np.ndarray
    predicted: np.ndarray
    pointing: np.ndarray | None = None
    iou: np.ndarray | None = None

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """The measures of every image, (3, B)."""
        found = {
            "deletion": area(self.shares, self.deletion_curves),
            "insertion": area(self.shares, self.insertion_curves),
            "pointing": self.pointing,
            "iou": self.iou,
        }
        return {name: values for name, values in found.items() if values is not None}


@dataclass(kw_only=True)
class Protocol:
    """
    The way to measure, the same for every model.

    Args:
        map: one of `KINDS`.
        steps: of the curves; at most one for each patch.
        deleted, inserted: what patches are that have vanished, and that have not appeared: one of `FILLS`.
        share: of the map that the region of the IoU holds.
        seed: of the random maps and of the order of equal patches.
        batch_size: images computed at once.
    """

    map: str = "mean"
    steps: int = 20
    deleted: str = "mean"
    inserted: str = "blur"
    share: float = 0.6
    seed: int = 0
    batch_size: int = 8


def compute(
    checkpoint: Checkpoint,
    pixels: torch.Tensor,
    block: int,
    objects: np.ndarray | None = None,
    protocol: Protocol | None = None,
) -> Faithfulness:
    """
    Measure the map of one block on images.

    Args:
        checkpoint: the model, with a classifier.
        pixels: (B, 3, height, width), as the model takes them.
        block: whose map.
        objects: boolean, (B, height, width), True on the object; `None` leaves out pointing game and IoU.
        protocol: how; default as `Protocol` has it.

    Raises:
        InputError: see `check`.
    """
    check(checkpoint)
    protocol = protocol or Protocol()
    batch_size = protocol.batch_size
    grid, count = checkpoint.grid, len(pixels)
    patches = grid[0] * grid[1]
    random = np.random.default_rng(protocol.seed)
    ours = importance(attention_maps(checkpoint, pixels, block, 0, batch_size), protocol.map)
    values = np.stack([ours, random.random((count, patches)), np.broadcast_to(centre(grid), (count, patches))])
    ties = random.random((count, patches))
    orders = np.stack([ranking(each, ties) for each in values])
    counts = np.unique(np.linspace(0, patches, protocol.steps + 1).round().astype(int))
    probability, predicted = _probability(checkpoint, pixels, batch_size)
    ends = {
        "deletion": (pixels, fill(pixels, protocol.deleted, checkpoint)),
        "insertion": (fill(pixels, protocol.inserted, checkpoint), pixels),
    }
    curves: dict[str, list[np.ndarray]] = {measure: [] for measure in ends}
    images = len(ends) * len(SOURCES) * len(counts) * count
    title = f"Deletion and insertion, {checkpoint.name}"
    with tqdm(total=images, desc=title, unit="image", leave=False, delay=1) as bar:
        for order in orders:
            for measure, both in ends.items():
                curves[measure].append(perturb(probability, *both, order, counts, grid, batch_size, bar.update))
    pointing = iou = None
    if objects is not None:
        pointing = np.stack([point(order[:, 0], objects, grid) for order in orders])
        iou = np.stack([overlap(each, objects, grid, protocol.share) for each in values])
    return Faithfulness(
        name=checkpoint.name,
        kind=checkpoint.kind,
        shares=counts / patches,
        deletion_curves=np.stack(curves["deletion"]),
        insertion_curves=np.stack(curves["insertion"]),
        predicted=predicted.numpy(),
        pointing=pointing,
        iou=iou,
    )


def check(checkpoint: Checkpoint) -> None:
    """Raise an `InputError` for a model without a classifier, or whose patches do not cover its images."""
    if not checkpoint.has_classifier:
        raise InputError(
            f"{checkpoint.source} has no classifier, so there is no probability to follow. Name a trained classifier."
        )
    checkpoint.check_whole_maps()
    sides, patch = checkpoint.image_size, checkpoint.patch_size
    if any(side % part for side, part in zip(sides, patch)):
        raise InputError(
            f"{checkpoint.source} leaves a part of its images of {sides[0]} x {sides[1]} pixels to no patch of "
            f"{patch[0]} x {patch[1]}, and what it says of that part cannot be measured."
        )


def importance(maps: Maps, kind: str) -> np.ndarray:
    """Measure the strength of a map at every patch, 0 or more: (B, patches). `kind` is one of `KINDS`."""
    if kind == "rollout":
        values = maps.rollout
    elif kind == "mean":
        values = np.abs(maps.after).mean(1)
    else:
        values = np.clip(maps.after[np.arange(len(maps.after)), dominant_head(maps.after)], 0, None)
    return on_grid(values, maps.grid).reshape(len(values), -1).astype(np.float64)


def centre(grid: tuple[int, int]) -> np.ndarray:
    """Make a map that knows nothing of the image: a Gaussian about the centre, a quarter of each side, (patches,)."""
    rows, columns = ((2 * np.arange(size) + 1 - size) / size / 0.5 for size in grid)
    return np.exp(-(rows[:, None] ** 2 + columns**2) / 2).reshape(-1)


def ranking(values: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Order patches from the strongest to the weakest, equal ones by `ties`: both (B, patches)."""
    return np.lexsort((ties, -values), axis=-1)


def fill(pixels: torch.Tensor, how: str, checkpoint: Checkpoint) -> torch.Tensor:
    """
    Make images without what is in them.

    Args:
        pixels: (B, 3, height, width).
        how: `"mean"`, each image's mean colour, or `"blur"`, the image under a Gaussian as wide as a patch.
    """
    if how == "mean":
        return pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    deviation = [float(side) for side in checkpoint.patch_size[::-1]]
    # Reflection at the edges needs a kernel that is smaller than twice the image.
    size = [2 * min(round(3 * each), side - 1) + 1 for each, side in zip(deviation, reversed(pixels.shape[2:]))]
    return functional.gaussian_blur(pixels, size, deviation)


def perturb(
    probability: Callable[[torch.Tensor, slice], torch.Tensor],
    before: torch.Tensor,
    after: torch.Tensor,
    order: np.ndarray,
    counts: np.ndarray,
    grid: tuple[int, int],
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """
    Follow a score while patches of one image replace those of another.

    Args:
        probability: the score (b,) of images (b, 3, height, width), and which of the B they are.
        before, after: (B, 3, height, width).
        order: patches in the order in which they change, (B, patches).
        counts: how many have changed at each point, (points,).
        progress: called with a number of images that are done.

    Returns:
        (B, points)
    """
    # At which place each patch changes.
    place = torch.as_tensor(order.argsort(-1)).view(-1, 1, *grid)
    curves = np.empty((len(before), len(counts)))
    for start in range(0, len(before), batch_size):
        part = slice(start, start + batch_size)
        places = torch.nn.functional.interpolate(place[part].float(), before.shape[2:], mode="nearest")
        for point, count in enumerate(counts):
            images = torch.where(places < count, after[part], before[part])
            curves[part, point] = probability(images, part).double().cpu().numpy()
            if progress is not None:
                progress(len(images))
    return curves


def area(shares: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Measure the area under curves (..., points) over `shares`, by trapezoids."""
    return np.trapezoid(curves, shares, axis=-1)


def point(strongest: np.ndarray, objects: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Tell by 1 or 0 whether a patch (B,) touches the object (B, height, width), by NaN that there is none: (B,)."""
    touched = np.asarray(_by_patch(objects, grid).any(-1))
    hits = touched[np.arange(len(strongest)), strongest].astype(float)
    return np.where(touched.any(-1), hits, np.nan)


def overlap(values: np.ndarray, objects: np.ndarray, grid: tuple[int, int], share: float) -> np.ndarray:
    """
    Measure intersection over union, in pixels, of objects and the smallest sets of patches with `share` of the map.

    Args:
        values: (B, patches), 0 or more.
        objects: boolean, (B, height, width).
        share: from 0 to 1.

    Returns:
        (B,), NaN where there is no object.
    """
    inside = region(np.pad(values, ((0, 0), (1, 0))), share)[:, 1:]
    of_object = _by_patch(objects, grid)
    pixels = of_object.shape[-1]
    both = (of_object.sum(-1) * inside).sum(-1)
    objects_size = of_object.sum((-1, -2))
    union = objects_size + inside.sum(-1) * pixels - both
    return np.where(objects_size > 0, both / np.where(union > 0, union, 1), np.nan)


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float, int]:
    """
    Compute the mean over images and its interval, at the level `LEVEL`, by percentiles of resampled means (Efron 1979).

    Args:
        values: (B,); NaN takes no part.

    Returns:
        Mean, lower and upper end (NaN without images), and how many images took part.
    """
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 2:
        return mean, mean, mean, len(values)
    how = {"n_resamples": resamples, "batch": 100, "confidence_level": LEVEL, "method": "percentile", "rng": seed}
    low, high = stats.bootstrap((values,), np.mean, **how).confidence_interval
    return mean, float(low), float(high), len(values)


def table(data: list[Faithfulness], resamples: int = 2000, seed: int = 0) -> list[dict]:
    """
    Tabulate every measure of every model and map, `attention - random` of every model, and for two models the
    difference of each map's measures, image by image: `model`, `map`, `measure`, `mean`, `low`, `high`, `images`.
    """
    measured = []
    for each in data:
        of = {
            source: {name: both[index] for name, both in each.measures.items()} for index, source in enumerate(SOURCES)
        }
        of["attention - random"] = _minus(of["attention"], of["random"])
        measured.append((each.name, of))
    if len(data) == 2:
        (first, ours), (second, theirs) = measured
        # The centre and random maps are equal, but what they do to the models is not.
        measured.append((f"{first} - {second}", {source: _minus(ours[source], theirs[source]) for source in ours}))
    rows = []
    for model, of in measured:
        for source, measures in of.items():
            for measure, values in measures.items():
                mean, low, high, images = bootstrap(values, resamples, seed)
                row = {"model": model, "map": source, "measure": measure}
                rows.append(row | {"mean": mean, "low": low, "high": high, "images": images})
    return rows


def text(rows: list[dict]) -> str:
    """Write the rows of `table` in Markdown, a line for each model and map."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    titles = [" ".join(MEASURES[measure]) for measure in measures]
    lines = [["model", "map", *titles]]
    for model, source in dict.fromkeys((row["model"], row["map"]) for row in rows):
        found = {row["measure"]: row for row in rows if (row["model"], row["map"]) == (model, source)}
        cells = [
            f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row["images"] else "-"
            for row in (found[measure] for measure in measures)
        ]
        lines.append([model, source, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    padded.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(padded) + f"\n\nMeans over {rows[0]['images']} images and their {LEVEL:.0%} intervals.\n"


def draw(data: list[Faithfulness], measure: str, axes: Axes, resamples: int = 2000) -> Axes:
    """Draw the curves of `"deletion"` or `"insertion"`, mean over images; a band for the model's own map."""
    names, colours = style.tell_apart(data), style.colours_of(data)
    for each, name, colour in zip(data, names, colours):
        curves = each.deletion_curves if measure == "deletion" else each.insertion_curves
        for source, of in zip(SOURCES, curves):
            label = f"{name}, {source}" if len(data) > 1 else source
            pale: dict[str, Any] = {} if source == "attention" else {"alpha": 0.75, "linewidth": 0.9}
            axes.plot(100 * each.shares, of.mean(0), DASHES[source], color=colour, label=label, **pale)
        low, high = np.array([bootstrap(points, resamples)[1:3] for points in curves[0].T]).T
        axes.fill_between(100 * each.shares, low, high, color=colour, alpha=0.18, linewidth=0)
    change = "deleted" if measure == "deletion" else "inserted"
    axes.set(xlim=(0, 100), ylim=(0, None), xlabel=f"patches {change} (%)", ylabel="probability of the class")
    return axes


def draw_measure(data: list[Faithfulness], rows: list[dict], measure: str, axes: Axes) -> Axes:
    """Draw the mean of one measure with its interval, for every model and map, from the rows of `table`."""
    names, colours = style.tell_apart(data), style.colours_of(data)
    for index, (each, name, colour) in enumerate(zip(data, names, colours)):
        found = {row["map"]: row for row in rows if (row["model"], row["measure"]) == (each.name, measure)}
        places = np.arange(len(SOURCES)) + 0.22 * (index - (len(data) - 1) / 2)
        mean, low, high = (np.array([found[source][key] for source in SOURCES]) for key in ("mean", "low", "high"))
        axes.errorbar(places, mean, [mean - low, high - mean], fmt="o", color=colour, label=name, elinewidth=1)
    axes.set(xlim=(-0.5, len(SOURCES) - 0.5), ylim=(0, None))
    axes.set_xticks(range(len(SOURCES)), SOURCES, fontsize=6)
    return axes


def draw_all(data: list[Faithfulness], rows: list[dict], figure: Figure) -> Figure:
    """Draw both curves, and where there are objects the two other measures; one legend."""
    measures = list(data[0].measures)
    panels = dict(zip(measures, figure.subplots(1, len(measures))))
    for measure, axes in panels.items():
        title, arrow = MEASURES[measure]
        if measure in ("deletion", "insertion"):
            draw(data, measure, axes)
        else:
            draw_measure(data, rows, measure, axes)
        # Where there is room beside the title.
        good = "" if len(measures) > 2 else f" ({'lower' if arrow == '↓' else 'higher'} is better)"
        axes.set_title(title + good)
    style.share_heights(panels[name] for name in ("deletion", "insertion"))
    panels["insertion"].set_ylabel("")
    handles, labels = panels["deletion"].get_legend_handles_labels()
    # Legends fill columns: a row for each model.
    rowwise = [index + len(SOURCES) * model for index in range(len(SOURCES)) for model in range(len(data))]
    handles, labels = ([each[index] for index in rowwise] for each in (handles, labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SOURCES))
    return figure


def _minus(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {measure: ours[measure] - theirs[measure] for measure in ours}


def _by_patch(objects: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cut (B, height, width) into (B, patches, pixels of a patch)."""
    count, height, width = objects.shape
    tiles = objects.reshape(count, grid[0], height // grid[0], grid[1], width // grid[1])
    return tiles.transpose(0, 1, 3, 2, 4).reshape(count, grid[0] * grid[1], -1)


def _probability(
    checkpoint: Checkpoint, pixels: torch.Tensor, batch_size: int
) -> tuple[Callable[[torch.Tensor, slice], torch.Tensor], torch.Tensor]:
    """Make for `perturb` the probability of the class predicted of the whole image; and give the classes, (B,)."""
    model = use_default_attention(checkpoint)

    @torch.inference_mode()
    def logits(images: torch.Tensor) -> torch.Tensor:
        return model(images.to(model.device, model.dtype)).logits.float().cpu()

    predicted = torch.cat([logits(part).argmax(-1) for part in pixels.split(batch_size)])

    def probability(images: torch.Tensor, part: slice) -> torch.Tensor:
        return logits(images).softmax(-1).gather(-1, predicted[part, None])[:, 0]

    return probability, predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, compare=True)
    options.add_block(parser)
    parser.add_argument("--map", choices=KINDS, default="mean", help="which map (default: mean)")
    options.add_images(parser, count=50)
    parser.add_argument(
        "--annotated",
        metavar="DIR_OR_REPO",
        help="images whose objects are marked, in place of --images: a folder with a metadata.jsonl, one line "
        '{"file_name": "cat.jpg", "objects": {"bbox": [[x, y, width, height]]}} (pixels) or {"file_name": ..., '
        '"mask_file_name": "masks/cat.png"} (what is not black) for each; or a data set with the columns objects, '
        "bbox or mask",
    )
    parser.add_argument("--split", help="of --annotated (default: the one there is, or the held-out one)")
    parser.add_argument(
        "--box-format",
        choices=BOX_FORMATS,
        default="xywh",
        help="boxes are left, top, width, height, or left, top, right, bottom (default: xywh)",
    )
    options.add_share(parser, "of the map, how much the region of the IoU holds")
    parser.add_argument(
        "--steps", type=options.at_least(1), default=20, help="of the curves, at most one for each patch (default: 20)"
    )
    parser.add_argument("--deleted", choices=FILLS, default="mean", help="what deletion leaves (default: mean)")
    parser.add_argument("--inserted", choices=FILLS, default="blur", help="what insertion begins with (default: blur)")
    parser.add_argument("--resamples", type=options.at_least(1), default=2000, help="of the bootstrap (default: 2000)")
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    for flag, value in (("--images", args.images), ("--data-set", args.data_set)):
        if args.annotated is not None and value is not None:
            raise InputError(f"`--annotated` and `{flag}` both name images. Give one of them.")
    if args.annotated is None and args.split is not None:
        raise InputError("`--split` is one of --annotated, which is not given.")
    checkpoints = options.load_models(args.model, args.compare, options.device_of(args.device))
    for each in checkpoints:
        check(each)
    blocks = [options.block_of(args.block, each) for each in checkpoints]
    output = Output(
        args.output, ["faithfulness.csv", "faithfulness.npz", *figure_names("faithfulness")], args.overwrite
    )
    objects = None
    if args.annotated is None:
        found = find_images(checkpoints, args.images, args.num_images, args.seed, args.data_set)
    else:
        found, objects = find_annotated(args.annotated, args.split, args.num_images, args.seed, args.box_format)
    if len(found) < 2:
        raise InputError("There is one image, and an interval over images needs two or more.")
    kept = ("shares", "deletion_curves", "insertion_curves", "predicted")
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
    data, arrays = [], {"names": np.array([name for _, name, _ in found]), "maps": np.array(SOURCES)}
    for prefix, each, block in zip(("model", "compare"), checkpoints, blocks):
        seen = None if objects is None else as_seen(each, objects)
        if seen is not None and (lost := int((~seen.any((1, 2))).sum())):
            print(f"{each.name}: of {lost} images the crop leaves nothing of the object; no pointing game, no IoU.")
        data.append(compute(each, prepare(each, found).pixels, block, seen, protocol))
        arrays |= {f"{prefix}_{key}": getattr(data[-1], key) for key in kept}
        arrays |= {f"{prefix}_{measure}": values for measure, values in data[-1].measures.items()}
    rows = table(data, args.resamples, args.seed)
    output.table("faithfulness.csv", rows)
    output.arrays("faithfulness.npz", **arrays)
    with style.context():
        output.figure("faithfulness", draw_all(data, rows, style.figure(style.PAGE, 2.5)))
    print(text(rows))
    output.report()
