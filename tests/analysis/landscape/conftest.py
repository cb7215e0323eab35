# SPDX-License-Identifier: Apache-2.0
"""Models and losses whose surfaces are known."""

import numpy as np
import torch
from torch import nn

from analysis.landscape import planes
from analysis.landscape.planes import Plane
from analysis.landscape.sharpness import Eigenvalue
from analysis.landscape.surface import Landscape


CPU = torch.device("cpu")


class Weights(nn.Module):
    """Trainable tensors of given shapes, one that is frozen, and a buffer."""

    def __init__(self, *shapes, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weights = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.register_buffer("average", torch.ones(3, dtype=torch.float64))


class Quadratic:
    """w^T H w / 2 + g^T w in two batches, w from where the model was; the "accuracy" is w's first number."""

    def __init__(self, model, hessian, gradient=None):
        self.origin = planes.flatten(model)
        self.hessian = hessian
        self.gradient = torch.zeros(len(hessian), dtype=torch.float64) if gradient is None else gradient
        self.calls = 0

    def parts(self, model):
        self.calls += 1
        w = torch.cat([parameter.flatten() for parameter in planes.trainable(model).values()]) - self.origin
        yield 0.5 * w @ self.hessian @ w, w[0].item()
        yield self.gradient @ w, 0.0


def symmetric(*eigenvalues):
    torch.manual_seed(3)
    turn = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return turn @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ turn.mT


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, model):
    return all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def eigenvalue(value, converged=True):
    return Eigenvalue(value=value, dominant=value, residual=1.0, iterations=7, converged=converged)


def made(**fields):
    """A landscape x^2 + 10 y + 5 as far as the grid goes."""
    x, y = np.linspace(-2, 2, 9), np.linspace(0, 1, 5)
    loss = x**2 + 10 * y[:, None] + 5
    plane = Plane("random", "filter", torch.zeros(2, 3))
    values = {"loss": loss, "accuracy": 0 * loss, "trained_loss": 5.0, "trained_accuracy": 1.0}
    values |= {"epsilon": 0.5, "highest": 5.6, "hessian": eigenvalue(1234.5)}
    return Landscape(**{"name": "a", "kind": "karat", "plane": plane, "x": x, "y": y, **values, **fields})
