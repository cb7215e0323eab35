# SPDX-License-Identifier: Apache-2.0
"""
The loss surface over a plane through the trained weights, with the path that training took, and how sharp it is.

  --directions pca      the two principal directions of the run's path (its start and checkpoints; train with
                        --save_total_limit 0 to keep them), as in the paper, which rescales them (--normalise
                        tensor); the path is drawn on them
  --directions random   two random directions, normalised filter by filter (Li et al. 2018): for any checkpoint, and
                        alike for models of different sizes

The loss is the mean cross-entropy of held-out images. Beside it stand the largest eigenvalue of its Hessian in all
weights (power iteration), and its epsilon-sharpness in the plane: 100 (max L - L0) / (1 + L0) over the square of
epsilon to each side of the trained weights (as Keskar et al. 2017, arXiv 1609.04836, in the whole space), dashed in the
figure. Both depend on the units of the weights; only in normalised directions does the second compare models.

Buffers and frozen weights are left alone, and so are weights of one dimension (biases, norms) where directions are
normalised. The model itself is never changed: a copy is moved about.

Writes landscape.png and .svg (contours), landscape_3d.png and .svg, landscape.npz (all points), landscape.json (the
figures in numbers), and while it computes landscape.points.jsonl: the same command goes on from there when it was
stopped, and with --overwrite draws anew without computing anew.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from image_classification.errors import InputError, more

from . import options, style
from .checkpoints import Checkpoint, Moment, by_default, load_checkpoint, load_start, moments, run_folder
from .images import Found, find_images, prepare
from .output import Output, figure_names
from .planes import NORMALISE, Plane, digest, file_reader, path_plane, random_plane, reader_of
from .surfaces import Eigenvalue, Objective, Points, evaluate, largest_eigenvalue


POINTS = "landscape.points.jsonl"
# A run with so many checkpoints has a path worth drawing.
ENOUGH = 3
# Where the epsilon-sharpness looks, times epsilon, along each direction.
_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# More CPU processes than this are for those who ask: each holds copies of the weights.
_MOST_WORKERS = 8

_EDGE = [patheffects.withStroke(linewidth=2.2, foreground="black")]
_PATH = {"color": "white", "marker": "o", "markersize": 2, "linewidth": 1.0, "path_effects": _EDGE}
_STAR = {"marker": "*", "color": style.ORANGE, "markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.5}


@dataclass
class Landscape:
    """
    Of one model; the grid has C columns and R rows.

    Args:
        name: what figures call the model.
        kind: `"karat"` or `"softmax"`.
        plane: its directions and path.
        x, y: coordinates of the grid along both directions, (C,), (R,).
        loss, accuracy: (R, C); accuracy from 0 to 1, loss not finite where it overflows.
        trained_loss, trained_accuracy: at (0, 0).
        epsilon: the square of `epsilon_sharpness` reaches so far to each side of (0, 0).
        highest: the largest loss found in it.
        hessian: the largest eigenvalue; `None` if it was not asked for.
    """

    name: str
    kind: str
    plane: Plane
    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    trained_loss: float
    trained_accuracy: float
    epsilon: float
    highest: float
    hessian: Eigenvalue | None

    @property
    def epsilon_sharpness(self) -> float:
        """100 (max L - L0) / (1 + L0) over the square: percent."""
        return 100 * (self.highest - self.trained_loss) / (1 + self.trained_loss)

    def height(self, points: np.ndarray) -> np.ndarray:
        """The loss at points of the plane, (M, 2), between those of the grid: bilinear; NaN outside, (M,)."""
        column, inside_x = _place(self.x, points[:, 0])
        row, inside_y = _place(self.y, points[:, 1])
        i, j = row.astype(int), column.astype(int)
        s, t = row - i, column - j
        with np.errstate(invalid="ignore"):
            lower = self.loss[i, j] * (1 - t) + self.loss[i, j + 1] * t
            upper = self.loss[i + 1, j] * (1 - t) + self.loss[i + 1, j + 1] * t
            return np.where(inside_x & inside_y, lower * (1 - s) + upper * s, np.nan)


def _place(grid: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values are on an even grid, in steps from its start, and whether they are on it at all."""
    place = (values - grid[0]) / (grid[1] - grid[0])
    inside = (place >= -1e-9) & (place <= len(grid) - 1 + 1e-9)
    return np.clip(place, 0, np.nextafter(len(grid) - 1, 0)), inside


def compute(
    checkpoint: Checkpoint,
    objective: Objective,
    plane: Plane,
    x: np.ndarray,
    y: np.ndarray,
    epsilon: float,
    tolerance: float | None = 0.01,
    iterations: int = 100,
    devices: list[torch.device] | None = None,
    store: MutableMapping[str, dict] | None = None,
    prefix: str = "model",
) -> Landscape:
    """
    Args:
        checkpoint: the model; it is left as it is.
        objective: labelled images.
        plane: through its weights.
        x, y: coordinates of the grid, evenly spaced, (C,), (R,).
        epsilon: of the epsilon-sharpness, in the units of `x` and `y`.
        tolerance, iterations: of the Hessian's power iteration, see `largest_eigenvalue`; `None` leaves it out.
        devices: one for each process that computes; default the model's, by this process.
        store: keeps each number as soon as it is there, and is asked for it first (`Points` is a file).
        prefix: of its keys.
    """
    devices = devices or [checkpoint.model.device]
    store = {} if store is None else store
    grid = {f"{prefix}/{row}/{column}": (a, b) for row, b in enumerate(y) for column, a in enumerate(x)}
    square = {
        f"{prefix}/square {epsilon!r}/{a:g}/{b:g}": (a * epsilon, b * epsilon) for a in _STEPS for b in _STEPS if a or b
    }
    points = {f"{prefix}/trained": (0.0, 0.0)} | square | grid
    model = by_default(dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model)))
    evaluate(
        model,
        plane.directions,
        objective,
        {key: (float(a), float(b)) for key, (a, b) in points.items()},
        store,
        devices,
        f"Loss of {checkpoint.name}",
    )
    hessian = None
    if tolerance is not None:
        key = f"{prefix}/hessian {tolerance!r} {iterations}"
        if key not in store:
            # The kernels and the portable path have no second derivatives.
            model.set_attn_implementation("eager")
            title = f"Hessian of {checkpoint.name}"
            found = largest_eigenvalue(model.to(devices[0]), objective, tolerance, iterations, title=title)
            store[key] = dataclasses.asdict(found)
        hessian = Eigenvalue(**store[key])

    def values(name: str) -> np.ndarray:
        return np.array([store[key][name] for key in grid], dtype=float).reshape(len(y), len(x))

    trained = store[f"{prefix}/trained"]
    return Landscape(
        checkpoint.name,
        checkpoint.kind,
        plane,
        np.asarray(x, dtype=float),
        np.asarray(y, dtype=float),
        values("loss"),
        values("accuracy"),
        trained["loss"],
        trained["accuracy"],
        epsilon,
        # A NaN among them is no maximum of anything, and stays.
        float(np.max([trained["loss"], *(store[key]["loss"] for key in square)])),
        hessian,
    )


def extent(planes: list[Plane], size: int, radius: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    A grid for planes that are to be seen side by side, `size` by `size`: `radius` to each side; by default 1, or for
    principal directions around all paths and the trained weights, with a quarter of their extent to each side.
    """
    paths = [plane.path for plane in planes if plane.path is not None]
    if radius is not None or not paths:
        radius = 1.0 if radius is None else radius
        side = np.linspace(-radius, radius, size)
        return side, side.copy()
    points = np.concatenate([*paths, np.zeros((1, 2))])
    low, high = points.min(0), points.max(0)
    margin = (high - low) / 4
    return tuple(np.linspace(a, b, size) for a, b in zip(low - margin, high + margin))


def labelled(checkpoint: Checkpoint, found: list[Found], batch_size: int = 8) -> Objective:
    """
    Images and their classes, as one model takes them.

    Raises:
        InputError: a class is not known, or the model does not have it.
    """
    if not checkpoint.has_classifier:
        raise InputError(f"{checkpoint.source} has no classifier, so it has no loss. Give a model that was trained.")
    images = prepare(checkpoint, found)
    numbers = {label: number for number, label in enumerate(checkpoint.labels)}
    known = ", ".join(checkpoint.labels[:5]) + more(checkpoint.labels)
    for name, label in zip(images.names, images.labels):
        if label is None:
            raise InputError(
                f"The class of {name} is not known, and the loss needs it. Expected CLASS/*.jpg in the folder of "
                f"--images, with the classes of {checkpoint.source}: {known}."
            )
        if label not in numbers:
            raise InputError(f"Image {name} is of the class {label!r}; {checkpoint.source} knows {known}.")
    return Objective(images.pixels, torch.tensor([numbers[label] for label in images.labels]), batch_size)


def moments_until(source: str) -> list[Moment]:
    """The `moments` of the run of a checkpoint up to it; none where it is of no run that kept any."""
    folder = run_folder(source)
    try:
        found = [] if folder is None else moments(source)
    except InputError:
        return []
    own = re.fullmatch(r"checkpoint-(\d+)", Path(source).resolve().name)
    return [moment for moment in found if own is None or moment.step <= int(own[1])]


def plane_of_run(checkpoint: Checkpoint, found: list[Moment], normalise: str = "none") -> Plane:
    """The plane of principal directions of a run's path, `path_plane`; the start, if it is among them, is rebuilt."""
    readers = []
    for moment in found:
        if moment.folder is None:
            readers.append(reader_of(dict(load_start(checkpoint.source).model.named_parameters())))
        else:
            readers.append(file_reader(moment.folder))
    plane = path_plane(checkpoint.model, readers, normalise)
    plane.epochs = np.array([moment.epoch for moment in found])
    return plane


def levels_of(data: list[Landscape], log: bool = False, count: int = 24) -> np.ndarray:
    """Levels of contours for all models together: even steps of the loss, or of its logarithm."""
    losses = np.concatenate([each.loss[np.isfinite(each.loss)] for each in data])
    losses = losses[losses > 0] if log else losses
    if not losses.size:
        raise InputError("The loss is not finite anywhere on the grid: choose a smaller --radius.")
    low, high = losses.min(), losses.max()
    high = high if high > low else low + 1.0
    return np.geomspace(low, high, count) if log else MaxNLocator(count).tick_values(low, high)


def _norm(levels: np.ndarray, log: bool) -> Normalize:
    return (LogNorm if log else Normalize)(levels[0], levels[-1])


def _ticks(levels: np.ndarray) -> np.ndarray:
    """1, 3, 10, 30, ... for a logarithmic axis; of a narrow one its ends."""
    ticks = LogLocator(subs=(1, 3)).tick_values(levels[0], levels[-1])
    ticks = ticks[(ticks >= levels[0]) & (ticks <= levels[-1])]
    return ticks if len(ticks) > 1 else levels[[0, -1]]


def draw(data: Landscape, axes: Axes, levels: np.ndarray, log: bool = False) -> Axes:
    """
    Filled contours of the loss; on them the path of training, the trained weights (star), and the square of the
    epsilon-sharpness (dashed).

    Args:
        levels, log: from and as in `levels_of`.
    """
    loss = _within(data.loss, levels)
    axes.contourf(data.x, data.y, loss, levels, cmap=style.ORDERED, norm=_norm(levels, log))
    axes.contour(data.x, data.y, loss, levels[::3], colors="white", linewidths=0.35, alpha=0.6)
    square = {"fill": False, "edgecolor": "white", "linewidth": 0.8, "linestyle": (0, (3, 2))}
    axes.add_patch(Rectangle((-data.epsilon, -data.epsilon), 2 * data.epsilon, 2 * data.epsilon, **square))
    if data.plane.path is not None:
        axes.plot(*data.plane.path.T, **_PATH)
    axes.plot(0, 0, **_STAR)
    axes.set_xlim(data.x[0], data.x[-1])
    axes.set_ylim(data.y[0], data.y[-1])
    for axis, label in zip((axes.xaxis, axes.yaxis), axis_labels(data.plane)):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_label_text(label)
    return axes


def _within(loss: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """What is not finite is drawn as high as the highest."""
    return np.clip(np.where(np.isfinite(loss), loss, levels[-1]), levels[0], levels[-1])


def _epsilon(plane: Plane) -> float:
    """A default that is a small part of what is drawn."""
    if plane.kind == "random":
        return 0.1
    return 1.0 if plane.normalise == "none" else 0.01


def axis_labels(plane: Plane) -> tuple[str, str]:
    if plane.explained is None:
        return "first random direction", "second random direction"
    shares = [f"{100 * share:.1f} % of variance" for share in plane.explained]
    return f"first principal direction ({shares[0]})", f"second ({shares[1]})"


def draw_surface(data: Landscape, axes: Axes, levels: np.ndarray, log: bool = False) -> Axes:
    """
    The same as a surface in three dimensions, the path lying on it.

    Args:
        axes: with `projection="3d"`.
        levels: from `levels_of`.
        log: whether heights are logarithms, as the levels are.
    """
    scale = np.log10 if log else np.asarray
    bottom, top = scale(levels[0]), scale(levels[-1])
    # Matplotlib sorts whole artists by depth, and would hide the path within the surface.
    axes.computed_zorder = False
    axes.plot_surface(
        *np.meshgrid(data.x, data.y),
        scale(_within(data.loss, levels)),
        cmap=style.ORDERED,
        norm=Normalize(bottom, top),
        rstride=1,
        cstride=1,
        linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35),
        zorder=1,
    )
    if data.plane.path is not None:
        height = data.height(data.plane.path)
        there = np.isfinite(height)
        axes.plot(*data.plane.path[there].T, scale(_within(height[there], levels)), **_PATH, zorder=2)
    axes.plot([0], [0], [scale(_within(np.array(data.trained_loss), levels))], **_STAR, zorder=3)
    axes.set_zlim(bottom, top)
    for axis, label, pad in (
        (axes.xaxis, "first direction", -3),
        (axes.yaxis, "second direction", -3),
        (axes.zaxis, "loss", 0),
    ):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_label_text(label)
        axis.labelpad = pad - 3
        axis.set_tick_params(pad=pad)
        # There is no public way to the lines of the grid.
        axis._axinfo["grid"].update(linewidth=0.4, color=style.PALE)
    if log:
        ticks = _ticks(levels)
        axes.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect((4, 4, 3), zoom=0.98)
    return axes


def described(data: Landscape) -> str:
    """The sharpness of a model, for its title."""
    parts = []
    if data.hessian is not None:
        sign = "=" if data.hessian.converged else r"\approx"
        parts.append(rf"$\lambda_\mathrm{{max}} {sign} {_plain(data.hessian.value)}$")
    parts.append(rf"$\epsilon$-sharpness {_plain(data.epsilon_sharpness)} % ($\epsilon = {data.epsilon:g}$)")
    return ", ".join(parts)


def _plain(value: float) -> str:
    """Three digits, without an exponent."""
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def draw_all(data: list[Landscape], figure: Figure, log: bool = False, surface: bool = False) -> Figure:
    """Models side by side on one scale: contours, or surfaces in three dimensions."""
    levels = levels_of(data, log)
    panels = figure.subplots(1, len(data), squeeze=False, subplot_kw={"projection": "3d"} if surface else {})[0]
    names = style.tell_apart([each.name for each in data], [each.kind for each in data])
    for each, name, axes in zip(data, names, panels):
        if surface:
            draw_surface(each, axes, levels, log)
        else:
            draw(each, axes, levels, log)
        axes.set_title(f"{name}\n{described(each)}" if len(data) > 1 else described(each))
    if not surface:
        bar = figure.colorbar(
            ScalarMappable(_norm(levels, log), style.ORDERED), ax=panels.tolist(), pad=0.02, aspect=28
        )
        bar.set_label("loss")
        if log:
            bar.set_ticks(_ticks(levels), labels=[f"{tick:g}" for tick in _ticks(levels)])
            bar.ax.minorticks_off()
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, compare=True)
    parser.add_argument(
        "--directions",
        choices=("pca", "random"),
        help=f"of the plane (default: pca for runs that kept {ENOUGH} checkpoints or more, otherwise random)",
    )
    parser.add_argument(
        "--normalise",
        choices=NORMALISE,
        help="give each tensor, or each filter, of a direction the norm that it has in the weights; the paper draws "
        "with pca and tensor (default: none for pca, which shows the path as it is, filter for random)",
    )
    parser.add_argument(
        "--no-start", action="store_true", help="leave the start of the run, which is rebuilt, out of its path"
    )
    parser.add_argument("--grid", type=options.positive, default=25, help="points along each direction (default: 25)")
    parser.add_argument(
        "--radius",
        type=_above_zero,
        help="how far the plane reaches to each side, times the directions (default: 1, and around the path for pca)",
    )
    parser.add_argument(
        "--epsilon",
        type=_above_zero,
        help="of the epsilon-sharpness, in the units of the axes (default: random directions 0.1, principal ones 1, "
        "or 0.01 where they are normalised)",
    )
    parser.add_argument("--no-hessian", action="store_true", help="leave out the eigenvalue of the Hessian")
    parser.add_argument(
        "--hessian-tolerance",
        type=_above_zero,
        default=0.01,
        metavar="SHARE",
        help="its power iteration stops when the residual is this share of the eigenvalue (default: 0.01)",
    )
    parser.add_argument(
        "--hessian-iterations",
        type=options.positive,
        default=100,
        metavar="COUNT",
        help="or after so many Hessian-vector products, and says so (default: 100)",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic scale of the loss")
    parser.add_argument(
        "--data-set",
        metavar="NAME_OR_DIR",
        help="draw from the held-out images of this data set, or of this folder of one, as run_image_classification.py "
        "reads them with --data_set and --data_path",
    )
    options.add_images(parser, count=256)
    parser.add_argument(
        "--workers",
        type=options.positive,
        help="processes that compute, each a point at a time; the numbers are the same for any number of them "
        f"(default: one for each GPU, or for each CPU core, {_MOST_WORKERS} at most)",
    )
    options.add_output(parser)


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def run(args: argparse.Namespace) -> None:
    names = [*figure_names("landscape"), *figure_names("landscape_3d"), "landscape.npz", "landscape.json"]
    output = Output(args.output, names, args.overwrite)
    if args.grid < 3:
        raise InputError(f"`--grid` is {args.grid}, expected 3 or more.")
    devices = devices_of(args.device, args.workers)
    # On the CPU, from where worker processes take them; each device gets its copies.
    checkpoints = [load_checkpoint(args.model)]
    if args.compare is not None:
        checkpoints.append(load_checkpoint(args.compare, "--compare"))
    prefixes = ("model", "compare")[: len(checkpoints)]
    found = find_images(checkpoints, args.images, args.num_images, args.seed, args.data_set)
    objectives = [labelled(each, found, args.batch_size) for each in checkpoints]
    planes = _planes(args, checkpoints)
    x, y = extent(planes, args.grid, args.radius)
    settings = {
        "directions": planes[0].kind,
        "normalise": planes[0].normalise,
        "seed": args.seed if planes[0].kind == "random" else None,
        "grid": args.grid,
        "radius": args.radius,
    }
    for prefix, checkpoint, objective, plane in zip(prefixes, checkpoints, objectives, planes):
        settings[f"weights of --{prefix}"] = digest(checkpoint.model)
        settings[f"path of --{prefix}"] = plane.digest
        settings[f"images for --{prefix}"] = _digest_of(objective)
    with Points(output.folder / POINTS, settings, args.overwrite) as store:
        if store:
            print(f"{len(store):,} numbers are in {store.path}: going on from there.")
        data = [
            compute(
                checkpoint,
                objective,
                plane,
                x,
                y,
                args.epsilon or _epsilon(plane),
                None if args.no_hessian else args.hessian_tolerance,
                args.hessian_iterations,
                devices,
                store,
                prefix,
            )
            for prefix, checkpoint, objective, plane in zip(prefixes, checkpoints, objectives, planes)
        ]
    with style.context():
        width = style.COLUMN if len(data) == 1 else style.PAGE
        output.figure("landscape", draw_all(data, style.figure(width, 2.9), args.log))
        output.figure("landscape_3d", draw_all(data, style.figure(width, 2.9), args.log, surface=True))
    output.arrays("landscape.npz", **{k: v for prefix, each in zip(prefixes, data) for k, v in _arrays(prefix, each)})
    numbers = {
        prefix: numbers_of(checkpoint.source, each) for prefix, checkpoint, each in zip(prefixes, checkpoints, data)
    }
    output.text(
        "landscape.json",
        json.dumps({"images": len(found), "settings": settings} | numbers, indent=2, allow_nan=False) + "\n",
    )
    for each in data:
        _tell(each)
    output.report()


def devices_of(name: str | None, workers: int | None) -> list[torch.device]:
    """A device for each process: `--workers` of them, in turn over all GPUs, or on the one device of `--device`."""
    first = options.device_of(name)
    if first.type == "cuda" and first.index is None:
        found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        found = [first]
    if workers is None:
        cores = torch.get_num_threads() if first.type == "cpu" else 1
        workers = min(cores, _MOST_WORKERS) if first.type == "cpu" else len(found)
    return [found[number % len(found)] for number in range(workers)]


def _planes(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> list[Plane]:
    """A plane for each model, of one kind."""
    paths = [moments_until(each.source) for each in checkpoints]
    kept = [sum(moment.folder is not None for moment in path) for path in paths]
    kind = args.directions or ("pca" if min(kept) >= ENOUGH else "random")
    if kind == "random":
        if args.directions is None:
            least = kept.index(min(kept))
            print(
                f"Random directions: {checkpoints[least].source} is of no run that kept {ENOUGH} checkpoints, whose "
                f"path would be drawn (it kept {kept[least]})."
            )
        return [random_plane(each.model, args.seed, args.normalise or "filter") for each in checkpoints]
    planes = []
    for checkpoint, path in zip(checkpoints, paths):
        path = [moment for moment in path if moment.step > 0 or not args.no_start]
        if len(path) < 3:
            raise InputError(
                f"`--directions pca` needs a run that kept its checkpoints (--save_total_limit 0), at least 3 moments "
                f"of it; of {checkpoint.source} there are {len(path)}. Or choose random."
            )
        plane = plane_of_run(checkpoint, path, args.normalise or "none")
        shares = " and ".join(f"{100 * share:.1f} %" for share in plane.explained)
        print(f"Principal directions of {len(path)} moments of {checkpoint.source}: {shares} of the variance.")
        planes.append(plane)
    return planes


def _digest_of(objective: Objective) -> str:
    found = hashlib.sha256()
    for tensor in (objective.pixels, objective.labels):
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


def _arrays(prefix: str, data: Landscape):
    plane = data.plane
    for name in ("x", "y", "loss", "accuracy"):
        yield f"{prefix}_{name}", getattr(data, name)
    if plane.path is not None:
        for name in ("path", "epochs", "distances", "explained"):
            yield f"{prefix}_{name}", getattr(plane, name)


def numbers_of(source: str, data: Landscape) -> dict:
    """What landscape.json says of one model."""
    explained = None if data.plane.explained is None else data.plane.explained.tolist()
    return {
        "source": source,
        "loss": _finite(data.trained_loss),
        "accuracy": data.trained_accuracy,
        "hessian": data.hessian and {key: _finite(value) for key, value in dataclasses.asdict(data.hessian).items()},
        "epsilon": data.epsilon,
        "highest_loss_within": _finite(data.highest),
        "epsilon_sharpness_percent": _finite(data.epsilon_sharpness),
        "explained_variance": explained,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if np.isfinite(value) else None


def _tell(data: Landscape) -> None:
    print(
        f"{data.name}: loss {data.trained_loss:.4g}, epsilon-sharpness {data.epsilon_sharpness:.4g} % in the plane "
        f"(epsilon {data.epsilon:g})"
    )
    if data.hessian is not None:
        found = data.hessian
        how = "" if found.converged else ", NOT converged: raise --hessian-iterations"
        print(
            f"{data.name}: largest eigenvalue of the Hessian {found.value:.4g} (residual {found.residual:.2g} after "
            f"{found.iterations} products{how})"
        )
