# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from analysis import spectrum, style
from analysis.models import load_checkpoint
from analysis.recording import Attention

from .conftest import karat_model, save


def test_effective_rank():
    assert spectrum.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert spectrum.effective_rank(np.array([2.0, 2, 2, 2])) == pytest.approx(4)
    p = np.array([0.5, 0.25, 0.25])
    assert spectrum.effective_rank(7 * p) == pytest.approx(2**1.5)
    assert spectrum.effective_rank(np.zeros((2, 3))).tolist() == [0, 0]


def test_the_spectrum_of_known_matrices(karat, monkeypatch):
    """Scores and maps of known singular values, rotated at random; larger from image to image, with this mean."""
    checkpoint = load_checkpoint(karat)
    known = {"scores": torch.tensor([5.0, 2, 1] + [0.0] * 7), "maps": torch.tensor([4.0, 4] + [0.0] * 8)}

    factors = [0.5, 1.0, 1.5] * 2

    def of(values):
        turn = torch.linalg.qr(torch.randn(2, 3, 2, 10, 10, dtype=torch.float64)).Q
        return turn[0] @ torch.diag(values.double()) @ turn[1] * torch.tensor(factors[:3]).view(3, 1, 1, 1)

    def record_batches(checkpoint, pixels, blocks, batch_size, dtype):
        for _ in pixels.split(batch_size):
            yield {block: Attention(of(known["scores"]), of(known["maps"])) for block in blocks}

    monkeypatch.setattr(spectrum, "record_batches", record_batches)
    data = spectrum.compute(checkpoint, torch.zeros(6, 3, 12, 12), block=1, batch_size=3)
    assert data.before.shape == data.after.shape == (6, 2, 10)
    for found, values in ((data.before, known["scores"]), (data.after, known["maps"])):
        expected = np.multiply.outer(factors, np.broadcast_to(values, (2, 10)))
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert data.effective_after.shape == (2, 6, 2)
    np.testing.assert_allclose(data.effective_after, 2)
    with style.context():
        axes = spectrum.draw(data, style.figure().subplots())
    lines = {to_rgb(line.get_color()): line for line in axes.lines if line.get_label()[0] != "_"}
    # Lines end where the rank does.
    np.testing.assert_allclose(lines[to_rgb(style.GREY)].get_xydata(), [[1, 5], [2, 2], [3, 1]])
    np.testing.assert_allclose(lines[to_rgb(style.BLUE)].get_xydata(), [[1, 4], [2, 4]])
    bands = [band.get_datalim(axes.transData).extents for band in axes.collections]
    np.testing.assert_allclose(bands, [[1, 0.5, 3, 7.5], [1, 2, 2, 6]])


def test_the_bounds_hold_for_a_model(tmp_path):
    checkpoint = load_checkpoint(save(karat_model(num_karat_heads=1), tmp_path / "karat"))
    data = spectrum.compute(checkpoint, torch.randn(3, 3, 12, 12), 1)
    assert (data.rank, data.head_size, data.kind) == (4, 12, "karat")
    karat, softmax = data.after[:, 0], data.after[:, 1]
    noise = data.resolution * data.after.max()
    assert (karat[:, 3] > 1e3 * noise).all()
    assert (karat[:, 4:] < noise).all()
    assert (softmax[:, 9] > noise).all()
    assert [(stage, heads) for stage, _, _, heads in spectrum.series(data, 1)] == [
        ("before", [0, 1]),
        ("after", [0]),
        ("after", [1]),
    ]
    with style.context():
        axes = spectrum.draw(data, style.figure().subplots())
        ranks = spectrum.draw_effective([data], style.figure().subplots())
    drawn = {line.get_label(): line.get_ydata() for line in ranks.lines}
    assert list(drawn)[:3] == ["karat, before", "karat, after (KArAt heads)", "karat, after (softmax heads)"]
    np.testing.assert_allclose(drawn["karat, before"], data.effective_before.mean((1, 2)))
    np.testing.assert_allclose(drawn["karat, after (softmax heads)"], data.effective_after[:, :, 1].mean(1))
    # d = 12 is beyond N = 10; r is marked.
    assert [text.get_text() for text in axes.texts] == ["$r=4$"]


@pytest.mark.parametrize("fields", [{"modular_mode": "w1_phi2"}, {"project_l1": True}])
def test_where_the_operator_sets_no_bound_none_is_claimed(fields, tmp_path):
    checkpoint = load_checkpoint(save(karat_model(**fields), tmp_path / "model"))
    data = spectrum.compute(checkpoint, torch.randn(2, 3, 12, 12), 1)
    assert data.rank is None
    assert (data.after[..., 4] > 1e-9).any()


def test_the_command_beside_softmax(karat, softmax, photos, analyse):
    out = analyse("spectrum", "--model", karat, "--compare", softmax, "--images", photos, "--block", 0)
    assert sorted(path.name for path in out.iterdir()) == [f"spectrum_block0.{end}" for end in ("npz", "png", "svg")]
    arrays = np.load(out / "spectrum_block0.npz")
    assert arrays["model_after"].shape == arrays["compare_before"].shape == (5, 2, 10)
    # Rows of softmax sum to 1, so its largest singular value is 1 at least.
    assert (arrays["compare_after"][..., 0] >= 1 - 1e-9).all()
    expected = spectrum.effective_rank(arrays["compare_after"])
    np.testing.assert_allclose(arrays["compare_effective_after"][0], expected)
