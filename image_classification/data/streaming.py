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
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from ..errors import InputError
from .dataset import ImageDataset
from .local import reading


logger = logging.getLogger(__name__)

AHEAD = 1024  # Undecoded images that are read ahead of the data workers.
PARTS = 64  # Of a table of image files, as which they are shuffled and shared.


class StreamedSplit:
    """
    A split that is read from its beginning to its end: columns `image` (undecoded) and `label`, of which `length` rows
    are used; errors call it `where`.
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
        process reads all and takes every so many-th. The seed is of the order of the files, and of the images within
        `buffer`; `None`: as they come.
        """
        stream = self.dataset if seed is None else self.dataset.shuffle(seed=seed, buffer_size=buffer)
        if processes > 1:
            stream = split_dataset_by_node(stream, rank=process, world_size=processes)
        stream = iter(stream)
        while True:
            with reading(self.where):
                if (row := next(stream, None)) is None:
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
        rows = self._once() if self.seed is None else itertools.islice(self._again_and_again(self.seed), len(self))
        numbered = ((number * self.processes + self.process, row) for number, row in enumerate(rows))
        return read_ahead(numbered, AHEAD)

    def _once(self) -> Iterator[dict]:
        count = 0
        for row in self.split.rows():
            count += 1
            yield row
        if count != len(self.split):
            raise InputError(f"{self.split.where} has {count:,} images, and was said to have {len(self.split):,}.")

    def _again_and_again(self, seed: int) -> Iterator[dict]:
        for time in itertools.count():
            order = int(np.random.SeedSequence([seed, self.epoch, time]).generate_state(1)[0])
            row = None
            for row in self.split.rows(order, self.buffer, self.process, self.processes):
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
    """`ImageDataset` of a streamed split, whose items are the sampler's rows, shuffled in training within `buffer`."""

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


def stream(
    split: Dataset | IterableDataset,
    role: str,
    where: str,
    classes: int,
    limit: int | None,
    images: int | None,
    notes: list[str],
) -> StreamedSplit:
    """
    A stream of a split (columns `image`, undecoded, and `label`; a `Dataset` is a table of the paths of image files),
    or of the beginning of it.

    Args:
        role: `train` or `validation`.
        limit: to so many images.
        images: on which the run trains, for a training split that does not say how many it has.
        notes: gets what was decided.

    Raises:
        InputError: it is empty, or nothing says how long training is.
    """
    count: int | None
    if isinstance(split, Dataset):
        count, split = len(split), split.to_iterable_dataset(min(PARTS, len(split)))
    else:
        info = (split.info.splits or {}).get(str(split.split))
        count = info.num_examples or None if info is not None else None
    if limit is not None and (count is None or limit < count):
        split, count = split.take(limit), limit
        notes.append(f"the first {limit:,} {role} images are used")
    if count is None and role == "train":
        if images is None:
            raise InputError(
                f"{where} does not say how many images it has, so that epochs have no length. Give --max_steps (and "
                "--eval_strategy steps), or --max_train_samples."
            )
        notes.append("the number of training images is not known: the whole run counts as one epoch")
        count = images
    elif count is None:
        logger.info(f"{where} does not say how many images it has: they are counted.")
        count = sum(1 for _ in split.select_columns(["label"]))
    if count == 0:
        raise InputError(f"{where} is empty.")
    return StreamedSplit(split, count, where, classes)


def describe_stream(split: StreamedSplit, buffer: int, processes: int) -> str:
    """One line: how it is shuffled, and shared by the processes."""
    parts = split.dataset.num_shards
    line = f"streamed in {parts:,} part{'s' if parts > 1 else ''}, shuffled within {buffer:,} images"
    if processes == 1:
        return line
    if parts % processes == 0:
        return f"{line}; each process reads {parts // processes:,} of them"
    return f"{line}; they do not divide among {processes} processes, so each reads all and takes its share"
