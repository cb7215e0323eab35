# SPDX-License-Identifier: Apache-2.0
"""
Several processes: the images that one process would see, each counted once.

Every process gets batches of the same size, so where the images do not come out even, accelerate repeats some at the
end of an epoch. Here repeated images have no weight: W processes of batch B/W train and evaluate as one of batch B.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedModel

from ..errors import InputError
from .loaders import samplers_of


T = TypeVar("T")
IGNORED = -100  # PyTorch's and the Trainer's label of what does not count.


def set_up(accelerator: Accelerator, model: PreTrainedModel, fsdp: bool) -> None:
    """Say to accelerate and PyTorch how a model is spread over the processes, before it is."""
    # From pinned memory; else each batch would wait until the device has done all that came before.
    accelerator.dataloader_config.non_blocking = accelerator.device.type == "cuda"
    # Of the [CLS] token's gradient under DDP, which is too small for it to matter.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view", category=UserWarning)
    if not fsdp:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError(
                "FSDP needs several GPUs: accelerate does not shard a model on the CPU or on one device. Use "
                "accelerate_configs/cpu_two_processes.yaml, cpu.yaml or one_gpu.yaml."
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError("FSDP's first version is not supported: set `fsdp_version: 2`, as in fsdp2.yaml.")
    # Checkpoints are of one layout, whatever saved them; the models are small enough to be gathered.
    plugin.set_state_dict_type("FULL_STATE_DICT")
    # PyTorch warns of what ViT does not do: add to the patch embeddings in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    if plugin.transformer_cls_names_to_wrap is None:
        # Accelerate would take all of the model's `_no_split_modules`: also those that this model has not, and the
        # embeddings around the patch embedding, which it makes a unit of its own.
        embedding = model.get_input_embeddings()
        names = {type(module).__name__ for module in model.modules() if embedding not in module.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(names & set(model._no_split_modules))


@functools.cache
def _cpu_group(_world: Any) -> Any:
    """A process group for small decisions, which do not wait for the GPU."""
    return distributed.new_group(backend="gloo")


def largest(number: int) -> int:
    """The largest of the processes' numbers. Every process must ask."""
    if PartialState().num_processes == 1:
        return number
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=_cpu_group(distributed.group.WORLD))
    return int(tensor)


def rows_at_end(loader: DataLoader, processes: int) -> int:
    """Images in the last batch of an epoch over all processes, where some are repeated to fill it; else 0."""
    for sampler in samplers_of(loader):
        if isinstance(sampler, BatchSampler) and not isinstance(sampler, BatchSamplerShard):
            images: Any = sampler.sampler
            full = sampler.batch_size * processes
            return 0 if processes == 1 or sampler.drop_last else len(images) % full
    return 0


def without_repeated(batch: dict[str, torch.Tensor], rows: int, process: int) -> dict[str, torch.Tensor]:
    """The part of a process's last batch that is among the first `rows` of all processes'."""
    size = len(batch["labels"])
    own = min(max(rows - process * size, 0), size)
    if own > 0:
        return {key: value[:own] for key, value in batch.items()}
    # The other processes wait for this one's gradients: one image goes through the model, for nothing.
    batch = {key: value[:1] for key, value in batch.items()}
    return {**batch, "labels": torch.full_like(batch["labels"].flatten()[:1], IGNORED, dtype=torch.long)}


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` in the main process only; return its result, or raise its `InputError`, in all of them."""
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
