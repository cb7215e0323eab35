# SPDX-License-Identifier: Apache-2.0
"""The loss at points of a plane through the trained weights, over several processes or devices."""

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Generator, MutableMapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import nn
from tqdm.auto import tqdm

from image_classification.errors import InputError
from image_classification.runs import checkpoints

from ..models import Checkpoint, use_default_attention
from .objective import Objective, memory_errors
from .planes import Plane, flatten, trainable
from .sharpness import Eigenvalue, largest_eigenvalue


Coordinates = dict[str, tuple[float, float]]
# Keys of points, and loss and accuracy there.
Results = Generator[tuple[str, tuple[float, float]], None, None]

# Where the epsilon-sharpness looks, times epsilon, along each direction.
_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(kw_only=True)
class Landscape:
    """
    The landscape of one model; the grid has C columns and R rows.

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
        """The highest rise within the square, 100 (max L - L0) / (1 + L0), in per cent."""
        return 100 * (self.highest - self.trained_loss) / (1 + self.trained_loss)

    def height(self, points: np.ndarray) -> np.ndarray:
        """Interpolate the loss linearly at points of the plane, (M, 2), which gives (M,), NaN outside the grid."""
        return RegularGridInterpolator((self.y, self.x), self.loss, bounds_error=False)(points[:, ::-1])


def compute(
    checkpoint: Checkpoint,
    objective: Objective,
    plane: Plane,
    grid: tuple[np.ndarray, np.ndarray],
    epsilon: float,
    *,
    stopping: tuple[float, int] | None,
    devices: list[torch.device] | None = None,
    store: MutableMapping[str, dict] | None = None,
    prefix: str = "model",
) -> Landscape:
    """
    Compute the loss on a grid of a plane, and how sharp it is at the trained weights.

    Args:
        checkpoint: the model; it is left as it is.
        objective: labelled images.
        plane: through its weights.
        grid: coordinates along both directions, (C,), (R,).
        epsilon: of the epsilon-sharpness, in the units of the grid.
        stopping: tolerance and iterations of `largest_eigenvalue`; `None` leaves the Hessian out.
        devices: one for each process that computes; default the model's, by this process.
        store: keeps each number as soon as it is there, and is asked for it first (`Points` is a file).
        prefix: of its keys.
    """
    devices = devices or [checkpoint.model.device]
    store = {} if store is None else store
    x, y = (np.asarray(side, dtype=float) for side in grid)
    on_grid = {
        f"{prefix}/{row}/{column}": (a, b) for row, b in enumerate(y.tolist()) for column, a in enumerate(x.tolist())
    }
    square = {
        f"{prefix}/square {epsilon!r}/{a:g}/{b:g}": (a * epsilon, b * epsilon) for a in _STEPS for b in _STEPS if a or b
    }
    points = {f"{prefix}/trained": (0.0, 0.0)} | square | on_grid
    model = use_default_attention(dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model)))
    evaluate(model, plane.directions, objective, points, store, devices, f"Loss of {checkpoint.name}")
    hessian = None
    if stopping is not None:
        key = f"{prefix}/hessian {stopping[0]!r} {stopping[1]}"
        if key not in store:
            # The kernels and the portable path have no second derivatives.
            model.set_attn_implementation("eager")
            title = f"Hessian of {checkpoint.name}"
            store[key] = dataclasses.asdict(largest_eigenvalue(model.to(devices[0]), objective, *stopping, title=title))
        hessian = Eigenvalue(**store[key])

    def values(name: str) -> np.ndarray:
        return np.array([store[key][name] for key in on_grid], dtype=float).reshape(len(y), len(x))

    trained = store[f"{prefix}/trained"]
    return Landscape(
        name=checkpoint.name,
        kind=checkpoint.kind,
        plane=plane,
        x=x,
        y=y,
        loss=values("loss"),
        accuracy=values("accuracy"),
        trained_loss=trained["loss"],
        trained_accuracy=trained["accuracy"],
        epsilon=epsilon,
        # A NaN among them is no maximum of anything, and stays.
        highest=float(np.max([trained["loss"], *(store[key]["loss"] for key in square)])),
        hessian=hessian,
    )


class Surface:
    """
    The loss over a plane: `surface(a, b)` gives loss and accuracy at the trained weights + a, b times the directions.

    Args:
        model: at its trained weights, in evaluation mode. It is moved about: give a copy.
        directions: (2, P).
        objective: an `Objective`, or what has its `parts`.
    """

    def __init__(self, model: nn.Module, directions: torch.Tensor, objective: Objective):
        self.model, self.objective = model, objective
        self.trained = flatten(model)
        self.directions = directions.to(self.trained.device)

    @torch.no_grad()
    def __call__(self, a: float, b: float) -> tuple[float, float]:
        first, second = self.directions
        weights, offset = torch.add(a * first, second, alpha=b).add_(self.trained), 0
        for parameter in trainable(self.model).values():
            parameter.copy_(weights[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()
        loss = accuracy = 0.0
        for part, right in self.objective.parts(self.model):
            loss, accuracy = loss + part.item(), accuracy + right
        return loss, accuracy


def evaluate(
    model: nn.Module,
    directions: torch.Tensor,
    objective: Objective,
    points: Coordinates,
    store: MutableMapping[str, dict],
    devices: list[torch.device],
    title: str = "Loss",
) -> None:
    """
    Compute the points of a plane that `store` lacks, each of which is stored at once.

    Args:
        model: at its trained weights; it is left alone.
        directions: (2, P).
        points: coordinates by key.
        store: gets `{"loss": ..., "accuracy": ...}` by key. Loss may be infinite or NaN far from the trained weights.
        devices: one for each process. A single one is used by this process. On the CPU each computes in one thread,
            so that every number is the same for any number of them.
        title: of the progress bar.

    Raises:
        InputError: a process died, or a device is out of memory.

    Memory: on each device (CPU processes share the directions) two copies of the weights and the two directions.
    """
    missing = {key: point for key, point in points.items() if key not in store}
    with tqdm(total=len(points), initial=len(points) - len(missing), desc=title, unit="point", leave=False) as bar:
        compute_all = _compute_here if len(devices) == 1 or len(missing) < 2 else _compute_in_processes
        results = compute_all(model, directions, objective, missing, devices[: len(missing)])
        with contextlib.closing(results):
            for key, (loss, accuracy) in results:
                store[key] = {"loss": loss, "accuracy": accuracy}
                bar.update()


def _compute_here(
    model: nn.Module, directions: torch.Tensor, objective: Objective, points: Coordinates, devices: list[torch.device]
) -> Results:
    if not points:
        return
    threads = torch.get_num_threads()
    with memory_errors(), contextlib.ExitStack() as stack:
        if devices[0].type == "cpu":
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        surface = Surface(copy.deepcopy(model).to(devices[0]), directions, objective)
        for key, point in points.items():
            yield key, surface(*point)


def _compute_in_processes(
    model: nn.Module, directions: torch.Tensor, objective: Objective, points: Coordinates, devices: list[torch.device]
) -> Results:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork.
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    with tempfile.TemporaryDirectory() as folder:
        # By a file, which all of them map: shared memory is short in containers, and open files are anywhere.
        handed = Path(folder) / "handed.pt"
        with checkpoints.writing("What the workers read", handed.parent, "Set TMPDIR to a folder with more space."):
            torch.save((copy.deepcopy(model).cpu(), directions, objective), handed)
        pool = ProcessPoolExecutor(len(devices), context, _begin_worker, (str(handed), queue))
        try:
            futures = {pool.submit(_work, *point): key for key, point in points.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "A worker process died; a computer out of memory kills the largest. What was computed is kept: give "
                "the same command again, with fewer --workers or a smaller --batch-size."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_surface: Surface  # Of a worker process.


def _begin_worker(handed: str, devices) -> None:
    global _surface
    # Ctrl-C is the parent's to handle; should it be killed, nobody else would stop its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    device = devices.get()
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    model, directions, objective = torch.load(handed, map_location="cpu", mmap=True, weights_only=False)
    with memory_errors():
        _surface = Surface(model.to(device), directions, objective)


def _end_with(sentinel) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(a: float, b: float) -> tuple[float, float]:
    with memory_errors():
        return _surface(a, b)
