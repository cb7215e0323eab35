# SPDX-License-Identifier: Apache-2.0
"""The learnable scalar functions, held against their closed formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from modeling_karat_vit.basis import Start, make_edges
from modeling_karat_vit.portable import lean_features_of, lean_phi
from tests.modeling_karat_vit import oracle


START = Start(1.0, 0.0, slice(0, 1))
WAVELETS = ("mexican_hat", "morlet", "dog", "meyer", "shannon")
CASES = {
    **{f"fourier_{grid}": {"basis_type": "fourier", "grid_size": grid} for grid in (1, 3, 11)},
    **{
        f"spline_order_{order}_grid_{grid}": {
            "basis_type": "spline",
            "spline_order": order,
            "grid_size": grid,
            "grid_range": (low, high),
        }
        for order, grid, low, high in (
            (0, 5, -4, 4),
            (1, 3, -1.5, 2),
            (2, 4, -4, 4),
            (3, 3, -4, 4),
            (4, 1, -0.5, 3),
            (5, 11, -4, 4),
        )
    },
    **{kind: {"basis_type": "wavelet", "wavelet_type": kind} for kind in WAVELETS},
    **{
        f"rational_{m}_{n}": {"basis_type": "rational", "rational_order": (m, n)}
        for m, n in ((5, 4), (3, 0), (0, 2), (1, 1), (0, 0), (2, 5))
    },
}
WAYS = {"reference": lambda step, *args: step.activate(*args), "portable": lean_phi}
ways = pytest.mark.parametrize("phi", WAYS.values(), ids=WAYS.keys())
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
HEADS, OUT, IN = 2, 2, 4


def make_step(case: dict, in_features: int = IN, dtype: torch.dtype = torch.float64, **changes):
    """Two heads of Phi: R^in_features -> R^2, with parameters of no special value, and these as arrays."""
    config = oracle.make_config(**case, **changes)
    step = make_edges(config, HEADS, in_features, OUT, START).to(dtype)
    oracle.randomise(step)
    return config, step, {name: parameter.detach().double().numpy() for name, parameter in step.named_parameters()}


def inputs(low: float = -14.0, high: float = 14.0, rows: int = 12, in_features: int = IN) -> torch.Tensor:
    """Values (HEADS, rows, in_features) all over the range."""
    values = torch.linspace(low, high, HEADS * rows * in_features, dtype=torch.float64)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))].view(HEADS, rows, -1)


def expected_edges(config, arrays: dict, x: np.ndarray) -> np.ndarray:
    heads, rows, in_features = x.shape
    values = np.zeros((heads, rows, OUT, in_features))
    for h, t, p, q in np.ndindex(values.shape):
        values[h, t, p, q] = oracle.phi(config, arrays, h, p, q, x[h, t, q])
    return values


@cases
@pytest.mark.parametrize("reach", [2.0, 14.0])
def test_edges_follow_the_closed_formula(case, reach):
    """
    In the range of ordinary scores, where every wavelet lives, and far beyond the grid of the splines; and so do their
    sums, either way.
    """
    config, step, arrays = make_step(case, base_fn="silu")
    x = inputs(-reach, reach)
    expected = expected_edges(config, arrays, x.numpy())
    actual = step.edges(x.unsqueeze(-2), step(torch.float64)).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)
    for phi in WAYS.values():
        actual = phi(step, x, step(torch.float64)).detach().numpy()
        np.testing.assert_allclose(actual, expected.sum(-1), rtol=1e-9, atol=1e-10)


def test_a_zero_base_function_leaves_scale_base_out():
    _, step, _ = make_step(CASES["fourier_3"])
    x = inputs()
    expected = step.activate(x, step(torch.float64))
    with torch.no_grad():
        step.scale_base += 5.0
    assert torch.equal(step.activate(x, step(torch.float64)), expected)


@cases
def test_parameters_per_edge(case):
    """The table of the paper: 2G, G + k, 3 and m + 1 + n, and two scales."""
    config, step, _ = make_step(case)
    count = {
        "fourier": 2 * config.grid_size,
        "spline": config.grid_size + config.spline_order,
        "wavelet": 3,
        "rational": sum(config.rational_order) + 1,
    }[config.basis_type]
    assert sum(parameter.numel() for parameter in step.parameters()) == HEADS * OUT * IN * (count + 2)


def lean_basis(step, x):
    """The basis and its derivatives, (K, ...) in fp64, put together from the features of the portable path."""
    lean, count = lean_features_of(step), len(step.features(x))
    stack = lean.stack(torch.eye(count, dtype=torch.float64).view(1, count, count, 1))
    features, derivatives = lean.features_and_derivatives(x)

    def combine(weights, values):
        values = torch.stack([*values, torch.zeros_like(x)]).double()  # constant functions have no derivatives
        return torch.einsum("kp,k...->p...", weights[0, ..., 0], values[:-1])

    return combine(stack, features), combine(lean.derivative_coefficients(stack), derivatives)


# ---------------------------------------------------------------------------------------------------------- splines


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize(("grid", "low", "high"), [(1, -4.0, 4.0), (3, -1.5, 2.0), (7, 0.0, 1.0)])
def test_splines_and_their_derivatives_are_those_of_scipy(order, grid, low, high):
    config, step, _ = make_step(
        {"basis_type": "spline", "spline_order": order, "grid_size": grid, "grid_range": (low, high)}
    )
    # Never on a knot, where splines of order 0 jump.
    x = np.linspace(low, high, 101)[1:-1] + 1e-5
    features, derivatives = lean_basis(step, torch.from_numpy(x))
    assert len(features) == len(derivatives) == grid + order
    for actual in (features, step.features(torch.from_numpy(x))):
        for index, feature in enumerate(actual):
            spline = BSpline(oracle.knots(config), np.eye(grid + order)[index], order)
            np.testing.assert_allclose(feature, spline(x), atol=1e-12)
    for index, derivative in enumerate(derivatives):
        spline = BSpline(oracle.knots(config), np.eye(grid + order)[index], order)
        expected = spline.derivative()(x) if order > 0 else np.zeros_like(x)
        np.testing.assert_allclose(derivative, expected, atol=1e-10)
    np.testing.assert_allclose(sum(features), 1.0, atol=1e-12)


@pytest.mark.parametrize("order", range(6))
def test_splines_fade_to_zero_beyond_their_range(order):
    config, step, _ = make_step({"basis_type": "spline", "spline_order": order, "grid_size": 4, "grid_range": (-1, 1)})
    first, last = oracle.knots(config)[[0, -1]]
    outside = torch.tensor([first - 100.0, first - 1e-6, last + 1e-6, last + 100.0], dtype=torch.float64)
    features, derivatives = lean_features_of(step).features_and_derivatives(outside)
    assert all((x == 0).all() for x in (*features, *derivatives))
    if order > 0:
        just_beyond = torch.tensor([-1.01, 1.01], dtype=torch.float64)
        assert (sum(step.features(just_beyond)) > 0.1).all()


# --------------------------------------------------------------------------------------------------------- wavelets


@pytest.mark.parametrize("in_features", [1, 2, 7])
def test_shannons_window_lies_along_the_inputs(in_features):
    _, step, _ = make_step(CASES["shannon"], in_features)
    with torch.no_grad():
        step.amplitude.fill_(1.0), step.translation.zero_(), step.width.fill_(1.0)
        step.scale_basis.fill_(1.0)
    at_zero = step.edges(torch.zeros(HEADS, 3, 1, in_features, dtype=torch.float64), step(torch.float64))
    expected = np.broadcast_to(np.hamming(in_features), (HEADS, 3, OUT, in_features))
    np.testing.assert_allclose(at_zero.detach().numpy(), expected, atol=1e-14)


def mother(kind: str, x: torch.Tensor) -> torch.Tensor:
    """psi(x), without a window."""
    _, step, _ = make_step({"basis_type": "wavelet", "wavelet_type": kind})
    return step.mother(x.unsqueeze(-1)).squeeze(-1)


def test_meyer_in_its_three_pieces():
    def psi(*x):
        return mother("meyer", torch.tensor(x, dtype=torch.float64)).tolist()

    # m = 1: a plain sine of |x|.
    assert psi(0.0, 0.25, 0.5, -0.25) == pytest.approx([0.0, math.sqrt(0.5), 1.0, math.sqrt(0.5)])
    # nu(1/2) = 1/2: in the middle of its slope, m is cos(pi/4).
    assert psi(0.75, -0.75) == pytest.approx([0.5, 0.5])
    assert psi(1.0, -1.0, 1.5, 37.0, -1e6) == [0.0] * 5
    # No jumps where the pieces meet.
    eps = 1e-9
    assert psi(0.5 - eps, 1 - eps) == pytest.approx(psi(0.5 + eps, 1 + eps), abs=1e-7)


def test_sinc_and_its_derivative_are_exact_near_zero():
    """Scores are near zero when training starts: there (x cos x - sin x) / x^2 is nothing but rounding."""
    x = torch.cat([torch.logspace(-12, 0.5, 200, dtype=torch.float64), torch.tensor([0.0, 0.25 - 1e-12, 0.25 + 1e-12])])
    x = torch.cat([x, -x])
    # From the power series, which is exact everywhere here.
    value = sum((-1) ** k * x ** (2 * k) / float(math.factorial(2 * k + 1)) for k in range(20))
    slope = sum((-1) ** k * 2 * k * x ** (2 * k - 1) / float(math.factorial(2 * k + 1)) for k in range(1, 20))
    for dtype, tolerance in ((torch.float64, 2e-14), (torch.float32, 1e-5)):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        actual = mother("shannon", leaf)
        actual.sum().backward()
        torch.testing.assert_close(actual.detach().double(), value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(leaf.grad.double(), slope, rtol=tolerance, atol=1e-30 + tolerance / 100)


# -------------------------------------------------------------------------------------------- gradients and numerics


@pytest.mark.parametrize("grid", [2, 3, 11, 32])
def test_harmonics_by_recurrence_are_accurate(grid):
    """In fp32 the recurrence is about as close to the true values as cos(m x) itself, at every G."""
    _, step, _ = make_step({"basis_type": "fourier", "grid_size": grid})
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    exact = torch.stack(step.features(x.double()))
    lean, derivatives = lean_basis(step, x)
    assert (lean - exact).norm() < 1e-5 * exact.norm()
    assert (lean - exact).abs().max() < 2e-7 * grid**2 + 1e-6
    leaf = x.double().requires_grad_()
    for feature, derivative in zip(step.features(leaf), derivatives):
        (expected,) = torch.autograd.grad(feature.sum(), leaf)
        assert (derivative - expected).norm() < 1e-5 * grid * expected.norm()


@cases
@ways
def test_strong_scores_stay_finite(case, phi):
    """In value and gradient: branches that are not taken must not leak infinities."""
    _, step, _ = make_step(case, dtype=torch.float32)
    x = torch.tensor([0.0, 1e-30, 1.0, -1.0, 0.5, 30.0, -1e3, 1e4] * HEADS * 2).view(HEADS, -1, IN).requires_grad_()
    y = phi(step, x, step(torch.float32))
    gradients = torch.autograd.grad(y.square().mean(), [x, *step.parameters()], allow_unused=True)
    assert torch.isfinite(y).all()
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
