# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from analysis.landscape import planes, sharpness
from analysis.landscape.objective import Objective
from analysis.landscape.surface import Surface
from analysis.models import load_checkpoint

from .conftest import Quadratic, Weights, same, state_of, symmetric


@pytest.mark.parametrize(
    ("eigenvalues", "largest", "dominant"),
    [((9, 5, -3, 1), 9, 9), ((-9, 5, 1, -2), 5, -9), ((-4, -3, -2, -1), -1, -4), ((0, 0, 0, 0), 0, 0)],
)
def test_the_largest_eigenvalue_of_a_known_hessian(eigenvalues, largest, dominant):
    model = Weights((3,), (1,))
    before = state_of(model)
    hessian = symmetric(*eigenvalues)
    found = sharpness.largest_eigenvalue(model, Quadratic(model, hessian), tolerance=1e-6)
    assert found.converged
    assert found.value == pytest.approx(largest, abs=1e-5)
    assert found.dominant == pytest.approx(dominant, abs=1e-5)
    assert found.residual <= 1e-6 * max(map(abs, eigenvalues))
    vector = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(sharpness.hessian_product(model, Quadratic(model, hessian), vector), hessian @ vector)
    assert same(before, model)


def test_an_eigenvalue_that_has_not_converged_says_so():
    model = Weights((4,))
    objective = Quadratic(model, symmetric(9, 8.9, 1, 1))
    found = sharpness.largest_eigenvalue(model, objective, tolerance=1e-9, iterations=4)
    assert (found.converged, found.iterations, objective.calls) == (False, 4, 4)
    # An eigenvalue lies within the residual all the same.
    assert min(abs(found.value - each) for each in (9, 8.9, 1)) <= found.residual


def test_the_hessian_of_karat_is_what_finite_differences_say(karat):
    checkpoint = load_checkpoint(karat)
    model = checkpoint.model.double()
    objective = Objective(torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]), 2)
    vector = torch.randn_like(planes.flatten(model))
    product = vector @ sharpness.hessian_product(model, objective, vector)
    surface = Surface(copy.deepcopy(model), torch.stack([vector, vector]), objective)
    step = 1e-5
    (above, _), (here, _), (below, _) = (surface(a, 0.0) for a in (step, 0.0, -step))
    assert product.item() == pytest.approx((above - 2 * here + below) / step**2, rel=1e-3)
    logits = model(objective.pixels).logits
    assert here == pytest.approx(nn.functional.cross_entropy(logits, objective.labels).item(), rel=1e-12)
