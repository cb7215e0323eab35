# SPDX-License-Identifier: Apache-2.0
"""Sharpness of the loss at the trained weights: the largest eigenvalue of its Hessian."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from .objective import Objective, memory_errors
from .planes import trainable


@dataclass(kw_only=True)
class Eigenvalue:
    """
    The largest eigenvalue of a Hessian, and how well it was found.

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
    title: str = "Hessian",
) -> Eigenvalue:
    """
    Find the largest eigenvalue of the loss's Hessian in all weights, by power iteration with Hessian-vector products.

    Power iteration finds the eigenvalue of largest magnitude. Where that is negative, a second one, on H shifted by it,
    finds the largest.

    Args:
        model: at its trained weights, in evaluation mode, differentiable twice: KArAt heads by `eager`, since the
            derivatives of `karat_portable` and `karat_triton` are written out and have no derivatives themselves.
        tolerance: of the residual of each power iteration, relative to the largest magnitude.
        iterations: of each, at most so many.

    Memory: beside the model four vectors of its size, and what a backward pass through its backward pass keeps for one
    batch.
    """
    weights = list(trainable(model).values())
    generator = torch.Generator().manual_seed(0)
    start = torch.cat([torch.empty(p.shape, dtype=p.dtype).normal_(generator=generator).flatten() for p in weights])
    start = start.to(weights[0].device)
    with memory_errors(), tqdm(total=iterations, desc=title, unit="product", leave=False, delay=1) as bar:

        def apply(vector: torch.Tensor) -> torch.Tensor:
            bar.update()
            return hessian_product(model, objective, vector)

        value, residual, done, converged = _power(apply, start, 0.0, tolerance, iterations)
        dominant = value
        if dominant < 0:
            bar.total += iterations
            value, residual, more, converged = _power(apply, start, dominant, tolerance, iterations)
            done += more
    return Eigenvalue(value=value, dominant=dominant, residual=residual, iterations=done, converged=converged)


def hessian_product(model: nn.Module, objective: Objective, vector: torch.Tensor) -> torch.Tensor:
    """Multiply the Hessian of the loss with a vector, (P,), batch by batch."""
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
    """Iterate with H - shift: eigenvalue of H, residual, products, whether it converged."""
    vector, done = start / start.norm(), 0
    while True:
        product, done = apply(vector), done + 1
        value = (vector @ product).item()
        residual = (product - value * vector).norm().item()
        converged = residual <= tolerance * max(abs(value), abs(shift))
        if converged or done == iterations:
            return value, residual, done, converged
        product -= shift * vector
        vector = product / product.norm()
