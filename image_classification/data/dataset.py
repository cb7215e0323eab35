# SPDX-License-Identifier: Apache-2.0
"""Data sets of images: what the Trainer asks of one, and one that is decoded and transformed as it is read."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from .augmentation import REPEATS, RepeatedAugmentation, collate, own_generators, seed_generators
from .images import decode


class ImageSource(torch.utils.data.Dataset):
    """What the Trainer asks of a data set; here, the answers for one that leaves all to Transformers."""

    collate: Callable[[list], dict[str, Any]] | None = None  # Makes a batch of what `__getitems__` returns.
    needs_workers = True  # To read it in processes of their own.
    is_divided = False  # `sampler` gives each process items of its own, which are not to be divided once more.

    def sampler(self, seed: int, process: int, processes: int) -> torch.utils.data.Sampler | None:
        """Return what draws an epoch's items, by `seed` where the data set has none of its own; `None`: any order."""
        return None

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the model's batch of one that is on the device, in evaluation."""
        return batch


def source_of(dataset: Any) -> ImageSource:
    """Return the data set if it answers itself, else the usual answers."""
    return dataset if isinstance(dataset, ImageSource) else ImageSource()


class ImageDataset(ImageSource):
    """
    Images of one split (columns `image`, undecoded, and `label`), decoded by `read`, which calls an image by a name,
    and transformed as they are read; `collate` makes a batch of rows.

    Random numbers of the transform depend on the `seed`, the epoch and the index, and on nothing else: not on the
    number of workers or processes, nor on what was read before. It is `None` in evaluation, which has none. With
    `repeated`, the images are sampled by `RepeatedAugmentation`.
    """

    def __init__(
        self,
        split: Dataset,
        transform,
        name: str,
        seed: int | None = None,
        repeated: bool = False,
        read: Callable[[dict[str, Any], str], Any] = decode,
        collate: Callable[[list[dict]], dict[str, Any]] = collate,
    ):
        self.split, self.transform, self.name, self.seed, self.repeated = split, transform, name, seed, repeated
        self.read, self.collate = read, collate
        # In shared memory: data workers live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer; data workers that run already get to know it."""
        self._epoch.fill_(epoch)

    def sampler(self, seed: int, process: int, processes: int) -> torch.utils.data.Sampler | None:
        return RepeatedAugmentation(len(self), seed) if self.repeated else None

    def __getitem__(self, index: int) -> dict:
        """`pixel_values`, `labels`, and in training the `key` of the random numbers that were used."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[Any]) -> list[dict]:
        """A whole batch, for PyTorch's data loader: quicker than one by one."""
        # Under repeated augmentation an index names the repetition, too.
        positions = [index % len(self.split) if self.repeated else index for index in indices]
        for index in indices:
            if not 0 <= index < len(self.split) * (REPEATS if self.repeated else 1):
                raise IndexError(index)
        rows = self.split[positions]
        where = [f"{self.name} image {position}" for position in positions]
        return self.prepare(rows["image"], rows["label"], where, indices)

    def prepare(self, images: list[dict], labels: list[int], where: list[str], indices: list[int]) -> list[dict]:
        """Undecoded images with their indices in the epoch; `where` is what errors call them."""
        epoch, prepared = int(self._epoch), []
        with contextlib.nullcontext() if self.seed is None else own_generators():
            for item, label, name, index in zip(images, labels, where, indices, strict=True):
                image = self.read(item, name)
                row: dict[str, Any] = {"labels": label}
                if self.seed is not None:
                    row["key"] = (self.seed, epoch, index)
                    seed_generators(*row["key"])
                prepared.append({"pixel_values": self.transform(image), **row})
        return prepared
