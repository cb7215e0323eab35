# SPDX-License-Identifier: Apache-2.0
"""What is drawn for a block of items is distributed as timm and torchvision draw it for one image after another."""

import contextlib
import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import auto_augment as timm_operations
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torchvision.transforms import v2

from image_classification.data.augmentation import auto_augment, random_erasing
from image_classification.device_pipeline import draws
from image_classification.device_pipeline.draws import (
    BOX,
    CODES,
    FLIP,
    LAYERS,
    LEVELS,
    MATRICES,
    MIX,
    SEED,
    WORDS,
    Draws,
)
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments


SIZE, MEAN = (40, 48), (0.485, 0.456, 0.406)
ROWS, THEIRS = 20_000, 4000
LEAST = 1e-4  # Probability below which two samples are not of one distribution. The seeds are fixed.
CPU = torch.device("cpu")
AFFINE = CODES["Affine"]


@contextlib.contextmanager
def seeded():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    yield
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])


def make(**options) -> Draws:
    return Draws(DataArguments(**{"color_jitter": 0.0, **options}), SIZE, MEAN, 5)


def table(rows: int = ROWS, sides=None, **options) -> np.ndarray:
    sides = None if sides is None else torch.tensor(sides).expand(rows, 2)
    return make(**options).draw(CPU, 0, 0, rows, sides).double().numpy()


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Each column, and sums of neighbouring ones, which would tell if they went together otherwise."""
    for weights in [*np.eye(ours.shape[1]), *(np.eye(ours.shape[1]) + np.eye(ours.shape[1], k=1))[:-1]]:
        scale = theirs.std(0) + 1e-9
        first, second = (np.round(columns / scale @ weights, 6) for columns in (ours, theirs))
        assert stats.ks_2samp(first, second).pvalue > LEAST, weights


def check_counts(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Of categories."""
    values = np.union1d(ours, theirs)
    counts = [[(sample == value).sum() for value in values] for sample in (ours, theirs)]
    common = np.sum(counts, 0) >= 20
    assert len(values) == 1 or stats.chi2_contingency(np.array(counts)[:, common]).pvalue > LEAST


@pytest.mark.parametrize(
    "sides, options",
    [
        ((60, 90), {}),
        ((300, 40), {}),
        ((20, 90), {}),
        ((9, 200), {"train_crop_scale": [0.5, 1.0]}),
        ((40, 40), {}),
        ((50, 60), {"train_crop_scale": [0.2, 0.4], "train_crop_ratio": [0.5, 0.8]}),
    ],
)
def test_crops(sides, options):
    args = DataArguments(**options)
    crop = v2.RandomResizedCrop(SIZE, tuple(args.train_crop_scale), tuple(args.train_crop_ratio))
    with seeded():
        drawn = [crop.make_params([torch.empty(3, *sides, device="meta")]) for _ in range(THEIRS)]
    theirs = np.array([[one[name] for name in ("top", "left", "height", "width")] for one in drawn], dtype=float)
    ours = table(sides=sides, **options)[:, BOX:FLIP]
    check_same(ours, theirs)
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= sides).all() and (ours[:, 2:] > 0).all()
    if sides == (9, 200):  # Too narrow for any try: the middle.
        assert (ours == [0, 94, 9, 12]).all()


def test_flips_seeds_and_colour_jitter():
    drawn = table(color_jitter=0.4, horizontal_flip=0.3)
    assert stats.binomtest(int(drawn[:, FLIP].sum()), ROWS, 0.3).pvalue > LEAST
    assert len(np.unique(drawn[:, SEED])) > 0.99 * ROWS and drawn[:, SEED].max() < 2**24
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    codes = [CODES[name] for name in ("Brightness", "Contrast", "Color")]
    theirs = []
    with seeded():
        for _ in range(THEIRS):
            one = jitter.make_params([])
            factors = [one["brightness_factor"], one["contrast_factor"], one["saturation_factor"]]
            order = [i for i in one["fn_idx"].tolist() if i < 3]
            theirs.append([*(codes[i] for i in order), *(factors[i] for i in order)])
    theirs, layers = np.array(theirs), drawn[:, LAYERS:].reshape(ROWS, 3, WORDS)
    check_counts(layers[:, :, 0] @ [1, 20, 400], theirs[:, :3] @ [1, 20, 400])
    check_same(layers[:, :, 1], theirs[:, 3:])


def recorded(transform) -> list[list[tuple]]:
    """What timm's policy does to each of many images: names and numbers."""
    operations = [op for choice in getattr(transform, "policy", None) or [transform.ops] for op in choice]
    for op in operations:
        op.aug_fn = lambda before, *numbers, name=op.name, **_: [*before, (name, *numbers)]
    with seeded():
        return [transform([]) for _ in range(THEIRS)]


def words(name: str, number: float) -> np.ndarray:
    """As a row has them."""
    number = torch.tensor(float(number), dtype=torch.float64)
    numbers = MATRICES[name](number, *SIZE) if name in MATRICES else (number,)
    return np.array([draws.code_of(name), *map(float, numbers), *[0.0] * (6 - len(numbers))])


def applied(rows: np.ndarray) -> list[np.ndarray]:
    return [row[row[:, 0] > 0] for row in rows]


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m15-n2-mstd1.0-inc1",
        "rand-m9-n3-mstd0.5",
        "rand-m9-n3-tweights-mstd0.5",
        "rand-m8-n2-mstd101-p0.7",
        "rand-m12-n1-mmax15-mstd2-inc1",
        "original-mstd0.5",
        "v0r",
        "v0-mstd1",
    ],
)
def test_policies(policy):
    """Which operations follow each other, and their numbers, one operation at a time."""
    (transform,) = auto_augment(DataArguments(auto_augment=policy), SIZE, MEAN)
    theirs = [[words(*op, *[0] * (2 - len(op))) for op in one] for one in recorded(transform)]
    drawn = table(auto_augment=policy)[:, LAYERS:]
    ours = applied(drawn.reshape(ROWS, -1, WORDS))
    check_counts(*(np.array([len(one) for one in sample]) for sample in (ours, theirs)))
    for position in range(drawn.shape[1] // WORDS):
        first, second = (
            np.array([one[position] for one in sample if len(one) > position]).reshape(-1, WORDS)
            for sample in (ours, theirs)
        )
        # The affine ones are told apart by which numbers of the matrix change.
        kinds = [(np.abs(one[:, 1:] - [1, 0, 0, 0, 1, 0]) > 1e-9) @ [1, 2, 4, 8, 16, 32] for one in (first, second)]
        kinds = [
            np.where(one[:, 0] == AFFINE, 100 + k, one[:, 0]) for one, k in zip((first, second), kinds, strict=True)
        ]
        check_counts(*kinds)
        for kind in np.unique(kinds[1]):
            samples = [one[k == kind] for one, k in zip((first, second), kinds, strict=True)]
            if min(map(len, samples)) > 20:
                for word in range(1, WORDS):
                    a, b = (sample[:, word].astype(np.float32) for sample in samples)
                    # What both round in their own ways.
                    assert stats.ks_2samp(np.round(a, 4), np.round(b, 4)).pvalue > LEAST, (kind, word)
    pairs = [np.array([sum(20**i * op[0] for i, op in enumerate(one)) for one in sample]) for sample in (ours, theirs)]
    check_counts(*pairs)


@pytest.mark.parametrize("name", LEVELS)
def test_every_magnitude_is_timms(name):
    hparams = {"translate_const": 21, "img_mean": MEAN}
    level_fn = timm_operations.LEVEL_TO_ARG[name]
    for magnitude in (0, 0.3, 1, 2, 3.7, 4, 5, 6, 7, 8, 9, 9.6, 10, 15):
        with seeded():
            theirs = {level_fn(magnitude, hparams)[0] for _ in range(40)} if level_fn is not None else {0}
        level = torch.tensor(magnitude / 10, dtype=torch.float64)
        ours = {float(LEVELS[name](level, torch.tensor(sign, dtype=torch.float64), hparams)) for sign in (-1.0, 1.0)}
        assert sorted(ours) == pytest.approx(sorted(map(float, theirs))), magnitude
    assert set(LEVELS) >= set(timm_operations._RAND_TRANSFORMS + timm_operations._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("mode, count", [("const", 1), ("rand", 1), ("pixel", 3), ("rand", 4)])
def test_erased_parts(mode, count):
    options = {"random_erasing": 0.6, "random_erasing_mode": mode, "random_erasing_count": count}
    (erasing,) = random_erasing(DataArguments(**options))

    class Image:
        dtype = torch.float32

        def size(self):
            return torch.Size((3, *SIZE))

        def __setitem__(self, part, colour):
            rows, columns = part[1:]
            boxes.append([rows.start, rows.stop, columns.start, columns.stop, *colour.flatten()[:3].tolist()])

    theirs = np.zeros((THEIRS, count, WORDS))
    with seeded():
        for row in theirs:
            boxes = []
            erasing(Image())
            row[: len(boxes)] = np.array(boxes).reshape(-1, WORDS)
    ours = table(**options)[:, LAYERS:].reshape(ROWS, count, WORDS)
    used = [sample[..., 1] > 0 for sample in (ours, theirs)]
    # timm goes on to the next part, so a part that is not found leaves no gap there.
    check_counts(*(one.sum(1) for one in used))
    boxes = [sample[one] for sample, one in zip((ours, theirs), used, strict=True)]
    check_same(*(one[:, :4] for one in boxes))
    assert (boxes[0][:, :4] >= 0).all() and (boxes[0][:, [1, 3]] <= SIZE).all()
    if mode == "rand":
        check_same(*(one[:, 4:] for one in boxes))
    else:
        assert not boxes[0][:, 4:].any()


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.3},
        {"mixup": 0.1},
        {"cutmix": 0.5, "mixup_prob": 0.6},
        {"mixup": 0.4, "cutmix_minmax": [0.3, 0.6]},
        {"mixup": 2.0, "mixup_prob": 0.7},
    ],
)
def test_mixing(options):
    args = DataArguments(**options)
    mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, num_classes=3)
    theirs = np.zeros((THEIRS, 6))
    with seeded():
        for row in theirs:
            share, pasted = mixup._params_per_batch()
            row[:] = [share, 0, 0, 0, 0, share]
            if pasted and share != 1:
                box, share = cutmix_bbox_and_lam((3, *SIZE), share, args.cutmix_minmax)
                row[:] = [1, *box[:2], *box[2:], share]
    ours = table(**options)[:, MIX:LAYERS]
    check_counts(*(sample[:, 2] > 0 for sample in (ours, theirs)))
    check_same(ours, theirs)
    none = table(rows=3)[:, MIX:LAYERS]
    assert not none.any()


def test_the_key_decides_and_nothing_else():
    drawn = make(mixup=0.8, auto_augment="rand-m9-mstd0.5", random_erasing=0.5)
    first = drawn.draw(CPU, 2, 1, 50)
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first, drawn.draw(CPU, 2, 1, 50))
    for key in ((2, 0), (3, 1)):
        assert not torch.equal(first, drawn.draw(CPU, *key, 50))
    drawn.seed = 6
    assert not torch.equal(first, drawn.draw(CPU, 2, 1, 50))


@pytest.mark.parametrize("policy, named", [("augmix-m5-w4-d2", "chains"), ("3a", "GaussianBlurRand")])
def test_what_only_workers_do_is_refused(policy, named):
    with pytest.raises(InputError, match=f"{named}.*--augment_on workers"):
        make(auto_augment=policy)
