# SPDX-License-Identifier: Apache-2.0
"""
Data sets that are larger than the disk: read from the first image to the last, from the Hub or from local files.

A split is a `datasets.IterableDataset` of undecoded images. In each process one thread reads it, ahead of the training;
the data workers decode and augment, as ever. So the images of a run, and what becomes of them, depend on the seed, the
epoch and the number of processes, not on the workers; and a run goes on exactly, by reading what it has seen again,
without decoding it.
"""

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import ClassLabel, IterableDataset
from datasets.distributed import split_dataset_by_node

from ..errors import InputError, more
from ..settings.arguments import DataArguments, RunArguments
from .dataset import ImageDataset
from .folders import files_below
from .sources import (
    HUB_DATASETS,
    ImageData,
    check_folder,
    choose_splits,
    files_by_split,
    find_columns,
    from_hub,
    known_set,
    reading,
)


logger = logging.getLogger(__name__)

AHEAD = 1024  # Undecoded images that are read ahead of the data workers.


class StreamedSplit:
    """
    A split that is read from its beginning to its end.

    Args:
        dataset: columns `image` (undecoded) and `label`.
        length: images that are used of it.
        where: what errors call it.
        classes: how many there are.
    """

    def __init__(self, dataset: IterableDataset, length: int, where: str, classes: int):
        self.dataset, self.length, self.where, self.classes = dataset, length, where, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads up to there."""
        for row in itertools.islice(self.rows(), index, index + 1):
            return row
        raise IndexError(index)

    def rows(self, seed: int | None = None, buffer: int = 1, process: int = 0, processes: int = 1) -> Iterator[dict]:
        """
        The rows of one of several processes: whole files where their number is a multiple of the processes', else each
        process reads all and takes every so many-th.

        Args:
            seed: of the order: of the files, and of the images within `buffer`. `None`: as they come.
        """
        stream = self.dataset if seed is None else self.dataset.shuffle(seed=seed, buffer_size=buffer)
        if processes > 1:
            stream = split_dataset_by_node(stream, rank=process, world_size=processes)
        stream = iter(stream)
        while True:
            with reading(self.where):
                row = next(stream, None)
            if row is None:
                return
            if row["label"] is None or not 0 <= row["label"] < self.classes:
                raise InputError(
                    f"{self.where}: an image has the label {row['label']}, expected 0 to {self.classes - 1} (a split "
                    "without labels?)."
                )
            yield row


class StreamSampler(torch.utils.data.Sampler):
    """
    In place of indices, the rows themselves, with their number in the epoch: `StreamedImageDataset` takes them.

    Args:
        split: to read.
        seed: of the order of training; `None` in evaluation, which goes through all rows once, in their order.
        buffer: images within which training is shuffled.
        process, processes: which one this is, of how many. Each has as many images in an epoch: one whose files have
            less goes on with others, one whose files have more leaves the rest out. Each epoch draws which files.
    """

    def __init__(self, split: StreamedSplit, seed: int | None, buffer: int, process: int = 0, processes: int = 1):
        self.split, self.seed, self.buffer, self.process, self.processes = split, seed, buffer, process, processes
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split) // self.processes

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        rows = self._once() if self.seed is None else itertools.islice(self._again_and_again(), len(self))
        numbered = ((number * self.processes + self.process, row) for number, row in enumerate(rows))
        return read_ahead(numbered, AHEAD)

    def _once(self) -> Iterator[dict]:
        count = 0
        for row in self.split.rows():
            count += 1
            yield row
        if count != len(self.split):
            raise InputError(f"{self.split.where} has {count:,} images, and was said to have {len(self.split):,}.")

    def _again_and_again(self) -> Iterator[dict]:
        for time in itertools.count():
            seed = int(np.random.SeedSequence([self.seed, self.epoch, time]).generate_state(1)[0])
            row = None
            for row in self.split.rows(seed, self.buffer, self.process, self.processes):
                yield row
            if row is None:
                raise InputError(f"{self.split.where} has no image for process {self.process} of {self.processes}.")


def read_ahead(rows: Iterator, count: int) -> Iterator:
    """
    The same, read by a thread, up to `count` ahead. It ends by itself soon after the iterator; `datasets` takes seconds
    to close its files, for which nothing waits.
    """
    ready: queue.Queue = queue.Queue(count)
    stop, end = threading.Event(), object()

    def put(item) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def read() -> None:
        try:
            if all(put((row, None)) for row in rows):
                put((end, None))
        except BaseException as error:  # Raised where the rows are wanted.
            put((end, error))

    threading.Thread(target=read, daemon=True, name="read-ahead").start()
    try:
        while True:
            row, error = ready.get()
            if error is not None:
                raise error
            if row is end:
                return
            yield row
    finally:
        stop.set()


class StreamedImageDataset(ImageDataset):
    """
    `ImageDataset` of a streamed split: its items are the sampler's rows.

    Args:
        buffer: images within which training is shuffled.
        how: `read` and `collate`, as `ImageDataset` has them.
    """

    is_divided = True

    def __init__(self, split: StreamedSplit, transform, name: str, seed: int | None = None, buffer: int = 1, **how):
        super().__init__(split, transform, name, seed, **how)
        self.buffer = buffer

    def sampler(self, seed: int, process: int, processes: int) -> StreamSampler:
        if self.seed is None:
            process, processes = 0, 1  # In evaluation each reads all and decodes its own batches: every image counts.
        return StreamSampler(self.split, self.seed, self.buffer, process, processes)

    def __getitems__(self, items: list[tuple[int, dict]]) -> list[dict]:
        numbers, rows = zip(*items, strict=True)
        where = [f"{self.name} image {number}" for number in numbers]
        return self.prepare([row["image"] for row in rows], [row["label"] for row in rows], where, list(numbers))


def load_streamed(args: DataArguments, training: RunArguments, train: bool = True) -> ImageData:
    """
    As `load_data`, of splits that are streamed.

    Args:
        args: the data arguments.
        training: whose `max_steps` says how long a run is where the number of images is not known.
        train: whether a training split is needed.

    Raises:
        InputError: as in `load_data`; and for settings for which all images have to be seen first.
    """
    _refuse(args)
    known = known_set(args)
    hub = HUB_DATASETS.get(known) if known else None
    counts: dict[str, int | None] = {}
    if args.data_path is not None:
        name = known or Path(args.data_path).resolve().name
        splits, counts = _local(Path(args.data_path))
    elif hub is not None or args.dataset_name is not None:
        name = args.dataset_name or hub.name
        splits = from_hub(name, args.dataset_config_name or (hub.config if hub else None), streaming=True)
        for split, dataset in splits.items():
            info = (dataset.info.splits or {}).get(split)
            counts[split] = (info.num_examples or None) if info is not None else None
    else:
        raise InputError(
            "No data set to stream is named. Give --dataset_name of the Hub, --data_set NAME, or --data_path with "
            "parquet or arrow files."
        )
    train_name, validation_name = choose_splits(args, hub, splits, name, train)
    if validation_name is None:
        raise InputError(
            f"{name} has no split to evaluate on, and none is held out of a stream, which would have to be read as a "
            f"whole. Its splits: {', '.join(splits)}. Name one with --validation_split, or give local files with both."
        )
    roles = {"train": train_name, "validation": validation_name} if train else {"validation": validation_name}
    image, label = _columns_of(args, hub, splits, roles, name)
    names = splits[validation_name].features[label].names
    notes: list[str] = []
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    chosen = {}
    for role, split in roles.items():
        dataset, count, limit = splits[split], counts[split], limits[role]
        dataset = dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        dataset = dataset.rename_columns(renamed) if renamed else dataset
        if limit is not None and (count is None or limit < count):
            dataset, count = dataset.take(limit), limit
            notes.append(f"the first {limit:,} {role} images are used")
        if count is None:
            count = _length(dataset, role, name, training, notes)
        if count == 0:
            raise InputError(f"{name}, {role} split is empty.")
        chosen[role] = StreamedSplit(dataset, count, f"{name}, {role} split", len(names))
    if train:
        notes.append(_describe(chosen["train"], args.shuffle_buffer, training.world_size))
    hub_name = name if args.data_path is None else None
    return ImageData(name, chosen.get("train"), chosen["validation"], names, hub_name, notes, validation_name)


def _refuse(args: DataArguments) -> None:
    for refused, setting, why in (
        (args.repeated_aug, "repeated_aug", "it draws a third of the images, which a stream cannot do"),
        (args.skip_bad_images, "skip_bad_images", "finding them takes decoding every image first"),
        (args.check_images == "all", "check_images: all", "it decodes every image first"),
        ((args.data_set or "").lower() == "digits", "data_set: digits", "they are embedded"),
    ):
        if refused:
            raise InputError(f"`{setting}` does not go with `streaming`: {why}. Leave one of them out.")


def _local(path: Path) -> tuple[dict[str, IterableDataset], dict[str, int]]:
    """Parquet or arrow files by split, and how many rows they have."""
    check_folder(path)
    for kind, count in (("parquet", _parquet_rows), ("arrow", _arrow_rows)):
        found = files_below(path, [f".{kind}"])
        if not found:
            continue
        splits, counts = {}, {}
        for split, files in files_by_split(path, found).items():
            counts[split] = sum(map(count, files))
            names = {split: list(map(str, files))}
            with reading(f"{files[0]}{more(files, 1)}"):
                splits[split] = datasets.load_dataset(kind, data_files=names, split=split, streaming=True)
        return splits, counts
    raise InputError(
        f"{path} has no parquet or arrow files, which are what `streaming` reads from a folder. Class folders of "
        "images are read one by one in any case: leave it out."
    )


def _parquet_rows(file: Path) -> int:
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no parquet file that can be read: {error}") from error


def _arrow_rows(file: Path) -> int:
    try:
        with pa.memory_map(str(file)) as source:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no arrow stream, as `datasets` writes it: {error}") from error


def _columns_of(args, hub, splits, roles: dict[str, str], name: str) -> tuple[str, str]:
    """Of images and labels, which must be the same, with the same classes, in both splits."""
    for split in roles.values():
        if splits[split].features is None:
            raise InputError(
                f"The columns of {name}, split {split}, are not known before it is read: streaming takes parquet or "
                "arrow files, or a Hub repository of them."
            )
    found = {role: find_columns(args, hub, splits[split], name) for role, split in roles.items()}
    image, label = found["validation"]
    if len(set(found.values())) > 1:
        raise InputError(f"{name}: the splits differ in their columns: {found['train']} and {found['validation']}.")
    kinds = [splits[split].features[label] for split in roles.values()]
    for kind in kinds:
        if not isinstance(kind, ClassLabel):
            raise InputError(
                f"{name}: the label column {label!r} holds {kind}, and the names of the classes are not known before "
                "all is read: streaming takes columns of class labels (datasets.ClassLabel)."
            )
    if kinds[0].names != kinds[-1].names:
        raise InputError(f"{name}: the classes of the training and the validation split differ.")
    return image, label


def _length(dataset: IterableDataset, role: str, name: str, training: RunArguments, notes: list[str]) -> int:
    """Where nothing says how many images there are."""
    if role == "train":
        if training.max_steps <= 0:
            raise InputError(
                f"{name} does not say how many training images it has, so that epochs have no length. Give --max_steps "
                "(and --eval_strategy steps), or --max_train_samples."
            )
        notes.append("the number of training images is not known: the whole run counts as one epoch")
        return training.max_steps * training.global_batch_size
    logger.info(f"{name} does not say how many validation images it has: they are counted.")
    return sum(1 for _ in dataset.select_columns(["label"]))


def _describe(split: StreamedSplit, buffer: int, processes: int) -> str:
    files = split.dataset.num_shards
    line = f"streamed from {files:,} file{'s' if files > 1 else ''}, shuffled within {buffer:,} images"
    if processes == 1:
        return line
    if files % processes == 0:
        return f"{line}; each process reads {files // processes:,} of the files"
    return f"{line}; the files do not divide among {processes} processes, so each reads all and takes its share"
