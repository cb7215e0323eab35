# SPDX-License-Identifier: Apache-2.0
"""
The data sets: the embedded digits, image folders, parquet and arrow files, and the Hub.

Whatever the source, the result is an `ImageData`: two splits of undecoded images with integer labels, and the names of
the classes. Images are decoded by `images.decode`, whose errors say which image cannot be read.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from PIL import Image

from ..errors import InputError, did_you_mean, more, reason_of
from ..settings.arguments import DataArguments
from .columns import NAMES, check_images, check_labels, class_names, hold_out, image_and_label, kind_of
from .local import VALIDATION_NAMES, read_folder
from .streaming import StreamedSplit, describe_stream, stream


# Of the whole digits set; the split is part of the data set and does not follow the run's seed.
DIGITS_HELD_OUT, DIGITS_SEED = 0.2, 0


@dataclass(frozen=True)
class HubDataset:
    """A repository of the Hub, and its configuration, split to evaluate on and columns (`None`: by the features)."""

    name: str
    config: str | None
    validation: str
    image: str | None = "image"
    label: str | None = "label"


# The sets of the paper, in repositories that need no loading script.
HUB_DATASETS = {
    "CIFAR10": HubDataset("uoft-cs/cifar10", "plain_text", "test", image="img"),
    "CIFAR100": HubDataset("uoft-cs/cifar100", "cifar100", "test", image="img", label="fine_label"),
    "IMNET": HubDataset("ILSVRC/imagenet-1k", None, "validation"),
    "SVHN": HubDataset("ufldl-stanford/svhn", "cropped_digits", "test"),
    "STL10": HubDataset("tanganke/stl10", None, "test"),
    "Flowers102": HubDataset("dpdl-benchmark/oxford_flowers102", None, "test", image=None, label=None),
}
KNOWN_SETS = ("digits", *HUB_DATASETS)


@dataclass
class ImageData:
    """Images to train and to evaluate on: splits with the columns `image` (undecoded: bytes or path) and `label`."""

    name: str  # In logs and the model card.
    train: Dataset | StreamedSplit | None  # `None` where only evaluation was asked for.
    validation: Dataset | StreamedSplit
    labels: list[str]  # Names of the classes, by index.
    hub_name: str | None  # The repository, if it comes from the Hub.
    notes: list[str]  # What was decided while reading, for the log and the card.
    split: str | None = None  # The data set's name of what is evaluated on; `None` where it is held out of training.


def load_data(
    args: DataArguments, seed: int, train: bool = True, images: int | None = None, processes: int = 1
) -> ImageData:
    """
    Read the data set that the arguments name; with `streaming`, its splits are `StreamedSplit`s.

    Args:
        seed: of the split (where one is made) and of `max_train_samples`, `max_eval_samples`.
        train: whether a training split is needed.
        images: how many the run trains on, if its length is given in steps; for a stream of unknown length.
        processes: which share a stream.

    Raises:
        InputError: nothing is named, a folder or split or column is missing or empty, there is only one class, the
            splits' classes differ, or the Hub cannot be reached; or with `streaming`, a setting for which all images
            have to be seen first.
    """
    known, hub_name = known_set(args), None
    hub = HUB_DATASETS.get(known) if known else None
    if args.streaming:
        _refuse_settings(args)
    if known == "digits":
        if args.data_path is not None:
            raise InputError(f"The digits are embedded: with `data_path` {args.data_path}, leave out `data_set`.")
        name, splits = "handwritten digits (scikit-learn)", _digits()
    elif args.data_path is not None:
        path = Path(args.data_path)
        name, splits = known or path.resolve().name, read_folder(path, train, args.streaming)
    elif hub_name := args.dataset_name or (hub.name if hub else None):
        config = args.dataset_config_name or (hub.config if hub else None)
        name, splits = hub_name, from_hub(hub_name, config, args.streaming)
    else:
        raise InputError(
            "No data set is named. Give --data_path FOLDER (train/CLASS/*.jpg and validation/CLASS/*.jpg, or parquet "
            f"files), --data_set NAME ({', '.join(KNOWN_SETS)}), or --dataset_name of the Hub."
        )
    train_name, validation_name = choose_splits(args, hub, splits, name, train)
    chosen = {role: splits[split] for role, split in (("train", train_name), ("validation", validation_name)) if split}
    if not train and "validation" in chosen:
        chosen.pop("train", None)
    where = {role: f"{name}, {role} split" for role in ("train", "validation")}
    image, label = find_columns(args, hub, next(iter(chosen.values())), name)
    chosen = {role: image_and_label(split, image, label, where[role]) for role, split in chosen.items()}
    labels, notes = class_names(chosen, name), []
    for role, split in chosen.items():
        if isinstance(split, Dataset):
            check_labels(split, labels, where[role], role == "train")
            if split.features["label"] != ClassLabel(names=labels):
                chosen[role] = split.cast_column("label", ClassLabel(names=labels))
    if train and isinstance(chosen["train"], Dataset):
        if unseen := sorted(set(range(len(labels))) - set(chosen["train"]["label"][:])):
            names = ", ".join(labels[index] for index in unseen[:5])
            notes.append(f"no training image is of the class{'es' * (len(unseen) > 1)} {names}{more(unseen)}")
    if "validation" not in chosen:
        if not isinstance(chosen["train"], Dataset):
            raise InputError(
                f"{name} has no split to evaluate on, and none is held out of a stream, which would have to be read as "
                f"a whole. Its splits: {', '.join(splits)}. Name one with --validation_split, or give local files with "
                "both."
            )
        chosen, note = hold_out(chosen["train"], args.validation_fraction, seed, name)
        notes.append(note)
    if not train:
        chosen.pop("train", None)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for role, split in chosen.items():
        limit = limits[role]
        if args.streaming:
            chosen[role] = stream(split, role, where[role], len(labels), limit, images, notes)
        elif limit is not None and limit < len(split):
            notes.append(f"{limit:,} of {len(split):,} {role} images are used")
            chosen[role] = split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))
    if args.streaming:
        notes += [describe_stream(chosen["train"], args.shuffle_buffer, processes)] if train else []
    elif known != "digits":
        mode = "all" if args.skip_bad_images else args.check_images
        bad = check_images(chosen, mode, notes, skip=args.skip_bad_images)
        for role, indices in bad.items():
            notes.append(f"{len(indices):,} of {len(chosen[role]):,} {role} images cannot be read and are left out")
            if len(indices) == len(chosen[role]):
                raise InputError(f"None of the {len(indices):,} {role} images of {name} can be read.")
            chosen[role] = chosen[role].select([i for i in range(len(chosen[role])) if i not in indices])
            check_labels(chosen[role], labels, where[role], role == "train")
    return ImageData(name, chosen.get("train"), chosen["validation"], labels, hub_name, notes, validation_name)


def _refuse_settings(args: DataArguments) -> None:
    for refused, setting, why in (
        (args.repeated_aug, "repeated_aug", "it draws a third of the images, which a stream cannot do"),
        (args.skip_bad_images, "skip_bad_images", "finding them takes decoding every image first"),
        (args.check_images == "all", "check_images: all", "it decodes every image first"),
        (known_set(args) == "digits", "data_set: digits", "they are embedded"),
    ):
        if refused:
            raise InputError(f"`{setting}` does not go with `streaming`: {why}. Leave one of them out.")


def known_set(args: DataArguments) -> str | None:
    if args.data_set is None:
        return None
    by_lower = {name.lower(): name for name in KNOWN_SETS}
    if (known := by_lower.get(args.data_set.lower().replace("-", ""))) is None:
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


def as_classes_of(data: ImageData, names: list[str]) -> ImageData:
    """The data with the labels of a trained model, by the names of its classes, if it knows all of the data's."""
    split, label_of = data.validation, {name: index for index, name in enumerate(names)}
    if isinstance(split, StreamedSplit) or data.train is not None:
        return data
    # Of timm's ImageNet, two classes are called crane.
    if data.labels == names or not set(data.labels) <= set(names) or len(label_of) < len(names):
        return data
    labels = [label_of[data.labels[label]] for label in split["label"][:]]
    split = split.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))
    notes = data.notes + [f"{len(data.labels)} of the model's {len(names)} classes"] * (len(data.labels) < len(names))
    return replace(data, validation=split, labels=names, notes=notes)


def from_hub(name: str, config: str | None, streaming: bool = False) -> DatasetDict:
    """All splits of a Hub repository; with `streaming` nothing but what it says about itself is loaded."""
    if Path(name).exists():
        raise InputError(f"{name} is a local folder: give it with --data_path, not --dataset_name.")
    try:
        return datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # The Hub client's own errors, the network's and the file system's have no common base.
        where = f"{name} ({config})" if config else name
        raise InputError(
            f"The data set {where} could not be loaded from the Hub: {reason_of(error)}\nWithout network: give a local "
            "copy with --data_path (class folders of images, or the repository's parquet files), or try --data_set "
            "digits, which is embedded. A gated data set needs `hf auth login` first."
        ) from error


def choose_splits(
    args: DataArguments, hub: HubDataset | None, splits: dict, name: str, train_needed: bool
) -> tuple[str | None, str | None]:
    """The names of the splits to train and to evaluate on; `None` for one that there is not."""

    def wanted(setting: str, given: str | None, candidates: tuple[str, ...]) -> str | None:
        if given is not None and given not in splits:
            raise InputError(f"`{setting}` is {given!r}, and {name} has {', '.join(splits)}.")
        return given or next((candidate for candidate in candidates if candidate in splits), None)

    train = wanted("train_split", args.train_split, ("train",))
    # Local copies of a Hub set may have its splits, or ImageNet's.
    known = (hub.validation,) if hub and hub.validation in splits else ()
    validation = wanted("validation_split", args.validation_split, known + VALIDATION_NAMES)
    if train is None and validation is None:
        raise InputError(f"Name the splits of {name} ({', '.join(splits)}) with --train_split, --validation_split.")
    if train_needed and train is None:
        raise InputError(f"{name} has no training split. Its splits: {', '.join(splits)}. See --train_split.")
    if train is not None and train == validation and train_needed:
        raise InputError(f"{name}: the split {train!r} cannot be both trained on and evaluated on.")
    return train, validation


def find_columns(
    args: DataArguments, hub: HubDataset | None, split: Dataset | IterableDataset, name: str
) -> tuple[str, str]:
    """Return the columns of images and of labels: those that are named, or else the only ones that can be them."""
    if (features := split.features) is None:
        raise InputError(f"The columns of {name} are not known before it is read: stream parquet or arrow files.")
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    if not labels:
        plain = [name for name, kind in features.items() if getattr(kind, "dtype", "") in ("int64", "int32", *NAMES)]
        labels = [column for column in plain if "label" in column.lower()] or plain

    def one(setting: str, given: str | None, of_hub: str | None, found: list[str], kind: str) -> str:
        if given is not None:
            if given not in features:
                raise InputError(f"`{setting}` is {given!r}, and {name} has the columns {', '.join(features)}.")
            return given
        if of_hub in found:
            return of_hub
        if len(found) != 1:
            described = ", ".join(f"{column} ({kind_of(feature)})" for column, feature in features.items())
            several = f"several columns of {kind} ({', '.join(found)})" if found else f"no column of {kind}"
            raise InputError(f"{name} has {several}. Say which with --{setting}. Columns: {described}.")
        return found[0]

    image = one("image_column", args.image_column, hub.image if hub else None, images, "images")
    label = one("label_column", args.label_column, hub.label if hub else None, labels, "class labels")
    if image == label:
        raise InputError(f"`image_column` and `label_column` of {name} are one column, {image!r}.")
    if not isinstance(features[image], datasets.Image):
        raise InputError(f"`image_column` {image!r} of {name} holds {kind_of(features[image])}, no images.")
    return image, label
