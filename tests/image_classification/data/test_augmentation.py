# SPDX-License-Identifier: Apache-2.0
"""Augmentation: by key and nothing else, timm's formulas, and repeated augmentation."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch.utils.data import DataLoader

from image_classification.data.augmentation import (
    REPEATS,
    Mix,
    RepeatedAugmentation,
    auto_augment,
    collate,
    make_collate,
    random_numbers,
)
from image_classification.data.dataset import ImageDataset
from image_classification.data.transforms import TrainTransform, build_image_processor
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments
from tests.images import colour_image, encode


RECIPE = {
    "auto_augment": "rand-m15-n2-mstd1.0-inc1",
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "train_interpolation": "bicubic",
}


def make_dataset(count: int = 10, repeated: bool = False, **options) -> ImageDataset:
    args = DataArguments(**{**RECIPE, **options})
    images = [{"bytes": encode(colour_image("red", index, (24, 20)), "PNG"), "path": None} for index in range(count)]
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    split = Dataset.from_dict({"image": images, "label": [index % 3 for index in range(count)]}, features=features)
    transform = TrainTransform(args, 16, build_image_processor(args, 16))
    return ImageDataset(split, transform, "training", seed=7, repeated=repeated)


def states():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def test_random_numbers_come_from_the_key_and_leave_others_alone():
    def draw(*key):
        with random_numbers(*key):
            return random.random(), np.random.rand(), torch.rand(()).item()

    before = states()
    first = draw(1, 2, 3)
    assert states() == before
    random.random(), np.random.rand(), torch.rand(3)
    assert draw(1, 2, 3) == first
    assert all(a != b for a, b in zip(draw(1, 2, 4), first))


def batches(dataset, workers: int, epoch: int):
    dataset.set_epoch(epoch)
    mix = Mix(DataArguments(**RECIPE), 3)
    return list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=mix))


@pytest.mark.system
def test_batches_do_not_depend_on_workers_and_change_with_the_epoch():
    dataset = make_dataset()
    alone, shared, later = batches(dataset, 0, 1), batches(dataset, 2, 1), batches(dataset, 0, 2)
    for one, other in zip(alone, shared):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])
    assert not any(torch.equal(one["pixel_values"], other["pixel_values"]) for one, other in zip(alone, later))


def rows(count: int):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": index % 3, "key": (0, 0, index)}
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [1, 6, 7])
def test_mixup_is_a_weighted_mean_of_images_and_labels(count):
    """x = lam x + (1 - lam) flipped x, and the labels alike; an odd one out stays as it is."""
    plain, mixed = collate(rows(count)), Mix(DataArguments(mixup=0.8), 3)(rows(count))
    one_hot = torch.nn.functional.one_hot(plain["labels"], 3).float()
    torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(count))
    even = count - count % 2
    images, partners = plain["pixel_values"][:even], plain["pixel_values"][:even].flip(0)
    if even:
        difference = images - partners
        lam = ((mixed["pixel_values"][:even] - partners) * difference).sum() / difference.square().sum()
        assert 0 < lam < 1
        torch.testing.assert_close(mixed["pixel_values"][:even], lam * images + (1 - lam) * partners)
        torch.testing.assert_close(mixed["labels"][:even], lam * one_hot[:even] + (1 - lam) * one_hot[:even].flip(0))
    assert torch.equal(mixed["pixel_values"][even:], plain["pixel_values"][even:])
    assert torch.equal(mixed["labels"][even:], one_hot[even:])


def test_cutmix_labels_follow_the_area():
    plain, mixed = collate(rows(6)), Mix(DataArguments(cutmix=1.0), 3)(rows(6))
    share = (mixed["pixel_values"] == plain["pixel_values"])[:, 0].float().mean((1, 2))
    one_hot = torch.nn.functional.one_hot(plain["labels"], 3).float()
    expected = share[:, None] * one_hot + (1 - share[:, None]) * one_hot.flip(0)
    torch.testing.assert_close(mixed["labels"], expected)


def test_evaluation_is_not_mixed():
    """A data set makes its own batches."""
    args = DataArguments(**RECIPE)
    train, held_out = make_dataset(4), make_dataset(4)
    held_out.seed = None
    train.collate = make_collate(args, 3)
    batches = [dataset.collate(dataset.__getitems__(range(4))) for dataset in (train, held_out)]
    assert batches[0]["labels"].shape == (4, 3) and batches[1]["labels"].tolist() == [0, 1, 2, 0]
    assert make_collate(DataArguments(), 3) is collate


def test_repeated_augmentation():
    """Each image three times in a row and augmented anew, as many items as images, another order in each epoch."""
    dataset = make_dataset(12, repeated=True)
    sampler = RepeatedAugmentation(len(dataset), seed=7)
    items = list(sampler)
    assert len(items) == len(sampler) == 12
    images = [item % 12 for item in items]
    assert images[0::3] == images[1::3] == images[2::3]
    assert len(set(images)) == 12 // REPEATS
    copies = [dataset[item]["pixel_values"] for item in items[:REPEATS]]
    assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])
    sampler.set_epoch(1)
    assert list(sampler) != items


def test_random_erasing_erases_normalised_pixels():
    args = {"auto_augment": None, "color_jitter": 0.0, "random_erasing": 1.0, "random_erasing_mode": "const"}
    zeros = [(row["pixel_values"] == 0).all(0).float().mean() for row in make_dataset(**args)]
    assert all(0.01 < share < 0.5 for share in zeros)


@pytest.mark.parametrize("policy", ["rand-m15-n2-mstd1.0-inc1", "original", "augmix-m5-w4-d2"])
def test_policies_at_every_level(policy):
    """None of the operations fails on any image, at the strongest level either."""
    image = colour_image("green", 0, (24, 24))
    (transform,) = auto_augment(DataArguments(auto_augment=policy), (24, 24), (0.5, 0.5, 0.5))
    for seed in range(150):
        with random_numbers(seed):
            assert transform(image).size == (24, 24)


@pytest.mark.parametrize(
    "policy",
    "rand-m99-x3|nonsense|rand-mfoo|rand-|rand-n|rand-n0|rand-n1000000|rand-n9-n-3|rand-m-5|rand-p2|rand-mstdinf|"
    "rand-inc2|rand-tfoo|rand-n50-t3aw|randm9|augmix-w0|augmix-d100000000|augmix-foo|original-|original-m9".split("|"),
)
def test_an_unknown_policy_is_an_error_that_shows_known_ones(policy):
    """So is one whose parts timm would drop, or that would not end."""
    with pytest.raises(InputError, match=f"'{policy}', which timm does not know.*rand-m15-n2-mstd1.0-inc1"):
        make_dataset(auto_augment=policy)


@pytest.mark.parametrize("policy", ["rand", "rand-m9-n3-mstd0.5-mmax12-p1.0-inc1", "rand-m7-tweights", "augmix", "v0r"])
def test_policies_that_timm_knows(policy):
    assert auto_augment(DataArguments(auto_augment=policy), (24, 24), (0.5, 0.5, 0.5))
