# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from analysis import style, weights
from analysis.models import load_checkpoint
from image_classification.errors import InputError

from .conftest import karat_model, rows_of, save


def constant_model(tmp_path, **fields):
    """Harmonic 1 is 1 in block 0 and 10 in block 1, harmonic 2 is 2 in head 0 and 3 in head 1, W is -1."""
    checkpoint = load_checkpoint(save(karat_model(grid_size=2, **fields), tmp_path / "model"))
    with torch.no_grad():
        for block in range(2):
            operator = checkpoint.operator(block)
            (step,) = operator.edges
            for parameter in (step.cos_coef, step.sin_coef):
                parameter[:, 0] = 10**block
                parameter[0, 1], parameter[1, 1] = 2, 3
            operator.projector.fill_(-1)
    return checkpoint


def test_groups_hold_the_weights_that_they_name(tmp_path):
    checkpoint = constant_model(tmp_path)
    found = weights.groups(checkpoint)
    assert list(found) == [
        "all weights",
        "harmonic 1: $a_{1}$, $b_{1}$",
        "harmonic 2: $a_{2}$, $b_{2}$",
        "projector $W$",
    ]
    whole, first, second, projector = found.values()
    assert len(whole) == sum(parameter.numel() for parameter in checkpoint.model.parameters())
    edges = 2 * 4 * 10  # heads, r, N
    assert dict(zip(*np.unique(first, return_counts=True))) == {1: 2 * edges, 10: 2 * edges}
    assert dict(zip(*np.unique(second, return_counts=True))) == {2: 2 * edges, 3: 2 * edges}
    assert dict(zip(*np.unique(projector, return_counts=True))) == {-1: 2 * edges}
    _, first, second, projector = weights.groups(checkpoint, block=1, head=0).values()
    assert (set(first), set(second), len(first), len(projector)) == ({10}, {2}, edges, edges // 2)


def test_a_universal_operator_counts_once(tmp_path):
    checkpoint = load_checkpoint(save(karat_model(sharing="universal"), tmp_path / "model"))
    assert len(weights.groups(checkpoint)["projector $W$"]) == checkpoint.operator(0).projector.numel()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"basis_type": "spline"}, ["spline coefficients $c_i$", "projector $W$"]),
        ({"basis_type": "wavelet"}, ["amplitude $w$", r"translation $\tau$", "width $s$", "projector $W$"]),
        (
            {"basis_type": "rational", "rational_order": (1, 1)},
            ["numerator $a_{0}$", "numerator $a_{1}$", "denominator $b_{1}$", "projector $W$"],
        ),
        ({"modular_mode": None, "karat_depth": 1, "grid_size": 1}, ["harmonic 1: $a_{1}$, $b_{1}$"]),
    ],
)
def test_every_basis_has_its_groups(fields, expected, tmp_path):
    checkpoint = load_checkpoint(save(karat_model(**fields), tmp_path / "model"))
    found = weights.groups(checkpoint)
    assert list(found)[1:] == expected
    own = {name for operator in (checkpoint.operator(0), checkpoint.operator(1)) for name in operator.state_dict()}
    scales = {name for name in own if "scale" in name}
    total = sum(len(values) for title, values in found.items() if title != "all weights")
    expected_total = sum(
        parameter.numel()
        for block in (0, 1)
        for name, parameter in checkpoint.operator(block).named_parameters()
        if name not in scales
    )
    assert total == expected_total


def test_what_is_softmax_is_refused(softmax, tmp_path):
    assert list(weights.groups(load_checkpoint(softmax))) == ["all weights"]
    with pytest.raises(InputError, match="choose KArAt weights"):
        weights.groups(load_checkpoint(softmax), head=0)
    mixed = load_checkpoint(save(karat_model(num_karat_heads=1, karat_layers=[1]), tmp_path / "mixed"))
    with pytest.raises(InputError, match="plain softmax"):
        weights.groups(mixed, block=0)
    with pytest.raises(InputError, match="Head 1 is softmax"):
        weights.groups(mixed, head=1)


def test_histograms_of_known_values():
    values = [{"g": np.array([0.0, 0, 1], np.float32)}, {"g": np.array([0.0, 2, 4, 4], np.float32)}]
    (data,) = weights.compute(values)
    assert (data.edges[0], data.edges[-1], len(data.edges)) == (0, 4, weights.BINS + 1)
    assert data.counts.sum(1).tolist() == [3, 4]
    assert (data.counts[0, 0], data.counts[0, weights.BINS // 4], data.counts[1, -1]) == (2, 1, 2)
    np.testing.assert_allclose(data.means, [1 / 3, 2.5])
    np.testing.assert_allclose(data.deviations, [np.sqrt(2) / 3, np.sqrt(11) / 2])
    with style.context():
        axes = weights.draw(data, style.figure().subplots(), ["start", "end"])
    drawn = [patch.get_data() for patch in axes.patches]
    for step, counts in zip(drawn, data.counts):
        density = counts / counts.sum() * weights.BINS / 4
        np.testing.assert_allclose(step.values, density, rtol=1e-5)
    (constant,) = weights.compute([{"g": np.ones(5)}])
    assert constant.counts.sum() == 5


def test_the_command_over_a_run(run_folder, analyse):
    out = analyse("weights", "--model", run_folder, "--moments", 3)
    assert sorted(path.name for path in out.iterdir()) == ["weights.csv", "weights.png", "weights.svg"]
    rows = rows_of(out / "weights.csv")
    assert {row["step"] for row in rows} == {"0", "1", "2"}
    counts = {}
    for row in rows:
        counts.setdefault((row["group"], row["epoch"]), []).append(int(row["count"]))
    total = sum(parameter.numel() for parameter in load_checkpoint(run_folder).model.parameters())
    # A rate of 0: the same weights at every moment.
    assert sum(counts["all weights", "0.0"]) == total
    assert counts["all weights", "0.0"] == counts["all weights", "1.0"] == counts["all weights", "2.0"]


def test_one_moment_is_too_few(run_folder, karat, refusal):
    assert "argument --moments: 1 is not 2 or more" in refusal("weights", "--model", run_folder, "--moments", 1)
    assert "no folder of a run" in refusal("weights", "--model", karat)
