# SPDX-License-Identifier: Apache-2.0
"""
Several processes: the images that one process would see, each counted once.

Every process gets batches of the same size, so where the images do not come out even, accelerate repeats some at the
end of an epoch. Here repeated images have no weight: W processes of batch B/W train and evaluate as one of batch B.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from ..data.dataset import source_of
from ..errors import InputError


T = TypeVar("T")
IGNORED = -100  # PyTorch's and the Trainer's label of what does not count.


class ParallelTrainer(Trainer):
    """
    Transformers' Trainer, in which an image that was repeated to fill a batch does not count.

    Where `augment` is set, it makes training batches of what the data loader has moved to the device.
    """

    augment: Callable[[dict], dict[str, torch.Tensor]] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # From pinned memory; else each batch would wait until the device has done all that came before.
        self.accelerator.dataloader_config.non_blocking = self.args.device.type == "cuda"
        # Of the [CLS] token's gradient under DDP, which is too small for it to matter.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view", category=UserWarning)
        if self.is_fsdp_enabled:
            _set_up_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError(
                "FSDP needs several GPUs: accelerate does not shard a model on the CPU or on one device. Use "
                "accelerate_configs/cpu_two_processes.yaml, cpu.yaml or one_gpu.yaml."
            )

    @functools.cached_property
    def _cpu_group(self):
        """A process group for small decisions, which do not wait for the GPU."""
        return distributed.new_group(backend="gloo")

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. Every process must ask."""
        if self.args.world_size == 1:
            return number
        tensor = torch.tensor(number)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._cpu_group)
        return int(tensor)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        self._rows_at_end = 0  # Images in the last batch of an epoch over all processes, if it is not full.
        sampler: Any = getattr(loader, "batch_sampler", None)
        own = source_of(self.train_dataset).is_divided
        while hasattr(sampler, "batch_sampler"):  # Accelerate's, around PyTorch's.
            if own and isinstance(sampler, BatchSamplerShard):
                sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
            sampler = sampler.batch_sampler
        if not own and self.args.world_size > 1 and hasattr(sampler, "sampler") and not sampler.drop_last:
            self._rows_at_end = len(sampler.sampler) % (sampler.batch_size * self.args.world_size)
        return loader

    def _run_epoch(self, *, epoch, train_dataloader, **kwargs):
        self.tell_epoch(epoch, train_dataloader)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def tell_epoch(self, epoch: int, train_dataloader: DataLoader) -> None:
        """To everything that random numbers depend on."""
        # Accelerate tells the epoch only some of these, depending on how it wrapped the loader to shard and to skip.
        parts: list[Any] = [self.train_dataset]
        inner: Any = train_dataloader
        while (inner := getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)) is not None:
            parts.append(inner)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = self.take_batches(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def take_batches(self, batches: Iterator, count: int) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The next `count` batches of this process, and how many images those of all processes have."""
        some = list(islice(batches, count))
        if self.augment is not None:
            some = list(map(self.augment, some))
        images = sum(len(batch["labels"]) for batch in some) * self.args.world_size
        if some and self._rows_at_end and self.accelerator.gradient_state.end_of_dataloader:
            images += self._rows_at_end - len(some[-1]["labels"]) * self.args.world_size
            some[-1] = _without_repeated(some[-1], self._own_rows(some[-1], self._rows_at_end))
        return some, images

    def _own_rows(self, batch: dict[str, torch.Tensor], rows: int) -> int:
        """How many rows of this process's last batch are among the first `rows` of all processes'."""
        size = len(batch["labels"])
        return min(max(rows - self.args.process_index * size, 0), size)


def _without_repeated(batch: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    if rows > 0:
        return {key: value[:rows] for key, value in batch.items()}
    # The other processes wait for this one's gradients: one image goes through the model, for nothing.
    batch = {key: value[:1] for key, value in batch.items()}
    return {**batch, "labels": torch.full_like(batch["labels"].flatten()[:1], IGNORED, dtype=torch.long)}


def _set_up_fsdp(plugin, model: PreTrainedModel) -> None:
    if plugin.fsdp_version != 2:
        raise InputError(
            "FSDP's first version is not supported: set `fsdp_version: 2`, as accelerate_configs/fsdp2.yaml."
        )
    # Checkpoints are of one layout, whatever saved them; the models are small enough to be gathered.
    plugin.set_state_dict_type("FULL_STATE_DICT")
    # PyTorch warns of what ViT does not do: add to the patch embeddings in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    if plugin.transformer_cls_names_to_wrap is None:
        # Accelerate would take all of the model's `_no_split_modules`: also those that this model has not, and the
        # embeddings around the patch embedding, which it makes a unit of its own.
        embedding = model.get_input_embeddings()
        plugin.transformer_cls_names_to_wrap = sorted(
            {
                type(module).__name__
                for module in model.modules()
                if type(module).__name__ in model._no_split_modules and embedding not in module.modules()
            }
        )


def on_main_process(function: Callable[[], T]) -> T:
    """
    Call `function` in the main process only, and return its result in all of them.

    Raises:
        InputError: of the main process, in all of them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result: list[Any] = [None]
    if state.is_main_process:
        try:
            result = [function()]
        except InputError as error:
            result = [error]
    broadcast_object_list(result)
    if isinstance(result[0], InputError):
        result[0].said = not state.is_main_process
        raise result[0]
    return result[0]
