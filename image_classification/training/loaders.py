# SPDX-License-Identifier: Apache-2.0
"""Data loaders of a run: who samples, reads and collates; and data workers that the run, and no signal, ends."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, RandomSampler

from ..data.dataset import source_of
from ..runs.signals import outlive_signals
from ..settings.arguments import RunArguments


class Loaders:
    """Makes the data loaders of a Trainer, which the accelerator shares among the processes, and ends their workers."""

    def __init__(self, accelerator: Accelerator, args: RunArguments):
        self.accelerator, self.args = accelerator, args
        self._evaluated: dict[str, DataLoader] = {}
        self._lasting: list[DataLoader] = []  # Whose workers outlive an epoch.

    def make(self, dataset: Any, batch_size: int, collate: Callable, training: bool) -> DataLoader:
        """
        Make a loader of random order, or in evaluation of the data set's own, unless the data set samples itself: of an
        `ImageSource`, or of any data set of rows, of which `collate` makes batches. `batch_size` is one process's.
        """
        args, source = self.args, source_of(dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = source.sampler(seed, args.process_index, args.world_size)
        if sampler is None and training:
            sampler = RandomSampler(dataset)
        workers = {
            "num_workers": args.dataloader_num_workers,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        }
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size,
                sampler=sampler,
                collate_fn=source.collate or collate,
                drop_last=training and args.dataloader_drop_last,
                pin_memory=args.dataloader_pin_memory,
                in_order=args.dataloader_in_order,
                worker_init_fn=outlive_signals,
                **(workers if source.needs_workers else {}),
            )
        )
        if training and source.is_divided:
            for part in samplers_of(loader):
                if isinstance(part, BatchSamplerShard):  # It leaves everything to this process.
                    part.num_processes, part.process_index, part.even_batches = 1, 0, False
        inner = _unwrapped(loader)
        # It seeds workers when they start, which is at each epoch or not: training must not depend on it.
        inner.generator = torch.Generator().manual_seed(seed * args.world_size + args.process_index)
        if inner.persistent_workers:
            self._lasting.append(inner)
        return loader

    def for_evaluation(self, name: str, dataset: Any, batch_size: int, collate: Callable) -> DataLoader:
        """Return the loader of before, if it is of this data set, so that its workers go on; or else a new one."""
        before = self._evaluated.get(name)
        if before is None or before.dataset is not dataset:
            if before is not None:
                _end_workers(_unwrapped(before))
            self._evaluated[name] = self.make(dataset, batch_size, collate, training=False)
        return self._evaluated[name]

    def end_workers(self) -> None:
        """End those that outlive an epoch: at the process's end they would be killed, for PyTorch a failure."""
        for loader in self._lasting:
            _end_workers(loader)


def samplers_of(loader: DataLoader) -> Iterator[Any]:
    """Yield the samplers within a loader, the outermost first: accelerate's, and PyTorch's."""
    inner: Any = loader
    while (inner := getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)) is not None:
        yield inner


def tell_epoch(epoch: int, dataset: Any, loader: DataLoader) -> None:
    """Tell the epoch to everything that random numbers depend on."""
    # Accelerate tells only some of these, depending on how it wrapped the loader to shard and to skip.
    for part in (dataset, *samplers_of(loader)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _unwrapped(loader: DataLoader) -> DataLoader:
    """PyTorch's own, which accelerate's has within it."""
    return getattr(loader, "base_dataloader", loader)


def _end_workers(loader: DataLoader) -> None:
    if (iterator := getattr(loader, "_iterator", None)) is not None:
        loader._iterator = None
        iterator._shutdown_workers()
