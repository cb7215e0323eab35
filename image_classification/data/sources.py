# SPDX-License-Identifier: Apache-2.0
"""
The data sets: the embedded digits, image folders, parquet and arrow files, and the Hub.

Whatever the source, the result is an `ImageData`: two splits of undecoded images with integer labels, and the names of
the classes. Images are decoded by `images.decode`, whose errors say which image cannot be read.
"""

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError, did_you_mean, more
from ..settings.arguments import DataArguments
from .folders import Walk, files_below, is_folder, visible
from .images import decode


logger = logging.getLogger(__name__)

# Larger sets are not decoded from one end to the other before training starts, unless asked for.
CHECK_UP_TO = 20_000
# That plain integers may number; more than there are images make no sense either.
MOST_CLASSES = 100_000
# Types of a column of class names; Pandas makes the second, of a CSV.
NAMES = ("string", "large_string")
# Beside images, says which class each is of, as Hugging Face's `imagefolder` reads it.
METADATA = ("metadata.csv", "metadata.jsonl")
VALIDATION_NAMES = ("validation", "valid", "val", "test")
# Of the whole digits set; the split is part of the data set and does not follow the run's seed.
DIGITS_HELD_OUT, DIGITS_SEED = 0.2, 0


@dataclass(frozen=True)
class HubDataset:
    """
    Args:
        name, config: of the Hub repository.
        train, validation: its splits.
        image, label: its columns; `None` is read from the features.
        classes: how many there are.
    """

    name: str
    config: str | None
    train: str
    validation: str
    classes: int
    image: str | None = "image"
    label: str | None = "label"


# The sets of the paper, in repositories that need no loading script.
HUB_DATASETS = {
    "CIFAR10": HubDataset("uoft-cs/cifar10", "plain_text", "train", "test", 10, image="img"),
    "CIFAR100": HubDataset("uoft-cs/cifar100", "cifar100", "train", "test", 100, image="img", label="fine_label"),
    "IMNET": HubDataset("ILSVRC/imagenet-1k", None, "train", "validation", 1000),
    "SVHN": HubDataset("ufldl-stanford/svhn", "cropped_digits", "train", "test", 10),
    "STL10": HubDataset("tanganke/stl10", None, "train", "test", 10),
    "Flowers102": HubDataset("dpdl-benchmark/oxford_flowers102", None, "train", "test", 102, image=None, label=None),
}
KNOWN_SETS = ("digits", *HUB_DATASETS)


@dataclass
class ImageData:
    """
    Args:
        name: what the data set is called in logs and the model card.
        train, validation: splits with the columns `image` (undecoded: bytes or path) and `label`. `train` is `None`
            where only evaluation was asked for.
        labels: names of the classes, by index.
        hub_name: its Hub repository, if that is where it comes from.
        notes: what was decided while reading, for the log and the card.
        split: the data set's name of the split that is evaluated on; `None` where a part of the training split is.
    """

    name: str
    train: Dataset | None
    validation: Dataset
    labels: list[str]
    hub_name: str | None
    notes: list[str]
    split: str | None = None


def load_data(args: DataArguments, seed: int, train: bool = True) -> ImageData:
    """
    Read the data set that the arguments name.

    Args:
        args: the data arguments.
        seed: of the split (where one is made) and of `max_train_samples`, `max_eval_samples`.
        train: whether a training split is needed.

    Raises:
        InputError: nothing is named, a folder or split or column is missing or empty, there is only one class, the
            splits' classes differ, or the Hub cannot be reached.
    """
    known = known_set(args)
    notes: list[str] = []
    hub = HUB_DATASETS.get(known) if known else None
    if known == "digits":
        if args.data_path is not None:
            raise InputError(
                f"The digits are embedded and read no `data_path` ({args.data_path}). For data of your own leave out "
                "`data_set: digits`."
            )
        name, splits = "handwritten digits (scikit-learn)", _digits()
    elif args.data_path is not None:
        name, splits = (known or Path(args.data_path).resolve().name), _local(Path(args.data_path), train)
    elif hub is not None or args.dataset_name is not None:
        name = args.dataset_name or hub.name
        config = args.dataset_config_name or (hub.config if hub else None)
        splits = from_hub(name, config)
    else:
        raise InputError(
            "No data set is named. Give --data_path FOLDER (train/CLASS/*.jpg and validation/CLASS/*.jpg, or parquet "
            f"files), --data_set NAME ({', '.join(KNOWN_SETS)}), or --dataset_name of the Hub."
        )
    train_name, validation_name = choose_splits(args, hub, splits, name, train)
    chosen = {role: splits[split] for role, split in (("train", train_name), ("validation", validation_name)) if split}
    if not train and "validation" in chosen:
        chosen.pop("train", None)
    image, label = find_columns(args, hub, next(iter(chosen.values())), name)
    for role in chosen:
        chosen[role] = _two_columns(chosen[role], image, label, f"{name}, {role} split")
    labels = class_names(chosen, name)
    for role in chosen:
        _check_labels(chosen[role], labels, f"{name}, {role} split", role == "train")
        if chosen[role].features["label"] != ClassLabel(names=labels):
            chosen[role] = chosen[role].cast_column("label", ClassLabel(names=labels))
    if train and (unseen := sorted(set(range(len(labels))) - set(chosen["train"]["label"][:]))):
        names = ", ".join(labels[index] for index in unseen[:5])
        notes.append(f"no training image is of the class{'es' * (len(unseen) > 1)} {names}{more(unseen)}")
    if "validation" not in chosen:
        chosen, note = _hold_out(chosen["train"], args.validation_fraction, seed, name)
        notes.append(note)
    if not train:
        chosen.pop("train", None)
    for role, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if role in chosen and limit is not None and limit < len(chosen[role]):
            notes.append(f"{limit:,} of {len(chosen[role]):,} {role} images are used")
            order = np.random.default_rng(seed).permutation(len(chosen[role]))[:limit]
            chosen[role] = chosen[role].select(np.sort(order))
    if known != "digits":
        mode = "all" if args.skip_bad_images else args.check_images
        bad = _check_images(chosen, mode, notes, skip=args.skip_bad_images)
        for role, indices in bad.items():
            notes.append(f"{len(indices):,} of {len(chosen[role]):,} {role} images cannot be read and are left out")
            if len(indices) == len(chosen[role]):
                raise InputError(f"None of the {len(indices):,} {role} images of {name} can be read.")
            chosen[role] = chosen[role].select([i for i in range(len(chosen[role])) if i not in indices])
            _check_labels(chosen[role], labels, f"{name}, {role} split", role == "train")
    hub_name = name if args.data_path is None and known != "digits" else None
    return ImageData(name, chosen.get("train"), chosen["validation"], labels, hub_name, notes, validation_name)


def known_set(args: DataArguments) -> str | None:
    if args.data_set is None:
        return None
    by_lower = {name.lower(): name for name in KNOWN_SETS}
    known = by_lower.get(args.data_set.lower().replace("-", ""))
    if known is None:
        raise InputError(
            f"Unknown data set {args.data_set!r}{did_you_mean(args.data_set, KNOWN_SETS)}. Known: "
            f"{', '.join(KNOWN_SETS)}. Others: --dataset_name of the Hub, or --data_path."
        )
    return known


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 digits of 8x8 pixels, as grey PNGs, dark ink on light paper."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for pixels in digits.images:  # 0 (paper) to 16 (ink)
        buffer = io.BytesIO()
        Image.fromarray(np.round(255 - pixels * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=[str(n) for n in range(10)])})
    whole = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    split = whole.train_test_split(test_size=DIGITS_HELD_OUT, stratify_by_column="label", seed=DIGITS_SEED)
    return DatasetDict(train=split["train"], validation=split["test"])


def as_classes_of(data: ImageData, label2id: dict[str, int]) -> ImageData:
    """The data with the labels of a trained model, by the names of its classes, if it knows all of the data's."""
    names = sorted(label2id, key=label2id.get)
    if data.train is not None or data.labels == names or not set(data.labels) <= set(names):
        return data
    labels = [label2id[data.labels[label]] for label in data.validation["label"][:]]
    split = data.validation.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))
    notes = data.notes + [f"{len(data.labels)} of the model's {len(names)} classes"] * (len(data.labels) < len(names))
    return replace(data, validation=split, labels=names, notes=notes)


def _local(path: Path, train: bool) -> DatasetDict:
    """
    An image folder, by class folders or by metadata, a folder of parquet or arrow files, or one that `save_to_disk`
    wrote. Where nothing is trained, class folders alone are a validation split.
    """
    check_folder(path)
    if (path / "dataset_dict.json").is_file():
        with reading(str(path)):
            return datasets.load_from_disk(str(path))
    roles = [name for name in ("train", *VALIDATION_NAMES) if (path / name).is_dir()]
    if any((folder / file).is_file() for folder in (path, *(path / role for role in roles)) for file in METADATA):
        with reading(f"{path} with its {' or '.join(METADATA)}"):
            return datasets.load_dataset("imagefolder", data_dir=str(path))
    if any(_class_folders(path / name) for name in roles):
        return _image_folder({role: path / role for role in roles})
    for kind, suffix in (("parquet", ".parquet"), ("arrow", ".arrow")):
        files = files_below(path, [suffix])
        splits = DatasetDict()
        for split, found in files_by_split(path, files).items():
            # One by one: together, all splits would take the first one's class names.
            with reading(f"{found[0]}{more(found, 1)}"):
                splits[split] = datasets.load_dataset(kind, data_files={split: list(map(str, found))}, split=split)
        if splits:
            return splits
    if not train and not roles and files_below(path, _suffixes()):
        return _image_folder({"validation": path})
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{path} holds no data set. Expected class folders of images (train/cat/1.jpg, train/dog/2.jpg, "
        f"validation/cat/3.jpg, ...), images with a metadata.csv or metadata.jsonl (file_name, label), or parquet or "
        f"arrow files named after their split; found {found}."
    )


def check_folder(path: Path) -> None:
    """Raise an `InputError` unless `data_path` is a folder."""
    if path.is_file():
        raise InputError(f"`data_path` is the file {path}, expected a folder of data.")
    if not path.is_dir():
        raise InputError(f"The data folder {path} does not exist (`data_path`).")


def _class_folders(folder: Path) -> list[Path]:
    """Not a link that leads back to where it is."""
    here = os.path.join(os.path.realpath(folder), "")
    folders = [Path(entry.path) for entry in visible(folder) if is_folder(entry)]
    return [found for found in folders if not here.startswith(os.path.join(os.path.realpath(found), ""))]


def _suffixes() -> set[str]:
    """Of the names of image files."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _image_folder(roles: dict[str, Path]) -> DatasetDict:
    """Class folders of each split: class names are the sorted folder names of the first, the training split."""
    walks: dict[str, Walk] = {}
    for role, path in roles.items():
        walks[role], real = Walk(path, _suffixes()), {}
        for folder in _class_folders(path):
            if (other := real.setdefault(os.path.realpath(folder), folder)) != folder:
                raise InputError(f"{folder} and {other} are the same folder, by a link: an image has one class.")
            walks[role].enter(folder)
    own = {role: set(walk.entered) for role, walk in walks.items()}
    splits, names = {}, None
    for role, walk in walks.items():
        path = roles[role]
        if not walk.files:
            raise InputError(f"{path} holds no class folders: expected {role}/CLASS/*.jpg.")
        walk.follow(set().union(*(entered for other, entered in own.items() if other != role)))
        files = {folder.name: sorted(found) for folder, found in walk.files.items()}
        empty = [name for name, found in files.items() if not found]
        if empty:
            raise InputError(
                f"{path / empty[0]} holds no images"
                + (f" (nor do {len(empty) - 1} other class folders)" if len(empty) > 1 else "")
                + ". Remove the folder, or fill it."
            )
        names = sorted(files) if names is None else names
        unknown = sorted(set(files) - set(names))
        if unknown:
            raise InputError(
                f"{path} has the class {unknown[0]!r}, which {next(iter(roles.values()))} does not have: the splits "
                "must share their class folders."
            )
        rows = [(str(file), names.index(name)) for name in sorted(files) for file in files[name]]
        features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
        columns = {"image": [{"path": file, "bytes": None} for file, _ in rows], "label": [label for _, label in rows]}
        splits[role] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever pyarrow, `datasets` and the file system say of damaged files becomes an `InputError` that names them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` says only that something went wrong.
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise InputError(f"{what} cannot be read: {reason}. It is damaged, or not what its name says.") from error


def files_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        # A split is the beginning of the file's name, or of a folder on the way to it.
        parts = [file.name, *reversed(file.relative_to(path).parts[:-1])]
        split = next((name for part in parts for name in ("train", *VALIDATION_NAMES) if part.startswith(name)), None)
        if split is None and (word := re.match(r"[A-Za-z]+(?=[-_.])", file.name)):
            split = word[0]  # SVHN's extra-00000-of-00002.parquet
        if split is None:
            raise InputError(
                f"{file}: no split in its name. Expected train*, and validation*, val* or test*, as in "
                "train-00000-of-00001.parquet."
            )
        by_split.setdefault(split, []).append(file)
    return by_split


def from_hub(name: str, config: str | None, streaming: bool = False) -> DatasetDict:
    """All splits of a Hub repository; with `streaming` nothing but what it says about itself is loaded."""
    if Path(name).exists():
        raise InputError(f"{name} is a local folder: give it with --data_path, not --dataset_name.")
    try:
        return datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # The Hub client's own errors, the network's and the file system's have no common base.
        where = f"{name} ({config})" if config else name
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise InputError(
            f"The data set {where} could not be loaded from the Hub: {reason}\nWithout network: give a local copy with "
            "--data_path (class folders of images, or the repository's parquet files), or try --data_set digits, which "
            "is embedded. A gated data set needs `hf auth login` first."
        ) from error


def choose_splits(args, hub, splits: DatasetDict, name: str, train_needed: bool) -> tuple[str | None, str | None]:
    def wanted(setting: str, given: str | None, candidates: tuple[str, ...]) -> str | None:
        if given is not None and given not in splits:
            raise InputError(f"`{setting}` is {given!r}, and {name} has {', '.join(splits)}.")
        return given or next((candidate for candidate in candidates if candidate in splits), None)

    train = wanted("train_split", args.train_split, ("train",))
    # Local copies of a Hub set may have its splits, or ImageNet's.
    known = (hub.validation,) if hub and hub.validation in splits else ()
    validation = wanted("validation_split", args.validation_split, known + VALIDATION_NAMES)
    if train is None and validation is None:
        raise InputError(
            f"{name} has the splits {', '.join(splits)}: name them with --train_split, --validation_split."
        )
    if train_needed and train is None:
        raise InputError(f"{name} has no training split. Its splits: {', '.join(splits)}. See --train_split.")
    if train is not None and train == validation and train_needed:
        raise InputError(f"{name}: the split {train!r} cannot be both trained on and evaluated on.")
    return train, validation


def find_columns(args, hub, split: Dataset, name: str) -> tuple[str, str]:
    features = split.features
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    if not labels:
        plain = [
            column for column, kind in features.items() if getattr(kind, "dtype", "") in ("int64", "int32", *NAMES)
        ]
        labels = [column for column in plain if "label" in column.lower()] or plain

    def one(setting: str, given: str | None, of_hub: str | None, found: list[str], kind: str) -> str:
        if given is not None:
            if given not in features:
                raise InputError(f"`{setting}` is {given!r}, and {name} has the columns {', '.join(features)}.")
            return given
        if of_hub in found:
            return of_hub
        if len(found) != 1:
            described = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
            several = f"several columns of {kind} ({', '.join(found)})" if found else f"no column of {kind}"
            raise InputError(f"{name} has {several}. Say which with --{setting}. Columns: {described}.")
        return found[0]

    image = one("image_column", args.image_column, hub and hub.image, images, "images")
    label = one("label_column", args.label_column, hub and hub.label, labels, "class labels")
    if image == label:
        raise InputError(f"`image_column` and `label_column` of {name} are one column, {image!r}.")
    if not isinstance(features[image], datasets.Image):
        raise InputError(f"`image_column` {image!r} of {name} holds {_kind(features[image])}, no images.")
    return image, label


def _kind(feature: Any) -> str:
    return type(feature).__name__ if not hasattr(feature, "dtype") else f"{type(feature).__name__} {feature.dtype}"


def _two_columns(split: Dataset, image: str, label: str, where: str) -> Dataset:
    """The images, undecoded, and the labels under their common names."""
    if len(split) == 0:
        raise InputError(f"{where} is empty.")
    for column in (image, label):
        if column not in split.column_names:
            raise InputError(f"{where} has no column {column!r}: {', '.join(split.column_names)}.")
    split = split.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    split = split.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    kind = split.features["label"]
    if not isinstance(kind, ClassLabel) and not getattr(kind, "dtype", "").startswith(("int", "uint", *NAMES)):
        raise InputError(
            f"{where}: the label column {label!r} holds {_kind(kind)}, expected classes, integers or names."
        )
    with reading(where):
        split.data.validate(full=True)  # Arrow trusts the offsets in a file, and would read beyond its end.
        if split.data.column("label").null_count:
            raise InputError(f"{where}: some images have no label.")
        for part in split.data.column("image").chunks:
            empty = pc.and_(*(pc.is_null(pc.struct_field(part, field)) for field in ("bytes", "path")))
            if pc.any(empty).as_py():
                raise InputError(f"{where}: some rows have no image, neither bytes nor a path.")
    return split


def class_names(splits: dict[str, Dataset], name: str) -> list[str]:
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
    unknown = sorted(set(values[-1]) - set(names))
    if unknown:
        raise InputError(f"{name}: the class {unknown[0]!r} of the validation split is not in the training split.")
    return names


def _check_labels(split: Dataset, labels: list[str], where: str, several: bool) -> None:
    found = np.unique(split["label"][:])
    if found.dtype.kind in "iu" and (found[0] < 0 or found[-1] >= len(labels)):
        wrong = found[0] if found[0] < 0 else found[-1]
        hint = " (a split without labels?)" if wrong < 0 else ""
        raise InputError(f"{where}: label {wrong} is outside the {len(labels)} classes{hint}.")
    if several and len(found) < 2:
        only = labels[int(found[0])] if found.dtype.kind in "iu" else found[0]
        raise InputError(f"{where}: every image is of the class {str(only)!r}. A classifier needs two classes or more.")


def _hold_out(train: Dataset, fraction: float, seed: int, name: str) -> tuple[dict[str, Dataset], str]:
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


def _check_images(splits: dict[str, Dataset], mode: str, notes: list[str], skip: bool) -> dict[str, set[int]]:
    """
    Decode every image once, so that a broken one is found before the training and not hours into it.

    Returns:
        With `skip`, the broken images of the splits that have any, by index; each is named in the log.
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
            check = functools.partial(_check_one, split, role)
            for index, error in enumerate(pool.map(check, range(len(split)))):
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
