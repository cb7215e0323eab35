# SPDX-License-Identifier: Apache-2.0
"""Tensors whole and in parts: under FSDP2 each process has a shard; files have whole tensors, whatever the layout."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def plain_name(name: str) -> str:
    """A parameter's name without what compiling and activation checkpointing add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU. All processes call it, and get it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def united(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which each process has the part that it has of `like`, on whatever device."""
    if not isinstance(like, DTensor):
        return shard
    layout = (like.device_mesh, like.placements)
    shard = shard.to(like.to_local().device)
    return DTensor.from_local(shard, *layout, run_check=False, shape=like.shape, stride=like.stride())


def divided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, cut as `like` is; there is nothing to send."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
