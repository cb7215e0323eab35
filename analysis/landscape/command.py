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
figures in numbers), and while it computes landscape.points.sqlite: the same command goes on from there when it was
stopped, and with --overwrite draws anew without computing anew.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from image_classification.errors import InputError

from .. import options, style
from ..images import find_images
from ..models import Checkpoint, Moment, load_start, moments, run_folder
from ..output import Output, figure_names
from .figures import draw_all
from .objective import labelled
from .planes import NORMALISE, Plane, digest, extent, file_reader, path_plane, random_plane, reader_of
from .store import Points
from .surface import Landscape, compute


POINTS = "landscape.points.sqlite"
# A run with so many checkpoints has a path worth drawing.
ENOUGH = 3
# More CPU processes than this are for those who ask: each holds copies of the weights.
_MOST_WORKERS = 8


def moments_until(source: str) -> list[Moment]:
    """List the `moments` of the run of a checkpoint up to it; none where it is of no run that kept any."""
    folder = run_folder(source)
    try:
        found = [] if folder is None else moments(source)
    except InputError:
        return []
    own = re.fullmatch(r"checkpoint-(\d+)", Path(source).resolve().name)
    return [moment for moment in found if own is None or moment.step <= int(own[1])]


def plane_of_run(checkpoint: Checkpoint, found: list[Moment], normalise: str = "none") -> Plane:
    """Find the `path_plane` of a run; the start, if it is among the moments, is rebuilt."""
    readers = []
    for moment in found:
        if moment.folder is None:
            readers.append(reader_of(dict(load_start(checkpoint.source).model.named_parameters())))
        else:
            readers.append(file_reader(moment.folder))
    plane = path_plane(checkpoint.model, readers, normalise)
    plane.epochs = np.array([moment.epoch for moment in found])
    return plane


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
    parser.add_argument(
        "--grid", type=options.at_least(3), default=25, help="points along each direction (default: 25)"
    )
    parser.add_argument(
        "--radius",
        type=options.above_zero,
        help="how far the plane reaches to each side, times the directions (default: 1, and around the path for pca)",
    )
    parser.add_argument(
        "--epsilon",
        type=options.above_zero,
        help="of the epsilon-sharpness, in the units of the axes (default: random directions 0.1, principal ones 1, "
        "or 0.01 where they are normalised)",
    )
    parser.add_argument("--no-hessian", action="store_true", help="leave out the eigenvalue of the Hessian")
    parser.add_argument(
        "--hessian-tolerance",
        type=options.above_zero,
        default=0.01,
        metavar="SHARE",
        help="its power iteration stops when the residual is this share of the eigenvalue (default: 0.01)",
    )
    parser.add_argument(
        "--hessian-iterations",
        type=options.at_least(1),
        default=100,
        metavar="COUNT",
        help="or after so many Hessian-vector products, and says so (default: 100)",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic scale of the loss")
    options.add_images(parser, count=256)
    parser.add_argument(
        "--workers",
        type=options.at_least(1),
        help="processes that compute, each a point at a time; the numbers are the same for any number of them "
        f"(default: one for each GPU, or for each CPU core, {_MOST_WORKERS} at most)",
    )
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    names = [*figure_names("landscape"), *figure_names("landscape_3d"), "landscape.npz", "landscape.json"]
    output = Output(args.output, names, args.overwrite)
    devices = devices_of(args.device, args.workers)
    # On the CPU, from where worker processes take them; each device gets its copies.
    checkpoints = options.load_models(args.model, args.compare, "cpu")
    prefixes = ("model", "compare")[: len(checkpoints)]
    found = find_images(checkpoints, args.images, args.num_images, args.seed, args.data_set)
    objectives = [labelled(each, found, args.batch_size) for each in checkpoints]
    planes = _planes(args, checkpoints)
    grid = extent(planes, args.grid, args.radius)
    settings = {
        "directions": planes[0].kind,
        "normalise": planes[0].normalise,
        "seed": args.seed if planes[0].kind == "random" else None,
        "grid": args.grid,
        "radius": args.radius,
    }
    models = list(zip(prefixes, checkpoints, objectives, planes))
    for prefix, checkpoint, objective, plane in models:
        settings[f"weights of --{prefix}"] = digest(sorted(checkpoint.model.state_dict().items()))
        settings[f"path of --{prefix}"] = plane.digest
        settings[f"images for --{prefix}"] = digest([("", objective.pixels), ("", objective.labels)])
    if (earlier := output.folder / "landscape.points.jsonl").exists():
        print(f"{earlier} is of an earlier version: its points are computed anew, into {POINTS}. Delete it.")
    # A small part of what is drawn.
    epsilon = args.epsilon or (0.1 if planes[0].kind == "random" else 1.0 if planes[0].normalise == "none" else 0.01)
    with Points(output.folder / POINTS, settings, args.overwrite) as store:
        if store:
            print(f"{len(store):,} numbers are in {store.path}: going on from there.")
        stopping = None if args.no_hessian else (args.hessian_tolerance, args.hessian_iterations)
        data = [
            compute(
                checkpoint,
                objective,
                plane,
                grid,
                epsilon,
                stopping=stopping,
                devices=devices,
                store=store,
                prefix=prefix,
            )
            for prefix, checkpoint, objective, plane in models
        ]
    with style.context():
        width = style.COLUMN if len(data) == 1 else style.PAGE
        output.figure("landscape", draw_all(data, style.figure(width, 2.9), args.log))
        output.figure("landscape_3d", draw_all(data, style.figure(width, 2.9), args.log, surface=True))
    output.arrays("landscape.npz", **{k: v for prefix, each in zip(prefixes, data) for k, v in _arrays(prefix, each)})
    numbers = {"images": len(found), "settings": settings}
    for prefix, checkpoint, each in zip(prefixes, checkpoints, data):
        numbers[prefix] = numbers_of(checkpoint.source, each)
        _tell(each)
    output.text("landscape.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    output.report()


def devices_of(name: str | None, workers: int | None) -> list[torch.device]:
    """Choose a device for each of `--workers` processes, in turn over all GPUs, or always that of `--device`."""
    first = options.device_of(name)
    found = [first]
    if first.type == "cuda" and first.index is None:
        found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if workers is None:
        workers = min(torch.get_num_threads(), _MOST_WORKERS) if first.type == "cpu" else len(found)
    return [found[number % len(found)] for number in range(workers)]


def _planes(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> list[Plane]:
    """Choose a plane for each model, all of one kind."""
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
        assert plane.explained is not None
        shares = " and ".join(f"{100 * share:.1f} %" for share in plane.explained)
        print(f"Principal directions of {len(path)} moments of {checkpoint.source}: {shares} of the variance.")
        planes.append(plane)
    return planes


def _arrays(prefix: str, data: Landscape) -> Iterator[tuple[str, np.ndarray]]:
    plane = data.plane
    for name in ("x", "y", "loss", "accuracy"):
        yield f"{prefix}_{name}", getattr(data, name)
    if plane.path is not None:
        for name in ("path", "epochs", "distances", "explained"):
            yield f"{prefix}_{name}", getattr(plane, name)


def numbers_of(source: str, data: Landscape) -> dict:
    """Make the entry of one model in landscape.json."""
    return {
        "source": source,
        "loss": _finite(data.trained_loss),
        "accuracy": data.trained_accuracy,
        "hessian": data.hessian and {key: _finite(value) for key, value in dataclasses.asdict(data.hessian).items()},
        "epsilon": data.epsilon,
        "highest_loss_within": _finite(data.highest),
        "epsilon_sharpness_percent": _finite(data.epsilon_sharpness),
        "explained_variance": None if data.plane.explained is None else data.plane.explained.tolist(),
    }


def _finite(value: float) -> float | None:
    """Leave out infinity and NaN, which JSON does not have."""
    return value if np.isfinite(value) else None


def _tell(data: Landscape) -> None:
    print(
        f"{data.name}: loss {data.trained_loss:.4g}, epsilon-sharpness {data.epsilon_sharpness:.4g} % in the plane "
        f"(epsilon {data.epsilon:g})"
    )
    if (found := data.hessian) is not None:
        how = "" if found.converged else ", NOT converged: raise --hessian-iterations"
        print(
            f"{data.name}: largest eigenvalue of the Hessian {found.value:.4g} (residual {found.residual:.2g} after "
            f"{found.iterations} products{how})"
        )
