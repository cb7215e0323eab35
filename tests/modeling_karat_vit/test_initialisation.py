# SPDX-License-Identifier: Apache-2.0
"""Where training starts: the paper's N(0, 1), and the scaled start that keeps the variance of attention."""

import math

import pytest
import torch
from scipy import stats

from modeling_karat_vit import KArAtViTModel
from modeling_karat_vit.karat_operator import KArAtOperator
from tests.modeling_karat_vit import oracle


TOKENS = 50


def fresh(tokens: int = TOKENS, heads: int = 8, seed: int = 0, **changes) -> KArAtOperator:
    """An operator as a new model has it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": heads, "karat_rank": 12}
    model = KArAtViTModel(oracle.make_config(tokens, heads, **{**sizes, **changes}), add_pooling_layer=False)
    return model.layers[0].attention.operator


def assert_normal(values: torch.Tensor, std: float, mean: float = 0.0):
    """Whether a sample is N(mean, std^2), by Kolmogorov and Smirnov's test."""
    sample = ((values.detach().double().flatten() - mean) / std).numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert sample.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * sample.size))


# ---------------------------------------------------------------------------------------------------- the paper's start


def test_normal_is_n_0_1(form):
    operator = fresh(karat_init="normal", base_fn="silu", **form)
    for name, parameter in operator.named_parameters():
        if name.endswith(("scale_base", "scale_basis", "width")):
            assert (parameter == 1).all(), name
        elif name.endswith("translation"):
            assert (parameter == 0).all(), name
        elif name == "projector":
            assert_normal(parameter, 0.02)
        else:
            assert_normal(parameter, 1.0)


# ----------------------------------------------------------------------------------------------------- the scaled start


@pytest.mark.parametrize("grid", [1, 3, 5])
@pytest.mark.parametrize("tokens", [50, 197])
def test_scaled_fourier_is_exactly_what_was_measured(grid, tokens):
    """a_m, b_m ~ N(0, 1) / (m^2 sqrt(N G)); W truncated normal 0.02; 1/N added to a_1 and W of component 0."""
    operator = fresh(tokens=tokens, grid_size=grid)
    step = operator.edges[0]
    assert step.cos_coef.shape == step.sin_coef.shape == (8, grid, 12, tokens)
    assert operator.projector.shape == (8, tokens, 12)
    cos, sin, projector = (x.detach().clone() for x in (step.cos_coef, step.sin_coef, operator.projector))
    cos[:, 0, 0] -= 1 / tokens
    projector[..., 0] -= 1 / tokens
    for m in range(1, grid + 1):
        std = 1 / (m**2 * math.sqrt(tokens * grid))
        for coefficients in (cos, sin):
            assert_normal(coefficients[:, m - 1], std)
            # The component that starts as the mean has its noise as well, and no other has its mean.
            assert_normal(coefficients[:, m - 1, 0], std)
            assert_normal(coefficients[:, m - 1, 1], std)
    assert_normal(projector, 0.02)
    assert_normal(projector[..., 0], 0.02)
    assert (step.scale_basis == 1).all()


def phi_at_zero(operator: KArAtOperator, step: int = 0) -> torch.Tensor:
    """phi_pq(0), (h, P, Q)."""
    edges = operator.edges[step]
    zeros = torch.zeros(edges.heads, 1, 1, edges.in_features)
    return edges.edges(zeros, edges(torch.float32))[:, 0].detach()


def assert_mean(values: torch.Tensor, mean: float):
    """Within four standard errors, measured on the values themselves."""
    values = values.double().flatten()
    assert abs(values.mean().item() - mean) <= 4 * values.std().item() / len(values) ** 0.5 + 1e-9


def test_one_component_starts_as_the_mean(basis):
    """phi(0) = 1/N for every input of component 0, beside noise; the others have the noise alone."""
    operator = fresh(heads=64, **basis)
    values = phi_at_zero(operator)
    assert values[:, 0].std() < 0.5  # so that the test can tell 1/N from 0
    assert 4 * values[:, 0].std() / values[:, 0].numel() ** 0.5 < 0.7 / TOKENS
    assert_mean(values[:, 0], 1 / TOKENS)
    for component in range(1, 12):
        assert_mean(values[:, component], 0.0)
    assert_mean(operator.projector[..., 0].detach(), 1 / TOKENS)
    assert_mean(operator.projector[..., 1:].detach(), 0.0)


@pytest.mark.parametrize("kind", ["mexican_hat", "morlet", "dog", "meyer", "shannon"])
def test_the_mean_component_of_a_wavelet_starts_at_a_peak(kind):
    """DOG and Meyer are zero at zero: there it is tau that brings the peak to score 0."""
    step = fresh(basis_type="wavelet", wavelet_type=kind).edges[0]
    scores = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for p, moved in ((0, kind in ("dog", "meyer")), (1, False)):
        translation = step.translation[:, p].detach()
        assert (translation != 0).all() if moved else (translation == 0).all()
        psi = step.mother(((scores - translation[0, 0].item()) / step.width[0, p, 0].item()).unsqueeze(-1)).abs()
        at_zero = psi[len(scores) // 2]
        if p == 0:
            assert at_zero == pytest.approx(psi.max().item(), rel=1e-6)
    assert (step.width == 1).all()


def test_every_edge_keeps_the_variance(basis):
    """Scores of unit variance: Phi(s) of unit variance or somewhat less, whatever the basis."""
    step = fresh(tokens=197, **basis).edges[0]
    scores = torch.randn(8, 64, 197, generator=torch.Generator().manual_seed(0))
    spread = step.activate(scores, step(torch.float32))[..., 1:].std()
    assert 0.3 < spread < 1.3


def start_of(operator: KArAtOperator) -> tuple[torch.Tensor, torch.Tensor]:
    """N times the row at zero scores, averaged within each head; and the output for random scores and values."""
    tokens = operator.config.num_tokens
    generator = torch.Generator().manual_seed(0)
    heads = operator.edges[0].heads
    with torch.no_grad():
        tensors = operator.tensors(torch.float32)
        row = operator.activate(torch.zeros(1, heads, 1, tokens), tensors)[0, :, 0]
        scores = torch.randn(1, heads, 32, tokens, generator=generator)
        value = torch.randn(1, heads, tokens, 8, generator=generator)
        return row.mean(-1) * tokens, operator.activate(scores, tensors) @ value


@pytest.mark.parametrize("base_fn", ["zero", "silu"])
def test_the_scaled_start_of_every_basis_and_variant(form, base_fn):
    """
    At zero scores rows are near 1/N, which is where softmax starts, and the output is about as large as the values.
    """
    operator = fresh(tokens=65, heads=32, base_fn=base_fn, **form)
    row, output = start_of(operator)
    composed = operator.config.modular_mode is None and operator.config.karat_depth > 1
    if composed and form.get("wavelet_type") in ("morlet", "mexican_hat"):
        # The first step's noise leads the second past the peak of these.
        assert -0.3 < row.mean() < 1.5
    else:
        assert 0.5 < row.mean() < 1.5
        assert abs(row.mean() - 1) < 5 * row.std() / len(row) ** 0.5 + 0.15
    if operator.config.project_l1:
        torch.testing.assert_close(row, torch.ones(32))
        assert 0.1 < output.std() < 0.5
    else:
        assert 0.2 < output.std() < 1.5


def test_the_base_function_starts_as_a_mean(variant):
    """Of the inputs of its step; and the step that gives the row spreads it over the N tokens."""
    operator = fresh(base_fn="silu", **variant)
    for index, step in enumerate(operator.edges):
        gives_the_row = operator.config.modular_mode != "phi1_w2" and index == len(operator.edges) - 1
        expected = 1 / step.in_features / (TOKENS if gives_the_row else 1)
        torch.testing.assert_close(step.scale_base.detach(), torch.full_like(step.scale_base, expected))


@pytest.mark.parametrize(("grid", "measured"), [(1, 12), (3, 22)])
def test_the_papers_start_is_as_far_off_as_was_measured(grid, measured):
    """std of the output over std of the values with N(0, 1) and W of 0.02."""
    _, output = start_of(fresh(tokens=197, grid_size=grid, karat_init="normal"))
    assert 0.7 * measured < output.std() < 1.3 * measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_starts_alike(basis, dtype):
    torch.manual_seed(0)
    config = oracle.make_config(TOKENS, 8, hidden_size=8, karat_rank=12, **basis)
    model = KArAtViTModel._from_config(config, dtype=dtype)
    operator = model.layers[0].attention.operator
    assert all(parameter.dtype == dtype for parameter in operator.parameters())
    for name, parameter in fresh(**basis).named_parameters():
        ours = operator.get_parameter(name).double()
        torch.testing.assert_close(ours.mean(), parameter.double().mean(), atol=0.02, rtol=0.2)
        torch.testing.assert_close(ours.std(), parameter.double().std(), atol=0.02, rtol=0.1)


def test_heads_and_components_start_apart():
    projector = fresh().projector
    assert not torch.equal(projector[0], projector[1]) and not torch.equal(projector[..., 1], projector[..., 2])
