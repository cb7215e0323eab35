# SPDX-License-Identifier: Apache-2.0
"""Attention as it happens: scores before the activation and maps after it, of KArAt and softmax models alike."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .models import Checkpoint


@dataclass
class Attention:
    """
    The attention of one block. Token 0 is [CLS]; patch (row, column) of the grid is token 1 + row * columns + column.

    Args:
        scores: before the activation, Q K^T / sqrt(d), (B, heads, N, N), on the CPU.
        maps: after it, (B, heads, N, N): rows are queries. KArAt's may be negative and need not sum to 1.
    """

    scores: torch.Tensor
    maps: torch.Tensor


def record(
    checkpoint: Checkpoint,
    pixels: torch.Tensor,
    blocks: list[int],
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> dict[int, Attention]:
    """
    Run images through a model and keep the attention of some blocks.

    Args:
        checkpoint: the model.
        pixels: (B, 3, height, width).
        blocks: whose attention to keep.
        batch_size: images computed at once.
        dtype: to compute in, instead of the model's: fp64 resolves small singular values.

    Returns:
        The attention by block, in the model's dtype or `dtype`. Memory: B * heads * N^2 * 2 floats a block.
    """
    parts = list(record_batches(checkpoint, pixels, blocks, batch_size, dtype))
    return {
        block: Attention(*(torch.cat([getattr(part[block], name) for part in parts]) for name in ("scores", "maps")))
        for block in blocks
    }


def record_batches(
    checkpoint: Checkpoint,
    pixels: torch.Tensor,
    blocks: list[int],
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> Iterator[dict[int, Attention]]:
    """Run and keep as `record`, batch by batch, for what need not be kept of all images at once."""
    model = checkpoint.model
    model.set_attn_implementation("eager")  # the one that has maps
    own = model.dtype
    batches = pixels.split(batch_size)
    try:
        model.to(dtype or own)
        for batch in tqdm(batches, desc=f"Attention of {checkpoint.name}", unit="batch", leave=False, delay=1):
            kept: dict[int, Attention] = {}
            with contextlib.ExitStack() as hooks, torch.inference_mode():
                for block in blocks:
                    _watch(checkpoint, block, kept, hooks)
                model.vit(batch.to(model.device, model.dtype))
            yield kept
    finally:
        model.to(own)


def _watch(checkpoint: Checkpoint, block: int, kept: dict[int, Attention], hooks: contextlib.ExitStack) -> None:
    """Put the attention of one block into `kept` at a forward pass."""
    module: Any = checkpoint.attention(block)
    projected = {}

    def keep_projection(projection, _, output):
        projected[projection] = output.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)

    def keep_attention(_, __, output):
        maps, scores = output[1], output[2] if len(output) > 2 else None
        if scores is None:  # Transformers' own attention does not hand its scores on.
            scores = (projected[module.q_proj] @ projected[module.k_proj].mT) * module.scaling
        kept[block] = Attention(scores.cpu(), maps.cpu())

    for target, hook in ((module.q_proj, keep_projection), (module.k_proj, keep_projection), (module, keep_attention)):
        hooks.callback(target.register_forward_hook(hook).remove)
