# SPDX-License-Identifier: Apache-2.0
"""What a folder holds of images with classes: class folders, metadata beside images, parquet or arrow files."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from datasets.splits import SplitDict, SplitInfo
from PIL import Image

from ..errors import InputError, more, reason_of
from .folders import Walk, files_below, is_folder, visible


# Beside images, says which class each is of, as Hugging Face's `imagefolder` reads it.
METADATA = ("metadata.csv", "metadata.jsonl")
VALIDATION_NAMES = ("validation", "valid", "val", "test")


def read_folder(path: Path, train: bool, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """
    The splits of an image folder, by class folders or by metadata, of a folder of parquet or arrow files, or of one
    that `save_to_disk` wrote. Where nothing is trained, class folders alone are a validation split. With `streaming`,
    parquet and arrow files become streams that know their number of images; of all else only the paths of images are
    in memory in any case. Raises `InputError` where there is no such folder, or it holds no data set that can be read.
    """
    if path.is_file():
        raise InputError(f"`data_path` is the file {path}, expected a folder of data.")
    if not path.is_dir():
        raise InputError(f"The data folder {path} does not exist (`data_path`).")
    if (path / "dataset_dict.json").is_file() and not streaming:
        with reading(str(path)):
            return datasets.load_from_disk(str(path))
    roles = [name for name in ("train", *VALIDATION_NAMES) if (path / name).is_dir()]
    if any((folder / file).is_file() for folder in (path, *(path / role for role in roles)) for file in METADATA):
        with reading(f"{path} with its {' or '.join(METADATA)}"):
            return datasets.load_dataset("imagefolder", data_dir=str(path))
    if any(_class_folders(path / name) for name in roles):
        return _image_folder({role: path / role for role in roles})
    for kind in ("parquet", "arrow"):
        splits = DatasetDict()
        for split, files in _files_by_split(path, files_below(path, [f".{kind}"])).items():
            rows = sum(map(rows_in, files)) if streaming else None
            # One by one: together, all splits would take the first one's class names.
            names = {split: list(map(str, files))}
            with reading(f"{files[0]}{more(files, 1)}"):
                splits[split] = datasets.load_dataset(kind, data_files=names, split=split, streaming=streaming)
            if rows is not None:
                splits[split].info.splits = SplitDict({split: SplitInfo(split, num_examples=rows)})
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


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever pyarrow, `datasets` and the file system say of damaged files becomes an `InputError` that names them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = reason_of(error.__cause__ or error, whole=True)[:300]  # `datasets`' own says nothing.
        raise InputError(f"{what} cannot be read: {reason}. It is damaged, or not what its name says.") from error


def rows_in(file: Path) -> int:
    """How many rows a parquet or an arrow file has, without reading them."""
    with reading(str(file)):
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_metadata(file).num_rows
        with pa.memory_map(str(file)) as source:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def _files_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        # A split is the beginning of the file's name, or of a folder on the way to it.
        parts = [file.name, *reversed(file.relative_to(path).parts[:-1])]
        split = next((name for part in parts for name in ("train", *VALIDATION_NAMES) if part.startswith(name)), None)
        if split is None and (word := re.match(r"[A-Za-z]+(?=[-_.])", file.name)):
            split = word[0]  # SVHN's extra-00000-of-00002.parquet
        if split is None:
            names = "train*, and validation*, val* or test*, as in train-00000-of-00001.parquet"
            raise InputError(f"{file}: no split in its name. Expected {names}.")
        by_split.setdefault(split, []).append(file)
    return by_split


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
        walks[role] = Walk(path, _suffixes())
        real: dict[str, Path] = {}
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
        if empty := [name for name, found in files.items() if not found]:
            others = f" (nor do {len(empty) - 1} other class folders)" * (len(empty) > 1)
            raise InputError(f"{path / empty[0]} holds no images{others}. Remove the folder, or fill it.")
        names = sorted(files) if names is None else names
        if unknown := sorted(set(files) - set(names)):
            raise InputError(
                f"{path} has the class {unknown[0]!r}, which {next(iter(roles.values()))} does not have: the splits "
                "must share their class folders."
            )
        rows = [(str(file), names.index(name)) for name in sorted(files) for file in files[name]]
        features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
        columns = {"image": [{"path": file, "bytes": None} for file, _ in rows], "label": [label for _, label in rows]}
        splits[role] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)
