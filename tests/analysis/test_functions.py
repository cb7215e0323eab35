# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from analysis import functions, style
from analysis.images import load_images
from analysis.models import load_checkpoint

from .conftest import karat_model, rows_of, save


# Of the columns of W of the head below.
LENGTHS = torch.tensor([2.0, 1, 3, 1])


def fixed(tmp_path, **fields) -> str:
    """A model of which block 1, head 1 has phi_pq(x) = 0 but for edges 2,3: 3 cos(2x) + silu(x)/2, and 0,5: sin(x)."""
    model = karat_model(grid_size=2, base_fn="silu", **fields)
    step = model.vit.layers[1].attention.operator.edges[0]
    with torch.no_grad():
        for parameter in (step.cos_coef, step.sin_coef, step.scale_base):
            parameter[1] = 0.0
        step.scale_basis[1] = 2.0
        step.cos_coef[1, 1, 2, 3] = 1.5
        step.scale_base[1, 2, 3] = 0.5
        step.sin_coef[1, 0, 0, 5] = 0.5
        model.vit.layers[1].attention.operator.projector[1] = torch.eye(10, 4) * LENGTHS
    return save(model, tmp_path / "fixed")


def phi_2_3(x):
    return 3 * np.cos(2 * x) + 0.5 * x / (1 + np.exp(-x))


def test_the_curves_are_the_formula_with_the_set_coefficients(tmp_path, photos):
    checkpoint = load_checkpoint(fixed(tmp_path))
    pixels = load_images(checkpoint, [photos], 6).pixels
    (data,) = functions.compute(checkpoint, pixels, 1, [1], edge=(1, 1), strongest=2)
    assert data.edges == [(2, 3), (0, 5), (1, 1)]
    np.testing.assert_allclose(data.curves[0], phi_2_3(data.x), atol=1e-6)
    np.testing.assert_allclose(data.curves[1], np.sin(data.x), atol=1e-6)
    np.testing.assert_allclose(data.curves[2], 0, atol=1e-6)
    every = np.zeros((40, len(data.x)))
    every[:2] = phi_2_3(data.x), np.sin(data.x)
    np.testing.assert_allclose(data.mean, every.mean(0), atol=1e-6)
    np.testing.assert_allclose(data.deviation, every.std(0), atol=1e-6)


def test_range_density_and_strength_are_those_of_the_scores_that_occur(tmp_path, photos):
    checkpoint = load_checkpoint(fixed(tmp_path))
    pixels = load_images(checkpoint, [photos], 6).pixels
    (data,) = functions.compute(checkpoint, pixels, 1, [1])
    scores = checkpoint.model(pixels, output_attention_scores=True).attention_scores[1][:, 1].detach().double().numpy()
    low, high = np.quantile(scores, [0.001, 0.999])
    np.testing.assert_allclose([data.x[0], data.x[-1]], [low, high], rtol=1e-4)
    inside = (scores >= low) & (scores <= high)
    counts, _ = np.histogram(scores[inside], bins=data.bins)
    np.testing.assert_allclose(data.density, counts / counts.sum() / np.diff(data.bins), atol=0.05)
    assert np.isclose((data.density * np.diff(data.bins)).sum(), 1)
    # 60 rows in all: every one counts.
    expected = 3 * phi_2_3(scores[:, :, 3]).std(), 2 * np.sin(scores[:, :, 5]).std()
    np.testing.assert_allclose([data.strength[2, 3], data.strength[0, 5]], expected, rtol=1e-4)
    assert np.count_nonzero(data.strength > 1e-6) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"basis_type": "spline"},
        {"basis_type": "rational", "base_fn": "gelu"},
        *({"basis_type": "wavelet", "wavelet_type": kind} for kind in ("mexican_hat", "shannon")),
        {"modular_mode": "w1_phi2"},
        {"modular_mode": None, "karat_depth": 3, "step": 1},
        {"modular_mode": None, "karat_depth": 1},
        {"num_karat_heads": 1, "sharing": "universal"},
    ],
)
def test_the_sum_of_the_edges_is_the_step(fields, tmp_path):
    """Every basis and operator: summed over the inputs, the drawn functions of the real inputs are Phi(s)."""
    step = fields.pop("step", 0)
    checkpoint = load_checkpoint(save(karat_model(**fields), tmp_path / "model"))
    operator = checkpoint.operator(1)
    heads = checkpoint.head_kinds(1).count("karat")
    scores = checkpoint.model(torch.randn(2, 3, 12, 12), output_attention_scores=True).attention_scores[1][:, :heads]
    inputs = functions.inputs_of(operator, scores.detach(), step)
    tensors = operator.edges[step](torch.float32)
    expected = operator.edges[step].activate(inputs, tensors)[:, heads - 1].flatten(0, 1)
    values = functions.evaluate(operator, heads - 1, inputs[:, heads - 1].flatten(0, 1), step)
    torch.testing.assert_close(values.sum(-1), expected)
    grid = torch.linspace(-1, 1, 5)
    same = functions.evaluate(operator, heads - 1, grid[:, None], step)
    each = functions.evaluate(operator, heads - 1, grid[:, None].expand(5, inputs.shape[-1]), step)
    torch.testing.assert_close(same, each)


def test_before_training_has_the_same_edges_and_points(karat, tmp_path, photos):
    after, before = load_checkpoint(fixed(tmp_path)), load_checkpoint(fixed(tmp_path))
    with torch.no_grad():
        before.operator(1).edges[0].cos_coef[1, 1, 2, 3] = 0.0
    pixels = load_images(after, [photos], 4).pixels
    now = functions.compute(after, pixels, 1, [0, 1], strongest=3)
    then = functions.compute(before, pixels, 1, [0, 1], same_as=now)
    for a, b in zip(now, then):
        assert a.edges == b.edges
        assert (a.x == b.x).all()
    # Scores that all lie elsewhere, or are all the same, still make a picture.
    with torch.no_grad():
        for projection in ("q_proj", "k_proj"):
            getattr(before.attention(1), projection).weight.zero_()
            getattr(before.attention(1), projection).bias.fill_(9.0)
    far = functions.compute(before, pixels, 1, [0, 1], same_as=now)
    alike = functions.compute(before, pixels, 1, [0, 1])
    assert far[0].density.sum() == 0
    assert alike[0].x[-1] - alike[0].x[0] == 1
    with style.context():
        functions.draw_all(now, style.figure(), before=far).draw_without_rendering()
        functions.draw_all(alike, style.figure()).draw_without_rendering()
    position = now[1].edges.index((2, 3))
    np.testing.assert_allclose(then[1].curves[position], 0.5 * now[1].x / (1 + np.exp(-now[1].x)), atol=1e-6)


def test_what_is_drawn(tmp_path, photos):
    checkpoint = load_checkpoint(fixed(tmp_path))
    pixels = load_images(checkpoint, [photos], 4).pixels
    (data,) = functions.compute(checkpoint, pixels, 1, [1], edge=(1, 1), strongest=2)
    with style.context():
        axes = functions.draw(data, style.figure().subplots(), edge=(1, 1))
    lines = {to_rgb(line.get_color()): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(lines[to_rgb(style.INK)], data.mean)
    np.testing.assert_array_equal(lines[to_rgb(style.VERMILLION)], data.curves[2])
    assert len(axes.lines) == 4
    assert axes.get_xlim() == (data.x[0], data.x[-1])


def test_the_command_with_the_start_of_a_run(run_folder, analyse):
    out = analyse(
        "functions", "--model", run_folder, "--before", "start", "--heads", 1, "--edge", 0, 3, "--strongest", 0
    )
    assert sorted(path.name for path in out.iterdir()) == [f"functions_block1.{end}" for end in ("csv", "png", "svg")]
    rows = rows_of(out / "functions_block1.csv")
    curves = {}
    for row in rows:
        curves.setdefault((row["when"], row["curve"]), []).append((float(row["x"]), float(row["y"])))
    # The run did not learn, so before is after.
    assert curves["before", "phi[0,3]"] == curves["after", "phi[0,3]"]
    assert {curve for _, curve in curves} == {"mean", "standard deviation", "density", "phi[0,3]"}
    assert {row["head"] for row in rows} == {"1"}


def test_what_has_no_functions_is_refused(softmax, karat, photos, tmp_path, refusal):
    mixed = save(karat_model(num_karat_heads=1, karat_layers=[0]), tmp_path / "mixed")
    assert "nothing that is learned" in refusal("functions", "--model", softmax, "--images", photos)
    assert "plain softmax" in refusal("functions", "--model", mixed, "--images", photos)
    words = ("functions", "--images", photos, "--model")
    assert "Head 1 of block 0 is softmax" in refusal(*words, mixed, "--block", 0, "--heads", 1)
    assert "names block 2" in refusal(*words, karat, "--block", 2)
    assert "4 x 10 edges" in refusal(*words, karat, "--edge", 4, 0)
    assert "1 step(s)" in refusal(*words, karat, "--step", 1)
    assert "another model" in refusal(*words, karat, "--before", mixed)
    assert "no folder of a run" in refusal(*words, karat, "--before", "start")


def test_before_and_after_are_side_by_side_or_beneath_each_other():
    assert functions.layout(1, 2) == (1, 2, [[(0, 0), (0, 1)]])
    assert functions.layout(2, 2) == (1, 4, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]])
    assert functions.layout(3, 2) == (2, 3, [[(0, column), (1, column)] for column in range(3)])
    rows, columns, places = functions.layout(6, 2)
    assert (rows, columns) == (4, 3) and places[4] == [(2, 1), (3, 1)]
    for heads in range(1, 17):
        for stages in (1, 2):
            rows, columns, places = functions.layout(heads, stages)
            used = [place for of_head in places for place in of_head]
            assert len(set(used)) == heads * stages and columns <= 4
            assert all(row < rows and column < columns for row, column in used)
