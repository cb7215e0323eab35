# SPDX-License-Identifier: Apache-2.0
"""What the page shows, by numbers; test_page.py looks at it in Chromium."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from analysis import attention, functions, style
from analysis.demo.viewer import VIEWS, Viewer
from analysis.models import load_checkpoint
from tests.analysis.conftest import karat_model, save


@pytest.fixture
def viewer(karat):
    return Viewer(load_checkpoint(karat), "mine")


def test_guesses_are_the_models(viewer, karat, photo):
    model = AutoModelForImageClassification.from_pretrained(karat)
    pixels = AutoImageProcessor.from_pretrained(karat)(Image.open(photo), return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits.softmax(-1)[0]
    guesses = viewer.see(photo).guesses
    assert list(guesses) == [model.config.id2label[index] for index in expected.argsort(descending=True).tolist()]
    np.testing.assert_allclose(list(guesses.values()), expected.sort(descending=True).values, rtol=1e-4)


def test_classes_of_one_name_are_told_apart(tmp_path, photo):
    names = {0: "crane", 1: "crane", 2: "newt"}
    folder = save(karat_model(id2label=names, label2id={"crane": 1, "newt": 2}), tmp_path / "model")
    guesses = Viewer(load_checkpoint(folder), "mine").see(photo).guesses
    assert set(guesses) == {"crane", "crane (2)", "newt"}
    assert sum(guesses.values()) == pytest.approx(1, abs=1e-4)


def test_without_a_classifier_there_are_no_guesses_but_maps(tmp_path, photo):
    folder = tmp_path / "encoder"
    save(karat_model(), folder)
    karat_model().vit.save_pretrained(folder, save_original_format=False)
    encoder = Viewer(load_checkpoint(str(folder)), "mine")
    assert encoder.see(photo).guesses == {}
    assert encoder.draw_attention(photo, 0, 0)[0] is not None


def redness(picture: np.ndarray) -> np.ndarray:
    """Of each of 3 x 3 patches at its centre: how much more red than green there is."""
    height, width = picture.shape[:2]
    ys, xs = (((np.arange(3) + 0.5) * side / 3).astype(int) for side in (height, width))
    return (picture[..., 0].astype(float) - picture[..., 1])[np.ix_(ys, xs)]


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("view", VIEWS)
def test_the_veil_is_where_the_map_is_large(viewer, photos, view, stage):
    compared = 0
    for photo in map(str, Path(photos).iterdir()):
        maps = attention.compute_all(viewer.checkpoint, viewer.see(photo).pixels)
        for block, head in ((0, 1), (1, 0)):
            heads = getattr(maps[block], stage)[0]
            row = {"One head": heads[head], "Mean of the heads": heads.mean(0)}.get(view, maps[0].rollout[0])
            picture, words = viewer.draw_attention(photo, block, head, view, stage)
            expected = {
                "One head": f"block {block}, head {head} (KArAt)",
                "Mean of the heads": f"block {block}, mean of 2 heads",
            }.get(view, "rollout over all 2 blocks")
            if row[1:].max() <= 0:
                assert words == f"{expected}: positive nowhere"
                assert redness(picture).max() == 0
            else:
                assert words == expected
                # Not equal, since the veil is smooth.
                positive = row[1:].clip(0)
                assert np.corrcoef(redness(picture).flatten(), positive)[0, 1] > 0.95
                compared += 1
    assert compared > 2


def test_the_strength_of_the_veil(viewer, photo):
    pictures = [viewer.draw_attention(photo, 0, 0, opacity=opacity)[0] for opacity in (0, 0.4, 1)]
    means = [redness(picture).max() for picture in pictures]
    assert means[0] == 0 < means[1] < means[2]


def test_compute_all_is_compute_of_every_block(viewer):
    pixels = torch.randn(3, 3, 12, 12)
    for block, maps in enumerate(attention.compute_all(viewer.checkpoint, pixels, query=2, batch_size=2)):
        alone = attention.compute(viewer.checkpoint, pixels, block, query=2)
        assert (maps.block, maps.query) == (alone.block, alone.query) == (block, 2)
        for field in ("before", "after", "rollout"):
            np.testing.assert_allclose(getattr(maps, field), getattr(alone, field), atol=1e-6)


def test_a_click_on_the_overview_finds_the_head_that_is_framed(tmp_path, photo):
    viewer = Viewer(load_checkpoint(save(karat_model(num_attention_heads=3), tmp_path / "three")), "mine")
    plain = viewer.draw_overview(photo).astype(int)
    for chosen in ((0, 0), (0, 2), (1, 1)):
        ys, xs = np.nonzero(np.abs(viewer.draw_overview(photo, chosen=chosen) - plain).sum(-1))
        assert viewer.head_at((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2) == chosen
    assert viewer.head_at(1, 1) is None  # the margin


def test_the_overview_shows_signs(viewer, photo):
    maps = viewer.see(photo).maps
    rows = np.stack([each.after[0] for each in maps])
    axes = style.figure().subplots()
    (image,) = attention.draw_overview(rows, (3, 3), axes).images
    side = image.get_array().shape[0] // 2  # 2 heads
    for block in range(2):
        for head in range(2):
            tile = image.get_array()[head * side : (head + 1) * side, block * side : (block + 1) * side]
            row = rows[block, head, 1:]
            # Between the maps there is 0.
            assert tile.max() == pytest.approx(max(0, (row / np.abs(row).max()).max()))
            assert tile.min() == pytest.approx(min(0, (row / np.abs(row).max()).min()))


def test_learned_functions_are_those_of_the_analysis(viewer, photo, monkeypatch):
    drawn = []
    monkeypatch.setattr(functions, "draw_all", lambda data, figure, **_: drawn.extend(data))
    picture, words = viewer.draw_functions(photo, 1, 0)
    (expected,) = functions.compute(viewer.checkpoint, viewer.see(photo).pixels, 1, [0])
    np.testing.assert_array_equal(drawn[0].curves, expected.curves)
    assert drawn[0].edges == expected.edges
    assert picture is not None
    assert "40 learned functions" in words  # r = 4 times N = 10


def test_what_has_nothing_learned_says_so(tmp_path, softmax, photo):
    plain = Viewer(load_checkpoint(softmax), "plain")
    mixed = Viewer(load_checkpoint(save(karat_model(num_karat_heads=1), tmp_path / "mixed")), "mixed")
    for viewer, head in ((plain, 0), (mixed, 1)):
        picture, words = viewer.draw_functions(photo, 1, head)
        assert picture is None
        assert "softmax: one fixed function" in words
    assert mixed.draw_functions(photo, 1, 0)[0] is not None


def test_operators_of_several_steps_say_which_is_shown(tmp_path, photo):
    deep = Viewer(load_checkpoint(save(karat_model(modular_mode=None), tmp_path / "deep")), "deep")
    assert "the first of its 2 steps" in deep.draw_functions(photo, 0, 0)[1]


def test_a_block_or_head_that_a_model_lacks(viewer, photo):
    assert viewer.draw_attention(photo, 2, 0) == (None, "This model has no block 2: its blocks are 0 to 1.")
    assert viewer.draw_functions(photo, 0, 5) == (None, "This model has no head 5: its heads are 0 to 1.")
    # The mean needs no head, rollout neither.
    assert viewer.draw_attention(photo, 1, 5, "Mean of the heads")[0] is not None
    assert viewer.draw_attention(photo, 9, 5, "All blocks (rollout)")[0] is not None
    np.testing.assert_array_equal(viewer.draw_overview(photo, chosen=(9, 9)), viewer.draw_overview(photo))


def test_visitors_at_once_get_their_own(karat, photos):
    """Each of many threads must get what it would get alone: hooks on a shared model would mix them up."""
    files = sorted(map(str, Path(photos).iterdir()))
    alone = Viewer(load_checkpoint(karat), "alone")
    expected = {file: alone.see(file).maps[0].after for file in files}
    shared = Viewer(load_checkpoint(karat), "shared")
    start = threading.Barrier(len(files))

    def visit(file):
        start.wait()
        seen = shared.see(file).maps[0].after
        shared.draw_functions(file, 0, 0)
        return file, seen

    with ThreadPoolExecutor(len(files)) as pool:
        for file, seen in pool.map(visit, files):
            np.testing.assert_allclose(seen, expected[file], atol=1e-6)
