# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from analysis.landscape import planes, surface
from analysis.landscape.objective import Objective
from analysis.models import load_checkpoint

from .conftest import CPU, Quadratic, Weights, made, same, state_of, symmetric


def test_the_surface_of_a_quadratic():
    model = Weights((2, 2), (2,))
    before = state_of(model)
    gradient = torch.arange(6, dtype=torch.float64)
    objective = Quadratic(model, symmetric(1, 2, 3, 4, 5, 6), gradient)
    directions = torch.randn(2, 6, dtype=torch.float64)
    points = {f"{a} {b}": (a, b) for a in (-2.0, 0.0, 0.5) for b in (-1.0, 0.0, 3.0)}
    store = {"0.5 3.0": {"loss": 7.0, "accuracy": 7.0}}
    surface.evaluate(model, directions, objective, points, store, [CPU])
    assert objective.calls == len(points) - 1  # what is stored is not computed again
    assert store.pop("0.5 3.0")["loss"] == 7
    for key, found in store.items():
        a, b = points[key]
        w = a * directions[0] + b * directions[1]
        assert found["loss"] == pytest.approx((0.5 * w @ objective.hessian @ w + gradient @ w).item(), abs=1e-12)
        assert found["accuracy"] == pytest.approx(w[0].item(), abs=1e-12)
    assert store["0.0 0.0"]["loss"] == 0
    assert same(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heights_between_the_points_of_the_grid():
    data = made(loss=np.add.outer(10 * np.linspace(0, 1, 5), 2 * np.linspace(-2, 2, 9)))
    points = np.array([[0.3, 0.7], [-2, 0], [2, 1], [1.99, 0.01], [2.1, 0.5], [0, -0.1]])
    expected = [7.6, -4, 14, 4.08, np.nan, np.nan]
    np.testing.assert_allclose(data.height(points), expected)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_model_is_left_as_it_is_also_after_an_error(karat, two_threads):
    checkpoint = load_checkpoint(karat)
    before, implementation = state_of(checkpoint.model), checkpoint.model.config._attn_implementation
    plane = planes.random_plane(checkpoint.model)
    grid = np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.0, 1.0])
    objective = Objective(torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 0]))
    store = {}
    data = surface.compute(checkpoint, objective, plane, grid, 0.1, stopping=(0.01, 2), store=store)
    assert data.highest >= data.trained_loss == data.loss[1, 1]
    assert data.highest == max([data.trained_loss] + [store[key]["loss"] for key in store if "square" in key])
    assert sum("square" in key for key in store) == 24
    broken = Objective(objective.pixels, torch.tensor([0, 1, 2, 99]))
    with pytest.raises((IndexError, RuntimeError)):
        surface.compute(checkpoint, broken, plane, grid, 0.1, stopping=None)
    assert same(before, checkpoint.model)
    assert not checkpoint.model.training
    assert checkpoint.model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert torch.get_num_threads() == 2
