# SPDX-License-Identifier: Apache-2.0
"""
Planes through the trained weights: along the path of a training run, or along random directions (Li et al. 2018,
"Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913).

Weights are the P trainable numbers of a model in the order of `named_parameters`, as one vector. Buffers and frozen
parameters have no part in it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from image_classification.errors import InputError
from image_classification.runs import checkpoints


NORMALISE = ("none", "tensor", "filter")
# Numbers of all moments together that are in memory at once while a path is read.
_READ_AT_ONCE = 2**23
# The rows `[part]` of a parameter at one moment of a run.
Reader = Callable[[str, slice], torch.Tensor]


@dataclass
class Plane:
    """
    The weights at (a, b) are the trained ones + a * directions[0] + b * directions[1].

    Args:
        kind: `"pca"` or `"random"`.
        normalise: one of `NORMALISE`.
        directions: (2, P), in the dtype of the weights, on the CPU. Unit vectors where not normalised.
        path: coordinates of M moments of the run, (M, 2): the point of the plane that is nearest; `None` for random.
        epochs: of those moments, (M,), where known.
        distances: of those moments from the trained weights, (M,), in the plane or not.
        explained: share of the path's variance along each direction, (2,), from 0 to 1.
        digest: SHA-256 of the path's weights; `None` for random.
    """

    kind: str
    normalise: str
    directions: torch.Tensor
    path: np.ndarray | None = None
    epochs: np.ndarray | None = None
    distances: np.ndarray | None = None
    explained: np.ndarray | None = None
    digest: str | None = None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that make up the weights, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flatten(model: nn.Module) -> torch.Tensor:
    """Copy the weights into one vector, (P,), on the model's device."""
    return torch.cat([parameter.detach().flatten() for parameter in trainable(model).values()])


def digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Compute the SHA-256 of tensors and their names, in this order."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def random_plane(model: nn.Module, seed: int = 0, normalise: str = "filter") -> Plane:
    """
    Draw two Gaussian directions, normalised as `normalised` does.

    Args:
        normalise: `"filter"` or `"tensor"`; without, the directions would have no scale.
    """
    if normalise == "none":
        raise InputError("Random directions have a scale by `--normalise` filter or tensor only, and it is none.")
    weights = trainable(model)
    generator = torch.Generator().manual_seed(seed)
    size = sum(parameter.numel() for parameter in weights.values())
    dtype = next(iter(weights.values())).dtype
    directions = torch.empty(2, size, dtype=dtype).normal_(generator=generator)
    return Plane("random", normalise, normalised(directions, model, normalise))


def path_plane(model: nn.Module, readers: list[Reader], normalise: str = "none") -> Plane:
    """
    Find the two principal directions of a run's path: those of the differences of its moments from the trained weights,
    centred (Li et al. 2018, section 7). Their signs are such that the path begins at positive coordinates.

    With `normalise`, each direction is rescaled as `normalised` does, and is then no longer exactly principal.

    Args:
        model: the trained model, (0, 0) of the plane.
        readers: one for each of the M >= 3 moments, in order.

    Raises:
        InputError: there are too few moments, or they lie on a line.

    Memory: beside the model the two directions, and a fixed budget in which all moments are read piece by piece.
    """
    if len(readers) < 3:
        raise InputError(f"Principal directions need 3 moments of a run or more, and there are {len(readers)}.")
    count = len(readers)
    gram, found = torch.zeros(count, count, dtype=torch.float64), hashlib.sha256()
    for _, moved in _displacements(model, readers):
        gram += moved @ moved.mT
        found.update(moved.contiguous().numpy().data)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count
    # The Gram matrix has the same eigenvalues as the P x P covariance, which would not fit anywhere.
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    total, (second, first) = values.clamp_min(0).sum(), values[-2:].tolist()
    if second <= 1e-10 * first or first <= 0:
        raise InputError(
            "The weights did not move in two dimensions between the moments of the run (was its learning rate 0?), so "
            "that it has no two principal directions. Choose `--directions random`."
        )
    mix = (centring @ vectors[:, [-1, -2]] / values[[-1, -2]].sqrt()).mT
    weights = trainable(model)
    directions = torch.empty(2, flatten(model).numel(), dtype=next(iter(weights.values())).dtype)
    for part, moved in _displacements(model, readers):
        directions[:, part] = (mix @ moved).to(directions.dtype)
    directions = normalised(directions, model, normalise)
    dots = torch.zeros(count, 2, dtype=torch.float64)
    for part, moved in _displacements(model, readers):
        dots += moved @ directions[:, part].double().mT
    sign = torch.where(dots[0] < 0, -1.0, 1.0).double()
    directions *= sign[:, None].to(directions.dtype)
    dots *= sign
    inner = products(directions)
    along = centring @ dots / inner.diagonal().sqrt()
    return Plane(
        "pca",
        normalise,
        directions,
        path=torch.linalg.solve(inner, dots.mT).mT.numpy(),
        distances=gram.diagonal().sqrt().numpy(),
        explained=(along.square().sum(0) / total).numpy(),
        digest=found.hexdigest(),
    )


def extent(planes: list[Plane], size: int, radius: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    Choose a grid for planes that are to be seen side by side, `size` by `size`: `radius` to each side; by default 1, or
    for principal directions around all paths and the trained weights, with a quarter of their extent to each side.
    """
    paths = [plane.path for plane in planes if plane.path is not None]
    if radius is not None or not paths:
        radius = 1.0 if radius is None else radius
        side = np.linspace(-radius, radius, size)
        return side, side.copy()
    points = np.concatenate([*paths, np.zeros((1, 2))])
    low, high = points.min(0), points.max(0)
    margin = (high - low) / 4
    x, y = np.linspace(low - margin, high + margin, size, axis=1)
    return x, y


def products(directions: torch.Tensor) -> torch.Tensor:
    """Multiply two directions with each other, (2, 2), in fp64."""
    wide = directions.double()
    return wide @ wide.mT


def normalised(directions: torch.Tensor, model: nn.Module, how: str) -> torch.Tensor:
    """
    Rescale directions, in place, so that each part of them has the norm of the same part of the weights; parameters
    of one dimension (biases, norms) become 0. So the plane does not show how large a layer's weights happen to be.

    Args:
        directions: (2, P).
        how: `"tensor"`: the parts are the parameters. `"filter"`: they are what feeds one unit: a filter of a
            convolution, a row of a linear layer, a token of an embedding, and of KArAt's operator the functions (or
            row of W) that make up one output of one head. `"none"`: nothing is done.
    """
    if how == "none":
        return directions
    karat: set[str] = getattr(model, "karat_parameter_names", set)()
    offset = 0
    for name, parameter in trainable(model).items():
        for direction in directions:
            part = direction[offset : offset + parameter.numel()].view(parameter.shape)
            if parameter.ndim < 2:
                part.zero_()
                continue
            axes = unit_axes(parameter, name in karat) if how == "filter" else tuple(range(parameter.ndim))
            own, wanted = (
                torch.linalg.vector_norm(of, dim=axes, keepdim=True) for of in (part, parameter.detach().cpu())
            )
            part *= torch.where(own > 0, wanted / own, 0)
        offset += parameter.numel()
    return directions


def unit_axes(parameter: torch.Tensor, karat: bool) -> tuple[int, ...]:
    """Find the axes of a parameter that run through one filter, for `normalised`."""
    # KArAt's are (heads, ..., outputs, inputs), and embeddings (1, tokens, size).
    units = {0, parameter.ndim - 2} if karat or parameter.ndim == 3 else {0}
    return tuple(axis for axis in range(parameter.ndim) if axis not in units)


def reader_of(weights: dict[str, torch.Tensor]) -> Reader:
    """Make a reader of weights that are in memory."""
    return lambda name, part: weights[name][part].detach()


def file_reader(folder: Path) -> Reader:
    """
    Make a reader of the weights of a checkpoint-* folder, of which only the piece that is asked for comes into memory.

    Raises:
        InputError: (when it is called) the checkpoint is damaged, or lacks the parameter.
    """
    index = folder / checkpoints.WEIGHTS_INDEX
    if index.is_file():
        checkpoints.weight_files(folder)  # Refuses a list that is damaged.
        files = checkpoints.read_json(index)["weight_map"]
    else:
        files = {}
    opened: dict[str, Any] = {}

    def read(name: str, part: slice) -> torch.Tensor:
        file = files.get(name, checkpoints.WEIGHTS)
        try:
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="pt")
            return opened[file].get_slice(name)[part]
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{folder / file}: {name} cannot be read ({error}). The checkpoint is damaged or of another model."
            ) from error

    return read


def _displacements(model: nn.Module, readers: list[Reader]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Read piece by piece how far the moments are from the trained weights: a slice of these, and (M, n) in fp64."""
    offset = 0
    for name, parameter in trainable(model).items():
        size = parameter[0].numel()
        rows = max(1, _READ_AT_ONCE // (size * len(readers)))
        for start in range(0, len(parameter), rows):
            part = slice(start, start + rows)
            here = parameter[part].detach().cpu()
            moved = torch.stack([_checked(read(name, part), here, name).double().flatten() for read in readers])
            yield slice(offset, offset + here.numel()), moved - here.double().flatten()
            offset += here.numel()


def _checked(piece: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    if piece.shape != like.shape:
        raise InputError(
            f"A moment of the run has another shape of {name} than its trained weights: {tuple(piece.shape)} beside "
            f"{tuple(like.shape)}."
        )
    return piece
