# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from analysis import attention, style
from analysis.images import load_images
from analysis.models import load_checkpoint

from .conftest import karat_model, save


def test_rollout_of_known_maps():
    """Two blocks of three tokens, by hand."""
    one = np.array([[0.0, 1, 0], [0, 1, 0], [0, 0, 1]])
    two = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    maps = [np.stack([one, one])[None], np.stack([two, two])[None]]
    # (I + one)/2, then (I + two)/2 on its left.
    expected = np.array([[0.25, 0.25, 0.5], [0.25, 0.75, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(attention.rollout(maps)[0], expected)


def test_rollout_takes_the_mean_over_heads_and_magnitudes_of_signed_maps():
    heads = np.array([[[[2.0, -2], [0, 0]], [[0, 4], [0, 0]]]])
    # Magnitudes (2, 2) and (0, 4): mean (1, 3), a row of (1/4, 3/4). A row of zeros stays on its token.
    np.testing.assert_allclose(attention.rollout([heads])[0], [[0.625, 0.375], [0, 1]])


def test_rollout_before_a_special_token_comes():
    """Until then it is its own: one block of the patches, then one with [CLS] before them."""
    patches, both = np.array([[[[0.0, 1], [1, 0]]]]), np.array([[[[0.0, 1, 0], [0, 1, 0], [0, 0, 1]]]])
    expected = [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    np.testing.assert_allclose(attention.rollout([patches, both])[0], expected)


def test_rollout_of_softmax_is_the_papers(softmax):
    checkpoint = load_checkpoint(softmax)
    pixels = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        maps = [block.numpy() for block in checkpoint.model(pixels, output_attentions=True).attentions]
    expected = np.eye(10)
    for block in maps:
        expected = (0.5 * block.mean(1) + 0.5 * np.eye(10)) @ expected
    np.testing.assert_allclose(attention.rollout(maps), expected, atol=1e-6)
    data = attention.compute(checkpoint, pixels, block=0, query=4, batch_size=2)
    np.testing.assert_allclose(data.rollout, expected[:, 4], atol=1e-6)
    np.testing.assert_allclose(data.after, maps[0][:, :, 4], atol=1e-6)


def test_the_grid_leaves_out_cls():
    rows = np.arange(14).reshape(2, 7)
    assert attention.on_grid(rows, (2, 3))[1].tolist() == [[8, 9, 10], [11, 12, 13]]


def test_dominant_and_strongest_heads():
    # [CLS] takes no part, and signs do not matter.
    maps = np.array([[9.0, 1, 0, 0], [0, 0, -2, 0], [0, 1, 1, 0.5]])
    assert attention.dominant_head(maps) == 1
    assert attention.strongest_heads(maps).tolist() == [0, 0, 1, 2]
    assert attention.dominant_head(np.stack([maps, maps[::-1]])).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.4, [3]), (0.5, [3]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [1, 3, 4]), (1.0, [1, 3, 4])]
)
def test_the_region_is_the_smallest_that_holds_the_share(share, expected):
    row = np.array([100.0, 3, -5, 5, 2, 0])
    assert np.flatnonzero(attention.region(row, share)).tolist() == expected
    assert not attention.region(-np.abs(row), share).any()


def test_signed_maps_are_symmetric_about_zero():
    with style.context():
        axes = style.figure().subplots()
        image = attention.draw_signed(np.array([[-1.0, 0], [0.5, 4]]), axes)
    assert (image.norm.vmin, image.norm.vmax) == (-4, 4)
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert min(red, green, blue) > 0.95
    assert image.cmap(image.norm(4.0))[0] > image.cmap(image.norm(4.0))[2]
    assert image.get_array().tolist() == [[-1, 0], [0.5, 4]]


def test_the_region_is_drawn_around_its_patches():
    picture = np.zeros((6, 6, 3))
    inside = np.zeros((3, 3), dtype=bool)
    inside[1, 2] = True
    with style.context():
        axes = attention.draw_region(picture, inside, style.figure().subplots())
    shown = axes.images[0].get_array()
    assert (shown[2:4, 4:6] == 0).all()
    assert (np.delete(shown.reshape(36, 3), [16, 17, 22, 23], axis=0) == 0.75).all()
    ends = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
    assert ends == {
        ((3.5, 1.5), (5.5, 1.5)),
        ((3.5, 3.5), (5.5, 3.5)),
        ((3.5, 1.5), (3.5, 3.5)),
        ((5.5, 1.5), (5.5, 3.5)),
    }


def test_the_veil_is_densest_where_the_map_is_largest():
    values = np.array([[-3.0, 0], [0, 2]])
    with style.context():
        axes = attention.draw_overlay(np.ones((16, 16, 3)), values, style.figure().subplots())
    shown = axes.images[0].get_array()
    assert shown.shape[0] >= 160
    assert shown[0, 0].min() > 0.99  # what is negative is clear
    np.testing.assert_allclose(shown[-1, -1], 0.15 + 0.85 * np.array(to_rgb(style.RED)), atol=1e-5)


def test_the_framed_patch_is_the_query():
    with style.context():
        axes = attention.draw_picture(np.ones((12, 12, 3)), (3, 3), 6, style.figure().subplots())
    (frame,) = axes.patches
    # Token 6 is patch 5: row 1, column 2.
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (7.5, 3.5, 4, 4)


def test_every_head_is_drawn_before_and_after(tmp_path, photos):
    checkpoint = load_checkpoint(save(karat_model(num_karat_heads=1), tmp_path / "mixed"))
    images = load_images(checkpoint, [photos], 2)
    data = attention.compute(checkpoint, images.pixels, 1)
    with style.context():
        figure = attention.draw_heads([data], images.pictures[1], 1, style.figure())
    panels = [axes for axes in figure.axes if axes.images and axes.images[0].get_cmap().name == style.DIVERGING]
    expected = [data.before[1, 0], data.before[1, 1], data.after[1, 0], data.after[1, 1]]
    assert len(panels) == 4
    for axes, row in zip(panels, expected):
        np.testing.assert_array_equal(axes.images[0].get_array(), row[1:].reshape(3, 3))
    assert [axes.get_title() for axes in panels] == ["head 0\nKArAt", "head 1\nsoftmax", "", ""]
    # One scale for each stage.
    assert panels[0].images[0].norm is panels[1].images[0].norm
    assert panels[2].images[0].norm.vmax == np.abs(data.after[1, :, 1:]).max()


def test_the_command_beside_softmax(karat, softmax, photos, analyse):
    words = ("--model", karat, "--compare", softmax, "--images", photos, "--num-images", 2, "--query", 1, 2)
    out = analyse("attention", *words)
    stems = ("attention_heads_0", "attention_heads_1", "attention_summary")
    files = [f"{stem}.{end}" for stem in stems for end in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "attention.npz"])
    arrays = np.load(out / "attention.npz")
    assert arrays["query"] == 6
    checkpoint = load_checkpoint(softmax)
    images = load_images(checkpoint, [photos], 2)
    with torch.no_grad():
        maps = checkpoint.model(images.pixels, output_attentions=True).attentions[1][:, :, 6].numpy()
    np.testing.assert_allclose(arrays["compare_after"], maps, atol=1e-6)
    dominant = attention.dominant_head(maps)
    assert arrays["compare_dominant_head"].tolist() == dominant.tolist()
    regions = attention.region(maps[[0, 1], dominant], 0.6)
    assert arrays["compare_region"].tolist() == regions.tolist()


def test_what_cannot_be_shown_is_refused(karat, photos, tmp_path, refusal):
    words = ("attention", "--images", photos, "--model", karat)
    assert "3 x 3 patches" in refusal(*words, "--query", 3, 0)
    assert "expected cls" in refusal(*words, "--query", "first")
    for share in (0, "half"):
        assert f"argument --share: {share} is not above 0" in refusal(*words, "--share", share)
    assert "names block 5" in refusal(*words, "--block", 5)
    other = save(karat_model(patch_size=6), tmp_path / "other")
    assert "grids are equal" in refusal(*words, "--compare", other, "--query", 0, 0)
