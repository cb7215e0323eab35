# SPDX-License-Identifier: Apache-2.0
"""Images to look at a model with: files, folders, or the held-out images of the data set that it was trained on."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from image_classification.data.folders import files_below
from image_classification.data.images import decode, read_image
from image_classification.data.sources import ImageData, load_data
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments

from .models import Checkpoint


# An image, its name (the file's, or its number in the data set), and its class if that is known.
Found = tuple[Image.Image, str, str | None]


@dataclass
class Images:
    """
    Images as a model takes them, and as people see them.

    Args:
        pixels: (B, 3, height, width), as the model takes them.
        pictures: (B, height, width, 3), from 0 to 1: what the model sees, that is, after resizing and cropping.
        names: of the files, or numbers in the data set.
        labels: true classes where they are known, otherwise `None`.
    """

    pixels: torch.Tensor
    pictures: np.ndarray
    names: list[str]
    labels: list[str | None]

    def __len__(self) -> int:
        return len(self.names)


def load_images(
    checkpoint: Checkpoint, paths: list[str] | None, count: int, seed: int = 0, data_set: str | None = None
) -> Images:
    """Find images by `find_images` for one model, and prepare them for it."""
    return prepare(checkpoint, find_images([checkpoint], paths, count, seed, data_set))


def find_images(
    checkpoints: list[Checkpoint],
    paths: list[str] | None,
    count: int,
    seed: int = 0,
    data_set: str | None = None,
    flag: str = "--images",
) -> list[Found]:
    """
    Read images for one or several models.

    Args:
        checkpoints: the models; the first that is of a run says which data set. The class of an image is the name of
            its folder, where that is a class of the first model.
        paths: files, all of which are taken, and folders; `None` for the held-out images of the data set.
        count, seed: how many to draw from the folders, or from the data set, and how.
        data_set: a data set that run_image_classification.py knows by name (`--data_set`), or its folder
            (`--data_path`), instead of paths: its held-out images.
        flag: which flag names the paths, for errors.

    Raises:
        InputError: a path does not exist or holds no image, an image is broken, a checkpoint has no image processor,
            no images are named and no checkpoint is of a run, or they are named twice.
    """
    for checkpoint in checkpoints:
        processor_of(checkpoint)
    if paths is not None and data_set is not None:
        raise InputError("`--images` and `--data-set` both say which images: give one of them.")
    if data_set is not None:
        folder = Path(data_set).is_dir()
        args = DataArguments(data_path=data_set) if folder else DataArguments(data_set=data_set)
        return _of_data(_held_out(args, 0), count, seed)
    if paths is None:
        return _of_run(checkpoints, count, seed, flag)
    return _of_paths(checkpoints[0], paths, count, seed, flag)


def prepare(checkpoint: Checkpoint, found: list[Found]) -> Images:
    """Prepare images as a model takes them, by its image processor."""
    processor = processor_of(checkpoint)
    pictures, names, labels = zip(*found, strict=True)
    pixels = torch.cat([processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    mean, std = (torch.tensor(getattr(processor, key)).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    shown = pixels * std + mean if processor.do_normalize else pixels
    return Images(pixels, shown.clamp(0, 1).permute(0, 2, 3, 1).numpy(), list(names), list(labels))


def processor_of(checkpoint: Checkpoint) -> BaseImageProcessor:
    """Find the image processor beside a model. Raises `InputError` where there is none."""
    if checkpoint.processor is None:
        raise InputError(
            f"{checkpoint.source} has no image processor (preprocessor_config.json), so how its images were prepared "
            "is not known. Save one beside it: ViTImageProcessor(...).save_pretrained(folder)."
        )
    return checkpoint.processor


def _of_paths(checkpoint: Checkpoint, paths: list[str], count: int, seed: int, flag: str) -> list[Found]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, in_folders = [], []
    for path in map(Path, paths):
        if path.is_dir():
            inside = files_below(path, suffixes)
            if not inside:
                raise InputError(f"`{flag}` {path} holds no images.")
            in_folders += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"`{flag}` {path} does not exist.")
    files += [in_folders[index] for index in draw_numbers(len(in_folders), count, seed)]
    classes = set(checkpoint.labels)
    labels = [file.parent.name if file.parent.name in classes else None for file in files]
    return [(read_image(file), file.name, label) for file, label in zip(files, labels)]


def _of_run(checkpoints: list[Checkpoint], count: int, seed: int, flag: str) -> list[Found]:
    source, run = next(((each.source, each.run) for each in checkpoints if each.run is not None), ("", None))
    if run is None:
        raise InputError(
            f"{checkpoints[0].source} is of no run of run_image_classification.py (no run.json), so its data set is "
            f"not known. Name images with {flag}."
        )
    settings = run["settings"]
    fields = {field.name for field in dataclasses.fields(DataArguments)}
    args = DataArguments(**{key: value for key, value in settings.items() if key in fields})
    try:
        data = _held_out(args, settings["seed"])
    except InputError as error:
        raise InputError(f"The data set of {source} is not there: {error} Or name {flag}.") from error
    return _of_data(data, count, seed)


def _held_out(args: DataArguments, seed: int) -> ImageData:
    # Those drawn are decoded later; the others need not be.
    args.check_images, args.max_eval_samples = "none", None
    return load_data(args, seed, train=False)


def _of_data(data: ImageData, count: int, seed: int) -> list[Found]:
    split = data.validation
    return [
        (decode(row["image"], f"validation image {index}"), f"{index}", data.labels[row["label"]])
        for index in draw_numbers(len(split), count, seed)
        for row in [split[index]]
    ]


def draw_numbers(size: int, count: int, seed: int) -> list[int]:
    """Draw `count` of the numbers below `size`, or all if there are fewer; in order."""
    order = np.random.default_rng(seed).permutation(size)[:count]
    return sorted(order.tolist())
