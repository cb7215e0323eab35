# SPDX-License-Identifier: Apache-2.0
"""The images and labels of a split: that both are there, the classes, a part held out, images that cannot be read."""

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset
from tqdm.auto import tqdm

from ..errors import InputError
from .images import decode
from .local import reading


logger = logging.getLogger(__name__)

# Larger sets are not decoded from one end to the other before training starts, unless asked for.
CHECK_UP_TO = 20_000
# That plain integers may number; more than there are images make no sense either.
MOST_CLASSES = 100_000
# Types of a column of class names; Pandas makes the second, of a CSV.
NAMES = ("string", "large_string")


def image_and_label(split: Dataset | IterableDataset, image: str, label: str, where: str) -> Dataset | IterableDataset:
    """
    The images of a split, undecoded, and the labels, as the columns `image` and `label`. Raises `InputError` where one
    is missing, or (of a stream: as far as that is known before it is read) of another type, or some rows lack it.
    """
    for column in (image, label):
        if column not in split.features:
            raise InputError(f"{where} has no column {column!r}: {', '.join(split.features)}.")
    split = split.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    split = split.rename_columns(renamed) if renamed else split
    kind = split.features["label"]
    if not isinstance(kind, ClassLabel) and not getattr(kind, "dtype", "").startswith(("int", "uint", *NAMES)):
        raise InputError(f"{where}: the labels, {label!r}, are {kind_of(kind)}, expected classes, integers or names.")
    if not isinstance(split, Dataset):
        if not isinstance(kind, ClassLabel):
            raise InputError(
                f"{where}: the label column {label!r} holds {kind_of(kind)}, and the names of the classes are not "
                "known before all is read: streaming takes columns of class labels (datasets.ClassLabel)."
            )
        return split
    if len(split) == 0:
        raise InputError(f"{where} is empty.")
    with reading(where):
        split.data.validate(full=True)  # Arrow trusts the offsets in a file, and would read beyond its end.
        if split.data.column("label").null_count:
            raise InputError(f"{where}: some images have no label.")
        for part in split.data.column("image").chunks:
            empty = pc.and_(*(pc.is_null(pc.struct_field(part, field)) for field in ("bytes", "path")))
            if pc.any(empty).as_py():
                raise InputError(f"{where}: some rows have no image, neither bytes nor a path.")
    return split


def kind_of(feature: Any) -> str:
    """The type of a column, in words."""
    return type(feature).__name__ if not hasattr(feature, "dtype") else f"{type(feature).__name__} {feature.dtype}"


def class_names(splits: dict[str, Any], name: str) -> list[str]:
    """The names of the classes, which the splits must share."""
    kinds = [split.features["label"] for split in splits.values()]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        first, last = list(kinds[0].names), list(kinds[-1].names)
        if first != last:
            only = sorted(set(first) ^ set(last))
            how = f"only in one of them: {', '.join(only[:5])}" if only else "the same names in another order"
            raise InputError(f"{name}: the classes of the training and the validation split differ ({how}).")
        return first
    if len({getattr(kind, "dtype", None) for kind in kinds}) > 1:
        raise InputError(f"{name}: the label columns of the splits are of different types.")
    values = [split["label"][:] for split in splits.values()]
    if kinds[0].dtype not in NAMES:
        most, images = max(map(max, values)), sum(map(len, values))
        if most >= max(MOST_CLASSES, images):
            raise InputError(
                f"{name}: the largest label is {most:,}, and integers count classes from 0: expected fewer than "
                f"{max(MOST_CLASSES, images):,}. For labels that are names, make the column one of strings."
            )
        return [str(index) for index in range(most + 1)]
    names = sorted(set(values[0]))
    if unknown := sorted(set(values[-1]) - set(names)):
        raise InputError(f"{name}: the class {unknown[0]!r} of the validation split is not in the training split.")
    return names


def check_labels(split: Dataset, labels: list[str], where: str, several: bool) -> None:
    """Raise an `InputError` unless every label is of a class, and, where `several`, of two classes or more."""
    found = np.unique(split["label"][:])
    if found.dtype.kind in "iu" and (found[0] < 0 or found[-1] >= len(labels)):
        wrong = found[0] if found[0] < 0 else found[-1]
        hint = " (a split without labels?)" if wrong < 0 else ""
        raise InputError(f"{where}: label {wrong} is outside the {len(labels)} classes{hint}.")
    if several and len(found) < 2:
        only = labels[int(found[0])] if found.dtype.kind in "iu" else found[0]
        raise InputError(f"{where}: every image is of the class {str(only)!r}. A classifier needs two classes or more.")


def hold_out(train: Dataset, fraction: float, seed: int, name: str) -> tuple[dict[str, Dataset], str]:
    """Split a part off, of every class, to evaluate on; and a note that says so."""
    classes = len(np.unique(train["label"][:]))
    held_out = round(len(train) * fraction)
    if held_out < classes or len(train) - held_out < classes:
        raise InputError(
            f"{name} has no validation split, and {fraction:g} of its {len(train)} training images is too little to "
            f"hold out some of each of the {classes} classes. Add a validation split, or change --validation_fraction."
        )
    try:
        split = train.train_test_split(test_size=held_out, stratify_by_column="label", seed=seed)
    except ValueError as error:
        raise InputError(f"{name}: no validation split can be held out: {error}") from error
    note = f"no validation split: {held_out:,} training images are held out (seed {seed}, stratified)"
    return {"train": split["train"], "validation": split["test"]}, note


def check_images(splits: dict[str, Dataset], mode: str, notes: list[str], skip: bool) -> dict[str, set[int]]:
    """
    Decode every image once, so that a broken one is found before the training and not hours into it. With `skip`,
    returns the broken images of the splits that have any, by index, each named in the log.
    """
    total = sum(len(split) for split in splits.values())
    if mode == "none" or (mode == "auto" and total > CHECK_UP_TO):
        if mode == "auto":
            notes.append(f"{total:,} images are checked as they are read; --check_images all decodes them all first")
        return {}
    bad: dict[str, set[int]] = {}
    with (
        tqdm(total=total, desc="Checking images", unit="image", leave=False, delay=2) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for role, split in splits.items():
            for index, error in enumerate(pool.map(functools.partial(_check_one, split, role), range(len(split)))):
                bar.update()
                if error is None:
                    continue
                if not skip:
                    pool.shutdown(cancel_futures=True)
                    raise InputError(f"{error} Or give --skip_bad_images, which goes on without such images.")
                logger.warning(f"Left out: {error}")
                bad.setdefault(role, set()).add(index)
    return bad


def _check_one(split: Dataset, role: str, index: int) -> InputError | None:
    try:
        decode(split[index]["image"], f"{role} image {index}")
    except InputError as error:
        return error
    return None
