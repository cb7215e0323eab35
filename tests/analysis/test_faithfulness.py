# SPDX-License-Identifier: Apache-2.0
import json

import datasets
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from analysis import faithfulness, style
from analysis.annotations import as_seen, find_annotated
from analysis.attention import Maps
from analysis.faithfulness import Protocol
from analysis.images import prepare
from analysis.models import load_checkpoint
from image_classification.errors import InputError

from .conftest import karat_model, rows_of, save


GRID = (2, 2)


def linear(weights):
    """A "model" whose score is the weighted sum of what is in each of 2 x 2 patches of one pixel."""
    weights = torch.tensor(weights, dtype=torch.float64).view(2, 2)
    return lambda images, part: (images[:, 0].double() * weights).sum((1, 2))


def curve(weights, order, before=1.0, after=0.0):
    images = [torch.full((len(order), 3, 2, 2), value) for value in (before, after)]
    return faithfulness.perturb(linear(weights), *images, np.array(order), np.arange(5), GRID, batch_size=2)


def test_deletion_and_insertion_of_a_linear_model():
    weights = [0.1, 0.4, 0.2, 0.3]
    best, worst = [1, 3, 2, 0], [0, 2, 3, 1]
    deletion = curve(weights, [best, worst, best])
    np.testing.assert_allclose(deletion[0], [1, 0.6, 0.3, 0.1, 0], atol=1e-7)
    np.testing.assert_allclose(deletion[1], [1, 0.9, 0.7, 0.4, 0], atol=1e-7)
    np.testing.assert_array_equal(deletion[2], deletion[0])
    shares = np.arange(5) / 4
    # Trapezoids: (1/2 + 0.6 + 0.3 + 0.1) / 4.
    np.testing.assert_allclose(faithfulness.area(shares, deletion)[:2], [0.375, 0.625], atol=1e-7)
    insertion = curve(weights, [best], before=0.0, after=1.0)
    np.testing.assert_allclose(faithfulness.area(shares, insertion), [0.625], atol=1e-7)


def test_a_random_map_deletes_a_linear_model_evenly():
    """Whatever the weights, a random order takes the same share at each step, so the mean area is a half."""
    random = np.random.default_rng(0)
    ties = random.random((4000, 4))
    orders = faithfulness.ranking(random.random((4000, 4)), ties)
    areas = faithfulness.area(np.arange(5) / 4, curve([0.7, 0.2, 0.1, 0.0], orders))
    mean, low, high, images = faithfulness.bootstrap(areas)
    assert mean == pytest.approx(0.5, abs=4 * areas.std() / 4000**0.5)
    assert low < 0.5 < high and high - low < 0.02 and images == 4000


def test_equal_patches_go_in_random_order():
    values = np.array([[0.0, 2, 0, 1]] * 500)
    order = faithfulness.ranking(values, np.random.default_rng(0).random(values.shape))
    assert (order[:, :2] == [1, 3]).all()
    assert 200 < (order[:, 2] == 0).sum() < 300


def made(grid, after, rollout):
    kinds = ["karat"] * after.shape[1]
    values = {"grid": grid, "before": after, "after": after, "rollout": rollout}
    return Maps(name="m", kind="karat", head_kinds=kinds, block=0, query=0, **values)


def test_importance_of_signed_maps():
    # [CLS] is left out, the second head is dominant.
    after = np.array([[[9.0, 1, -2, 0, 0], [0, -4, 1, 3, 0]]])
    maps = made(GRID, after, np.array([[0.6, 0.1, 0.1, 0.2, 0.0]]))
    np.testing.assert_allclose(faithfulness.importance(maps, "mean"), [[2.5, 1.5, 1.5, 0]])
    np.testing.assert_allclose(faithfulness.importance(maps, "dominant"), [[0, 1, 3, 0]])
    np.testing.assert_allclose(faithfulness.importance(maps, "rollout"), [[0.1, 0.1, 0.2, 0]])
    middle = faithfulness.centre((3, 5)).reshape(3, 5)
    assert middle.argmax() == 7 and middle[1, 1] == middle[1, 3] > middle[1, 0]


def test_pointing_game_and_iou_by_hand():
    objects = np.zeros((3, 4, 4), dtype=bool)
    objects[0, 0:2, 1:3] = True  # half of each of the upper patches
    objects[1, 3, 3] = True  # a quarter of the last patch
    strongest = np.array([1, 0, 2])
    np.testing.assert_array_equal(faithfulness.point(strongest, objects, GRID), [1, 0, np.nan])
    values = np.array([[0.5, 0.3, 0.2, 0], [0.1, 0.1, 0.1, 0.7], [1.0, 0, 0, 0]])
    # Regions: the upper patches (8 pixels, 4 shared, union 8); the last patch (1 of 4); no object.
    np.testing.assert_allclose(faithfulness.overlap(values, objects, GRID, 0.6), [0.5, 0.25, np.nan])
    # All of the map: three patches of 12 pixels, then the whole image.
    np.testing.assert_allclose(faithfulness.overlap(values, objects, GRID, 1.0), [4 / 12, 1 / 16, np.nan])


def test_the_bootstrap_covers_the_mean():
    """Of 95 % intervals of 40 draws, the percentile bootstrap's cover the mean about 93 times in 100."""
    random = np.random.default_rng(1)
    covered = 0
    for number in range(300):
        _, low, high, _ = faithfulness.bootstrap(random.exponential(size=40), resamples=400, seed=number)
        covered += low <= 1.0 <= high
    assert 0.87 < covered / 300 < 0.98
    # Its width is that of the normal approximation.
    values = random.normal(3, 2, 400)
    mean, low, high, images = faithfulness.bootstrap(np.append(values, np.nan))
    assert mean == pytest.approx(values.mean()) and images == 400
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert np.isnan(faithfulness.bootstrap(np.array([np.nan]))[:3]).all()
    assert faithfulness.bootstrap(np.array([2.0, np.nan])) == (2, 2, 2, 1)


def test_fills_keep_the_mean_and_lose_the_detail(karat):
    pixels = torch.randn(2, 3, 12, 12) + 3
    checkpoint = load_checkpoint(karat)
    mean = faithfulness.fill(pixels, "mean", checkpoint)
    torch.testing.assert_close(mean[:, :, 5, 7], pixels.mean((2, 3)))
    blurred = faithfulness.fill(pixels, "blur", checkpoint)
    assert blurred.shape == pixels.shape
    assert (blurred.std((2, 3)) < 0.35 * pixels.std((2, 3))).all()
    torch.testing.assert_close(faithfulness.fill(mean, "blur", checkpoint), mean)


def test_a_model_follows_its_map(karat):
    """The curves begin and end with the images that they should, and are what the model says in between."""
    checkpoint = load_checkpoint(karat)
    pixels = torch.randn(3, 3, 12, 12)
    data = faithfulness.compute(checkpoint, pixels, 1, protocol=Protocol(steps=4, batch_size=2))
    np.testing.assert_allclose(data.shares, np.array([0, 2, 4, 7, 9]) / 9)
    with torch.inference_mode():
        whole = checkpoint.model(pixels).logits.softmax(-1)
        empty = checkpoint.model(faithfulness.fill(pixels, "mean", checkpoint)).logits.softmax(-1)
    assert data.predicted.tolist() == whole.argmax(-1).tolist()
    for curves in data.deletion_curves:
        np.testing.assert_allclose(curves[:, 0], whole.amax(-1), atol=1e-5)
        np.testing.assert_allclose(curves[:, -1], empty.gather(1, whole.argmax(-1, keepdim=True))[:, 0], atol=1e-5)
    np.testing.assert_allclose(data.insertion_curves[:, :, -1], data.deletion_curves[:, :, 0], atol=1e-5)
    again = faithfulness.compute(checkpoint, pixels, 1, protocol=Protocol(steps=4))
    np.testing.assert_allclose(again.deletion_curves, data.deletion_curves, atol=1e-6)
    other = faithfulness.compute(checkpoint, pixels, 1, protocol=Protocol(steps=4, seed=1))
    np.testing.assert_allclose(other.deletion_curves[0], data.deletion_curves[0], atol=1e-6)
    assert not np.allclose(other.deletion_curves[1], data.deletion_curves[1])


def test_the_map_of_a_class_that_one_patch_decides(karat, monkeypatch):
    """Where the map names the only patch that counts, deletion is at its floor and insertion at its ceiling."""
    checkpoint = load_checkpoint(karat)
    strong = np.zeros((4, 10))
    strong[:, 1 + 6] = 1
    maps = made((3, 3), strong[:, None], strong)
    monkeypatch.setattr(faithfulness, "attention_maps", lambda *_: maps)

    def probability(images, part):
        return (images[:, 0, 8:12, 0:4] > 1).all((1, 2)).float()

    monkeypatch.setattr(faithfulness, "_probability", lambda *_: (probability, torch.zeros(4, dtype=torch.long)))
    pixels = torch.zeros(4, 3, 12, 12)
    pixels[:, :, 8:12, 0:4] = 5
    objects = np.zeros((4, 12, 12), dtype=bool)
    objects[:, 8:12, 0:4] = True
    data = faithfulness.compute(checkpoint, pixels, 0, objects, Protocol(steps=9, inserted="mean"))
    np.testing.assert_allclose(data.measures["deletion"][0], 0.5 / 9)
    np.testing.assert_allclose(data.measures["insertion"][0], 1 - 0.5 / 9)
    assert data.pointing[0].tolist() == data.iou[0].tolist() == [1] * 4
    assert data.pointing[2].tolist() == [0] * 4  # it is a corner
    rows = faithfulness.table([data])
    gap = next(row for row in rows if row["map"] == "attention - random" and row["measure"] == "insertion")
    assert gap["mean"] == pytest.approx((data.measures["insertion"][0] - data.measures["insertion"][1]).mean())
    with style.context():
        figure = faithfulness.draw_all([data], rows, style.figure())
    drawn = figure.axes[0].lines[0]
    np.testing.assert_allclose(drawn.get_xydata(), np.stack([100 * data.shares, [1] + [0] * 9], 1))
    assert to_rgb(drawn.get_color()) == to_rgb(style.BLUE)
    assert [axes.get_title() for axes in figure.axes] == ["deletion", "insertion", "pointing game", "IoU"]


@pytest.fixture
def marked(tmp_path):
    """A function that writes 16 x 12 images and the lines of their metadata.jsonl; returns the folder."""

    def write(*lines, masks=()):
        folder = tmp_path / "marked"
        (folder / "masks").mkdir(parents=True)
        for number in range(len(lines)):
            pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            lines[number]["file_name"] = f"{number}.png"
        for number, mask in enumerate(masks):
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
            lines[number]["mask_file_name"] = f"masks/{number}.png"
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return write


def boxes(*found):
    return {"objects": {"bbox": [list(map(float, box)) for box in found]}}


def test_the_command_with_boxes(karat, softmax, marked, analyse):
    folder = marked(*[boxes([2, 3, 6, 5], [0, 0, 2, 2]) for _ in range(4)])
    words = ("faithfulness", "--model", karat, "--compare", softmax, "--annotated", folder, "--steps", 3)
    out = analyse(*words, "--resamples", 50)
    assert sorted(path.name for path in out.iterdir()) == [
        f"faithfulness.{end}" for end in ("csv", "npz", "png", "svg")
    ]
    arrays = np.load(out / "faithfulness.npz")
    assert arrays["model_deletion_curves"].shape == arrays["compare_insertion_curves"].shape == (3, 4, 4)
    rows = rows_of(out / "faithfulness.csv")
    assert {row["model"] for row in rows} == {"karat", "softmax", "karat - softmax"}
    assert {row["measure"] for row in rows} == set(faithfulness.MEASURES)
    found = {(row["model"], row["map"], row["measure"]): row for row in rows}
    for measure in faithfulness.MEASURES:
        ours, theirs = arrays[f"model_{measure}"][0], arrays[f"compare_{measure}"][0]
        row = found["karat - softmax", "attention", measure]
        assert float(row["mean"]) == pytest.approx((ours - theirs).mean(), abs=1e-9)
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    # A random and a central map are the same for both models.
    np.testing.assert_array_equal(arrays["model_iou"][1:], arrays["compare_iou"][1:])
    numbers = [
        {**row, **{key: float(row[key]) for key in ("mean", "low", "high")}, "images": int(row["images"])}
        for row in rows
    ]
    text = faithfulness.text(numbers)
    assert f"| karat           | attention          | {numbers[0]['mean']:.3f} [" in text
    assert "Means over 4 images and their 95% intervals." in text


def test_images_without_objects_have_two_measures(karat, photos, analyse):
    out = analyse("faithfulness", "--model", karat, "--images", photos, "--steps", 2, "--map", "rollout")
    rows = rows_of(out / "faithfulness.csv")
    assert {row["measure"] for row in rows} == {"deletion", "insertion"}
    assert [row["images"] for row in rows] == ["6"] * 8
    assert "model_pointing" not in np.load(out / "faithfulness.npz")


def test_boxes_and_masks_say_where_objects_are(karat, marked, tmp_path):
    mask = np.zeros((12, 16), dtype=np.uint8)
    mask[3:8, 2:8] = 1
    folder = marked(boxes([2, 3, 6, 5]), boxes([-0.4, 0, 16.4, 12]))
    found, objects = find_annotated(folder, None, 5)
    assert [name for _, name, _ in found] == ["0.png", "1.png"]
    np.testing.assert_array_equal(objects[0], mask > 0)
    assert objects[1].all()
    _, others = find_annotated(folder, "train", 5, box_format="xyxy")
    assert others[0][3:5, 2:6].all() and others[0].sum() == 8
    # The processor squashes 16 x 12 to 12 x 12, images and objects alike.
    checkpoint = load_checkpoint(karat)
    seen = as_seen(checkpoint, objects)
    assert prepare(checkpoint, found).pixels.shape[2:] == seen.shape[1:] == (12, 12)
    assert seen[1].all() and set(np.flatnonzero(seen[0].any(1))) == set(range(3, 8))
    columns = np.flatnonzero(seen[0].any(0))
    assert abs(columns[0] - 1.5) <= 1 and abs(columns[-1] - 5) <= 1
    # A data set with the same in a column of masks.
    features = datasets.Features({"picture": datasets.Image(), "mask": datasets.Image()})
    rows = {"picture": [found[0][0]] * 2, "mask": [Image.fromarray(mask)] * 2}
    datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "set")
    _, masks = find_annotated(str(tmp_path / "set"), None, 5)
    np.testing.assert_array_equal(masks, [mask > 0] * 2)


def test_masks_beside_the_images(marked):
    mask = np.zeros((12, 16), dtype=np.uint8)
    mask[4, 5] = 255
    _, objects = find_annotated(marked({}, {}, masks=[mask, 255 - mask]), None, 5)
    np.testing.assert_array_equal(objects, [mask > 0, mask == 0])


@pytest.mark.parametrize(
    "lines, masks, message",
    [
        ([boxes([2, 3, 6, 5]), {"objects": {"bbox": []}}], (), r"image 1 \(1.png\) has no box"),
        ([boxes([2, 3, 6, 5]), boxes([12, 3, 13, 5])], (), r"\(1.png\) has 16 x 12 pixels, and the box .*--box-format"),
        ([boxes([2, 3, 0, 5])], (), "not inside"),
        ([{"objects": {"bbox": [[1.0, 2, 3]]}}], (), "expected four numbers"),
        ([{"text": "a"}], (), "marks no objects.*It has text, image"),
        ([{}], [np.ones((5, 5), dtype=np.uint8)], "its mask 5 x 5: expected the same"),
        ([{}], [np.zeros((12, 16), dtype=np.uint8)], "a mask that is black"),
    ],
)
def test_objects_that_cannot_be_used(lines, masks, message, marked):
    with pytest.raises(InputError, match=message):
        find_annotated(marked(*lines, masks=masks), None, 5)


def test_what_cannot_be_measured(karat, photos, marked, refusal, tmp_path):
    words = ("faithfulness", "--model", karat)
    folder = marked(boxes([2, 3, 6, 5]))
    assert "Give one of them" in refusal(*words, "--images", photos, "--annotated", folder)
    assert "Give one of them" in refusal(*words, "--data-set", photos, "--annotated", folder)
    assert "`--split` is one of --annotated" in refusal(*words, "--images", photos, "--split", "test")
    assert "argument --share: 1.5" in refusal(*words, "--images", photos, "--share", 1.5)
    assert "two or more" in refusal(*words, "--annotated", folder)
    assert "`--split` is 'test': " in refusal(*words, "--annotated", folder, "--split", "test")
    assert "cannot be read" in refusal(*words, "--annotated", tmp_path / "nowhere")
    assert "block 2, and the model has 2" in refusal(*words, "--images", photos, "--block", 2)
    headless = karat_model().vit
    kept = save(headless, tmp_path / "headless")
    assert "no classifier" in refusal("faithfulness", "--model", kept, "--images", photos)
    uncovered = save(karat_model(image_size=14), tmp_path / "uncovered")
    assert "14 x 14 pixels to no patch of 4 x 4" in refusal("faithfulness", "--model", uncovered, "--images", photos)
