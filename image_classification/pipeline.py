# SPDX-License-Identifier: Apache-2.0
"""How images come to the model: what is read, by whom it is transformed, and what the device does with it."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor

from .data.augmentation import check_cutmix, make_collate
from .data.dataset import ImageDataset, ImageSource
from .data.images import decode
from .data.sources import ImageData, load_data
from .data.streaming import StreamedImageDataset, StreamedSplit
from .data.transforms import EvalTransform, TrainTransform
from .device_pipeline.augmentation import DeviceAugmentation, build_augmentation
from .device_pipeline.resident import CropTransform, ResidentDataset, ResidentEvaluation, collate_for_device, read
from .settings.arguments import DataArguments, RunArguments


@dataclass
class InputPipeline:
    """The two data sets of a Trainer, and what its device does with a batch of training."""

    train: ImageSource | None  # `None` where nothing is trained.
    held_out: ImageSource
    augment: DeviceAugmentation | None = None  # Makes a training batch of what was moved to the device.


def load_images(args: DataArguments, run: RunArguments, train: bool = True) -> ImageData:
    """Read the data set of a run, without images to train on where only evaluation is asked for."""
    images = run.max_steps * run.global_batch_size if run.max_steps > 0 else None
    return load_data(args, run.seed, train, images, run.world_size)


def build_pipeline(
    args: DataArguments, run: RunArguments, size: tuple[int, int], data: ImageData, processor: BaseImageProcessor
) -> InputPipeline:
    """The pipeline of a run, with the evaluation's processor. Raises `InputError` as augmentation and transforms do."""
    if data.train is None:
        return InputPipeline(None, _held_out(args, run, size, data, processor))
    check_cutmix(args, size)
    augment = build_augmentation(args, run, size, data, processor)
    held_out = _held_out(args, run, size, data, processor, augment)
    if augment is not None and augment.images is not None:
        return InputPipeline(ResidentDataset(data.train, "training", args.repeated_aug), held_out, augment)
    transform: TrainTransform | CropTransform = CropTransform(args, size)
    how: dict[str, Any] = {"read": read, "collate": collate_for_device}
    if augment is None:
        transform, how = TrainTransform(args, size, processor), {"collate": make_collate(args, len(data.labels))}
    train: ImageDataset
    if args.streaming:
        train = StreamedImageDataset(data.train, transform, "training", run.seed, args.shuffle_buffer, **how)
    else:
        train = ImageDataset(data.train, transform, "training", run.seed, args.repeated_aug, **how)
    return InputPipeline(train, held_out, augment)


def _held_out(args, run, size, data, processor, augment: DeviceAugmentation | None = None) -> ImageSource:
    """The images to evaluate on; where the device augments, they stay there, if they fit beside those of training."""
    if args.streaming:
        return StreamedImageDataset(data.validation, EvalTransform(processor), "validation")
    if augment is not None and ResidentEvaluation.fits(
        len(data.validation), size, processor, run.device, args.resident_share, augment.images
    ):
        return ResidentEvaluation(data.validation, "validation", processor, run.device, run.dataloader_num_workers)
    return ImageDataset(data.validation, EvalTransform(processor), "validation")


def calibration_images(data: ImageData, count: int, seed: int, processor: BaseImageProcessor) -> torch.Tensor:
    """Training images as the evaluation prepares them, (B, 3, height, width): drawn with the seed; a stream's first."""
    split = data.train
    assert split is not None
    if isinstance(split, StreamedSplit):
        rows = list(itertools.islice(split.rows(), count))
    else:
        rows = list(split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:count])))
    prepare = EvalTransform(processor)
    return torch.stack([prepare(decode(row["image"], "a training image")) for row in rows])
