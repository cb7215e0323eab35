# SPDX-License-Identifier: Apache-2.0
"""The loss at points of a plane through the trained weights, over several processes or devices; and how it curves."""

import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, MutableMapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from image_classification import checkpoints as saved
from image_classification.errors import InputError

from .planes import flatten, trainable


try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None


@dataclass
class Objective:
    """
    Mean cross-entropy of labelled images.

    Args:
        pixels: (B, 3, height, width), on the CPU.
        labels: class numbers, (B,), on the CPU.
        batch_size: images computed at once.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    batch_size: int = 8

    def parts(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
        """The shares of each batch in the loss (differentiable) and in the accuracy: they sum to both."""
        device = next(model.parameters()).device
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size)):
            logits, labels = model(pixels.to(device)).logits, labels.to(device)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / len(self.labels)
            yield loss, (logits.argmax(-1) == labels).sum().item() / len(self.labels)


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
    points: dict[str, tuple[float, float]],
    store: MutableMapping[str, dict],
    devices: list[torch.device],
    title: str = "Loss",
) -> None:
    """
    Compute the points of a plane that `store` lacks, each of which is stored at once.

    Args:
        model: at its trained weights; it is left alone.
        directions: (2, P).
        objective: of the loss.
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
        way = _here if len(devices) == 1 or len(missing) < 2 else _spread
        with contextlib.closing(way(model, directions, objective, missing, devices[: len(missing)])) as results:
            for key, (loss, accuracy) in results:
                store[key] = {"loss": loss, "accuracy": accuracy}
                bar.update()


Results = Generator[tuple[str, tuple[float, float]], None, None]


def _here(model, directions, objective, points, devices) -> Results:
    if not points:
        return
    threads = torch.get_num_threads()
    with _memory_errors(), contextlib.ExitStack() as stack:
        if devices[0].type == "cpu":
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        surface = Surface(copy.deepcopy(model).to(devices[0]), directions, objective)
        for key, point in points.items():
            yield key, surface(*point)


def _spread(model, directions, objective, points, devices) -> Results:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork.
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    with tempfile.TemporaryDirectory() as folder:
        # By a file, which all of them map: shared memory is short in containers, and open files are anywhere.
        handed = Path(folder) / "handed.pt"
        with saved.writing("What the workers read", handed.parent, "Set TMPDIR to a folder with more space."):
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


_surface: Surface | None = None


def _begin_worker(handed: str, devices) -> None:
    global _surface
    # Ctrl-C is the parent's to handle; should it be killed, nobody else would stop its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    device = devices.get()
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    model, directions, objective = torch.load(handed, map_location="cpu", mmap=True, weights_only=False)
    with _memory_errors():
        _surface = Surface(model.to(device), directions, objective)


def _end_with(sentinel) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(a: float, b: float) -> tuple[float, float]:
    with _memory_errors():
        return _surface(a, b)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device is out of memory ({str(error).splitlines()[0]}) What was computed is kept: give the same "
            "command again, with a smaller --batch-size."
        ) from error


@dataclass
class Eigenvalue:
    """
    Args:
        value: the largest eigenvalue of the loss's Hessian.
        dominant: the one of largest magnitude: the same, unless a negative one is larger.
        residual: |H v - value v| for its unit vector v; an eigenvalue of H lies no farther than that from `value`.
        iterations: Hessian-vector products that it took.
        converged: whether `residual` came below the tolerance.
    """

    value: float
    dominant: float
    residual: float
    iterations: int
    converged: bool


def largest_eigenvalue(
    model: nn.Module,
    objective: Objective,
    tolerance: float = 0.01,
    iterations: int = 100,
    seed: int = 0,
    title: str = "Hessian",
) -> Eigenvalue:
    """
    The largest eigenvalue of the Hessian of the loss in all weights, by power iteration with Hessian-vector products.

    Power iteration finds the eigenvalue of largest magnitude. Where that is negative, a second one, on H shifted by it,
    finds the largest.

    Args:
        model: at its trained weights, in evaluation mode, differentiable twice: KArAt heads by `eager`, since the
            derivatives of `karat_portable` and `karat_triton` are written out and have no derivatives themselves.
        objective: of the loss.
        tolerance: of the residual, relative to the largest magnitude.
        iterations: at most so many for each power iteration.
        seed: of the vector it begins with.

    Memory: beside the model four vectors of its size, and what a backward pass through its backward pass keeps for one
    batch.
    """
    weights = list(trainable(model).values())
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([torch.empty(p.shape, dtype=p.dtype).normal_(generator=generator).flatten() for p in weights])
    start = start.to(weights[0].device)
    with tqdm(total=iterations, desc=title, unit="product", leave=False, delay=1) as bar:

        def apply(vector: torch.Tensor) -> torch.Tensor:
            bar.update()
            return hessian_product(model, objective, vector)

        with _memory_errors():
            dominant, residual, done, converged = _power(apply, start, 0.0, tolerance, iterations)
            value = dominant
            if dominant < 0:
                bar.total += iterations
                value, residual, more, converged = _power(apply, start, dominant, tolerance, iterations)
                done += more
    return Eigenvalue(value, dominant, residual, done, converged)


def hessian_product(model: nn.Module, objective: Objective, vector: torch.Tensor) -> torch.Tensor:
    """The Hessian of the loss times a vector, (P,), batch by batch."""
    weights = list(trainable(model).values())
    pieces = [piece.view_as(p) for piece, p in zip(vector.split([p.numel() for p in weights]), weights)]
    product = torch.zeros_like(vector)
    for loss, _ in objective.parts(model):
        first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        # What the loss is linear in, or does not depend on, has no second derivative.
        curved = [(gradient, piece) for gradient, piece in zip(first, pieces) if gradient.requires_grad]
        if curved:
            gradients, along = zip(*curved)
            second = torch.autograd.grad(gradients, weights, along, materialize_grads=True)
            product += torch.cat([part.flatten() for part in second])
    return product


def _power(
    apply: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, shift: float, tolerance: float, iterations: int
) -> tuple[float, float, int, bool]:
    """Power iteration on H - shift: eigenvalue of H, residual, products, whether it converged."""
    vector = start / start.norm()
    for done in itertools.count(1):
        product = apply(vector)
        value = (vector @ product).item()
        residual = (product - value * vector).norm().item()
        converged = residual <= tolerance * max(abs(value), abs(shift))
        if converged or done == iterations:
            return value, residual, done, converged
        product -= shift * vector
        vector = product / product.norm()


_BEGINNING = '{"settings": {'


class Points(MutableMapping):
    """
    What was computed, in a file of JSON lines, the settings first: each entry is on the disk when it is set, and a
    command that was stopped goes on from there.

    Args:
        path: of the file.
        settings: what the numbers depend on.
        replace: whether a file of other settings is begun anew.

    Raises:
        InputError: the file is of other settings and not to be replaced, is none of these, or another process has it.
    """

    def __init__(self, path: Path, settings: dict, replace: bool = False):
        self.path, self.entries = path, {}
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+", encoding="utf-8")
        try:
            self._lock()
            self._read(settings, replace)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"Another process is computing {self.path}. Wait for it or stop it, or choose another --output."
            ) from error
        except OSError:
            pass  # A file system without locks.

    def _read(self, settings: dict, replace: bool) -> None:
        self.file.seek(0)
        try:
            # A process that was killed may have left half a line at the end.
            text = self.file.read()
            whole = text.rpartition("\n")[0]
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines and not _BEGINNING.startswith(text[: len(_BEGINNING)]):
                raise ValueError("no settings")
            found = lines[0]["settings"] if lines else None
            self.entries = {line.pop("key"): line for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged, or no file of this command ({error!r}). Move it away, or choose another "
                "--output."
            ) from error
        if found is not None and found != settings:
            different = [
                f"{key} {_short(found.get(key))} there and {_short(settings.get(key))} here"
                for key in dict.fromkeys([*found, *settings])
                if found.get(key) != settings.get(key)
            ]
            if not replace:
                raise InputError(
                    f"{self.path} holds points of other settings ({'; '.join(different)}). Choose another folder with "
                    "--output, or replace them with --overwrite."
                )
            found, self.entries = None, {}
        self.file.seek(0)
        if found is None:
            self.file.truncate()
            self._append({"settings": settings})
        else:
            self.file.truncate(len(f"{whole}\n".encode()))

    def _append(self, line: dict) -> None:
        with saved.writing("A line", self.path, "Free some space, then give the same command again: it goes on."):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def __getitem__(self, key: str) -> dict:
        return self.entries[key]

    def __setitem__(self, key: str, value: dict) -> None:
        self._append({"key": key, **value})
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("What was computed stays.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __enter__(self) -> "Points":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def _short(value) -> str:
    """A setting for a message; of a digest, enough to see that it differs."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:8]}..."
    return json.dumps(value)
