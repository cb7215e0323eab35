# SPDX-License-Identifier: Apache-2.0
"""Attention as it happens: scores before the activation and maps after it, of KArAt and softmax models alike."""

import contextlib
from dataclasses import dataclass

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


@torch.inference_mode()
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
    model = checkpoint.model
    model.set_attn_implementation("eager")  # the one that has maps
    own = model.dtype
    kept: dict[int, list[Attention]] = {block: [] for block in blocks}
    starts = range(0, len(pixels), batch_size)
    try:
        if dtype is not None:
            model.to(dtype)
        with contextlib.ExitStack() as hooks:
            for block in blocks:
                _watch(checkpoint, block, kept[block], hooks)
            for start in tqdm(starts, desc=f"Attention of {checkpoint.name}", unit="batch", leave=False, delay=1):
                model.vit(pixels[start : start + batch_size].to(model.device, model.dtype))
    finally:
        model.to(own)
    return {
        block: Attention(torch.cat([part.scores for part in parts]), torch.cat([part.maps for part in parts]))
        for block, parts in kept.items()
    }


def _watch(checkpoint: Checkpoint, block: int, kept: list[Attention], hooks: contextlib.ExitStack) -> None:
    """Append the attention of one block to `kept` at every forward pass."""
    module = checkpoint.attention(block)
    projected = {}

    def projection(name):
        def hook(_, __, output):
            projected[name] = output

        return hook

    def attention(_, __, output):
        maps, scores = output[1], output[2] if len(output) > 2 else None
        if scores is None:  # Transformers' own attention does not hand its scores on.
            query, key = (
                projected[name].unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for name in ("query", "key")
            )
            scores = (query @ key.mT) * module.scaling
        kept.append(Attention(scores.cpu(), maps.cpu()))

    for target, hook in (
        (module.q_proj, projection("query")),
        (module.k_proj, projection("key")),
        (module, attention),
    ):
        hooks.callback(target.register_forward_hook(hook).remove)
