# SPDX-License-Identifier: Apache-2.0
"""The L1 projection: each row on the probability simplex."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modeling_karat_vit.karat_operator import project_on_simplex
from tests.modeling_karat_vit import oracle


def project(rows, keep=None) -> np.ndarray:
    keep = None if keep is None else torch.tensor(keep)
    return project_on_simplex(torch.tensor(rows, dtype=torch.float64), keep).numpy()


rows = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-100, 100))


@example(np.zeros(4))
@example(np.array([3.0, 3.0, -1.0]))
@example(np.array([2.0, 1.0]))
@example(np.array([1.0, 1.0, 0.5]))
@given(rows)
def test_the_threshold_is_the_one_that_bisection_finds(row):
    np.testing.assert_allclose(project(row), oracle.simplex(row), atol=1e-11)


@given(rows)
def test_the_result_is_a_distribution_and_stays_where_it_is(row):
    once = project(row)
    assert (once >= 0).all() and once.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(project(once), once, atol=1e-12)
    # Adding the same to all entries moves along the normal of the simplex.
    np.testing.assert_allclose(project(row + 7.0), once, atol=1e-11)
    # Order is kept, and equal entries stay equal.
    order = np.argsort(row)
    assert (np.diff(once[order]) >= -1e-13).all()


@given(rows, st.data())
def test_masked_entries_leave_before_the_projection(row, data):
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    projected = project(row, keep)
    assert (projected[~keep] == 0).all()
    if keep.any():
        np.testing.assert_allclose(projected[keep], project(row[keep]), atol=1e-12)
    # However large they are.
    np.testing.assert_array_equal(project(np.where(keep, row, 1e30), keep), projected)
    np.testing.assert_array_equal(project(np.where(keep, row, -1e30), keep), projected)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences(masked):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, False, True, True, True]) if masked else None
    assert torch.autograd.gradcheck(lambda x: project_on_simplex(x, keep), (rows,))
    # With the whole row in the support as well, and with a single entry in it.
    small = (0.01 * rows).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project_on_simplex(x, keep), (small,))
    single = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project_on_simplex, (single,))
    assert torch.autograd.gradcheck(project_on_simplex, (single.detach()[:, :1].requires_grad_(),))


def test_the_gradient_at_ties_is_finite_and_sums_to_zero():
    rows = torch.tensor([[3.0, 3.0, 3.0], [2.0, 1.0, 0.0]], requires_grad=True)
    (project_on_simplex(rows) * torch.tensor([1.0, 5.0, -2.0])).sum().backward()
    assert torch.isfinite(rows.grad).all()
    torch.testing.assert_close(rows.grad.sum(-1), torch.zeros(2))


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5, 1e6])
def test_large_rows_in_fp32_still_sum_to_one(offset):
    rows = torch.randn(50, 197, generator=torch.Generator().manual_seed(0)) + offset
    projected = project_on_simplex(rows)
    torch.testing.assert_close(projected.sum(-1), torch.ones(50), atol=1e-5, rtol=0)
    exact = project_on_simplex(rows.double())
    torch.testing.assert_close(projected.double(), exact, atol=1e-5, rtol=0)


def test_a_row_of_which_nothing_is_left_is_zero():
    rows = torch.randn(2, 4, requires_grad=True)
    keep = torch.tensor([[False] * 4, [True] * 4])
    projected = project_on_simplex(rows, keep)
    assert (projected[0] == 0).all() and projected[1].sum().item() == pytest.approx(1.0)
    projected.square().sum().backward()
    assert (rows.grad[0] == 0).all() and torch.isfinite(rows.grad).all()
