# SPDX-License-Identifier: Apache-2.0
"""
Augmentation as in timm and DeiT: RandAugment and its like, random erasing, mixup and CutMix, repeated augmentation.

The operations are timm's. Their random numbers come from the generators of Python, NumPy and PyTorch; `random_numbers`
seeds all three for one image or one batch, so that what an image becomes depends on the run's seed, the epoch and its
index alone: not on workers, nor on what was read before, nor on whether the run was resumed.
"""

import contextlib
import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import InputError
from ..settings.arguments import DataArguments


REPEATS = 3  # Of an image in a batch under repeated augmentation, as in DeiT.
# What may stand between the dashes of a policy; timm drops what it does not know, `mfoo` and `n` alike.
_COUNT, _NUMBER = r"([1-9]|[1-5]\d|6[0-4])", r"\d{1,9}(\.\d*)?"
_SECTIONS = {
    "rand": rf"m\d{{1,4}}|mmax\d{{1,4}}|mstd{_NUMBER}|n{_COUNT}|p(0(\.\d*)?|1(\.0*)?)|inc[01]|t(weights|3aw?)",
    "augmix": rf"m\d{{1,4}}|mstd{_NUMBER}|w{_COUNT}|d{_COUNT}|a{_NUMBER}|b[01]",
}


@contextlib.contextmanager
def random_numbers(*key: int) -> Iterator[None]:
    """Within it, the generators of Python, NumPy and PyTorch (on the CPU) start from `key`; outside, they go on."""
    with own_generators():
        seed_generators(*key)
        yield


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Whatever is seeded or drawn within it, outside the generators of Python, NumPy and PyTorch (CPU) go on."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """The generators of Python, NumPy and PyTorch (CPU) start from `key`."""
    python, numpy, pytorch = (int(word) for word in np.random.SeedSequence(key).generate_state(3, np.uint32))
    random.seed(python)
    np.random.seed(numpy)
    # Not `torch.manual_seed`: it looks after every other device as well, and took longer than all the drawing.
    torch.default_generator.manual_seed(pytorch)


def auto_augment(args: DataArguments, size: tuple[int, int], mean) -> list:
    """
    The transform of `args.auto_augment`, PIL to PIL, as timm's training transforms have it; none without it. Raises
    `InputError` where timm is not installed, or does not know the policy.
    """
    if (policy := args.auto_augment) is None:
        return []
    data = _timm_data()
    parameters = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in mean),
        "interpolation": data.transforms.str_to_pil_interp(args.train_interpolation),
    }
    kind, *sections = policy.split("-")
    try:
        if not all(re.fullmatch(_SECTIONS.get(kind, f"mstd{_NUMBER}"), section, re.ASCII) for section in sections):
            raise ValueError("a part that timm would drop")
        if kind == "rand":
            transform = data.rand_augment_transform(policy, parameters)
            weights = transform.choice_weights  # Under which no operation is chosen twice.
            if weights is not None and transform.num_layers > np.count_nonzero(weights):
                raise ValueError("more operations than there are")
        elif kind == "augmix":
            transform = data.auto_augment.augment_and_mix_transform(policy, parameters | {"translate_pct": 0.3})
        else:
            transform = data.auto_augment.auto_augment_transform(policy, parameters)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"`auto_augment` (--aa) is {policy!r}, which timm does not know. Expected RandAugment as in "
            "'rand-m9-mstd0.5-inc1' (the recipe: 'rand-m15-n2-mstd1.0-inc1'), a policy as 'original' or 'v0', "
            "'augmix-m5-w4-d2', or none."
        ) from error
    operations = getattr(transform, "ops", None) or [op for policy in transform.policy for op in policy]
    for operation in operations:
        if operation.aug_fn is data.auto_augment.posterize:
            operation.aug_fn = _posterize
    return [transform]


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's, and black at 0 bits, which its strongest level asks for and which Pillow 13 refuses."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def random_erasing(args: DataArguments) -> list:
    """Erasing of normalised tensors, by timm; none at probability 0."""
    if args.random_erasing == 0:
        return []
    return [
        _timm_data().random_erasing.RandomErasing(
            args.random_erasing, mode=args.random_erasing_mode, max_count=args.random_erasing_count, device="cpu"
        )
    ]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of `ImageDataset` -> `pixel_values` (B, 3, height, width) and `labels` (B,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.long),
    }


class Mix:
    """
    `collate`, then mixup or CutMix by timm: labels become probabilities (B, classes); label smoothing is the loss's.
    The last image of a batch of odd size has no partner and stays as it is.
    """

    def __init__(self, args: DataArguments, classes: int):
        self.classes = classes
        self.mixup = _timm_data().Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=0.0,
            num_classes=classes,
        )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        return self.mix(batch["pixel_values"], batch["labels"], rows[0]["key"])

    def mix(self, images: torch.Tensor, labels: torch.Tensor, key: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Images (B, 3, height, width), which are changed, and labels (B,), with the random numbers of `key`."""
        even = len(labels) - len(labels) % 2
        targets = torch.nn.functional.one_hot(labels, self.classes).to(images.dtype)
        if even:
            with random_numbers(*key):
                _, targets[:even] = self.mixup(images[:even], labels[:even])
        return {"pixel_values": images, "labels": targets}


def mixes(args: DataArguments) -> bool:
    """Whether batches have mixup or CutMix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_cutmix(args: DataArguments, size: tuple[int, int]) -> None:
    """Raise an `InputError` unless the smallest part of CutMix is smaller than its largest, in whole pixels."""
    if args.cutmix_minmax is None:
        return
    for side in size:
        low, high = (int(side * share) for share in args.cutmix_minmax)
        if low >= high:
            raise InputError(f"`cutmix_minmax`: of {side} pixels these are {low} and {high}. Expected a larger second.")


def make_collate(args: DataArguments, classes: int):
    """What makes a training batch of rows of `ImageDataset`."""
    return Mix(args, classes) if mixes(args) else collate


class RepeatedAugmentation(torch.utils.data.Sampler):
    """
    Repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT's): each image comes `REPEATS` times in a row,
    augmented anew each time, and an epoch has as many items as without it, so a third of the images.

    Items are image + repetition * length: `ImageDataset` takes them apart.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for position in range(self.length):
            image, repetition = divmod(position, REPEATS)
            yield int(order[image]) + repetition * self.length


def _timm_data():
    try:
        import timm.data

        return timm.data
    except ImportError as error:
        raise InputError("RandAugment, erasing and mixing are timm's, not installed: pip install timm.") from error
