# SPDX-License-Identifier: Apache-2.0
"""Attention as it happens: scores before the activation and maps after it, of KArAt and softmax models alike."""

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AttentionInterface

from image_classification.models.families import OWN, hidden_below, replaced_attention

from .models import Checkpoint


@dataclass
class Attention:
    """
    The attention of one block. First come special tokens, mostly [CLS] alone, then the patches, row by row.

    Args:
        scores: before the activation, Q K^T / sqrt(d) and relative positions if there are any, (B, heads, N, N), on the
            CPU; of a model with windows, for each of them. What hides pairs of tokens from each other is not in them.
        maps: after it, (B, heads, N, N): rows are queries. KArAt's may be negative and need not sum to 1; beside
            softmax they are softmax + gamma * KArAt.
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
        pixels: (B, 3, height, width), of which `batch_size` images are computed at once.
        dtype: to compute in, and of the result, instead of the model's: fp64 resolves small singular values.

    Returns:
        The attention by block. Memory: B * heads * N^2 * 2 floats a block.
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
                encoder = model.vit if model.config.model_type in OWN else model
                encoder(batch.to(model.device, model.dtype))
            yield kept
    finally:
        model.to(own)


def _watch(checkpoint: Checkpoint, block: int, kept: dict[int, Attention], hooks: contextlib.ExitStack) -> None:
    """Put the attention of one block into `kept` at a forward pass."""
    module: Any = checkpoint.attention(block)
    if checkpoint.model.config.model_type == "karat_vit":  # Its attention hands scores and maps on.

        def keep_attention(_, __, output):
            kept[block] = Attention(output[2].cpu(), output[1].cpu())

        hooks.callback(module.register_forward_hook(keep_attention).remove)
        return
    if replaced := replaced_attention(checkpoint.model):
        _watch_replaced(module, replaced, kept, block, hooks)
        return
    module.kept, module.kept_config = (kept, block), module.config
    module.hidden_below = hidden_below(checkpoint.model)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = RECORDED
    hooks.callback(_stop_watching, module)


def _watch_replaced(module: Any, replaced: Mapping, kept: dict, block: int, hooks: contextlib.ExitStack) -> None:
    """`_watch` a module that does not call the attention interface: as the one that `karatize` puts in its place."""
    own, seen = type(module), {}
    kind: Any = replaced.get(own.__name__, own)

    def attend(query, key, *rest):
        seen["scores"] = (query @ key.mT) * module.scale
        return kind.attend(module, query, key, *rest)

    def project(output, maps):
        kept[block] = Attention(seen["scores"].cpu(), maps.cpu())
        return kind.project(module, output, maps)

    def stop():
        del module.attend, module.project
        module.__class__ = own

    module.__class__, module.attend, module.project = kind, attend, project
    hooks.callback(stop)


def _stop_watching(module: Any) -> None:
    module.config = module.kept_config
    del module.kept, module.kept_config, module.hidden_below


def _attend_and_keep(module: Any, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attend as `eager` does, and keep scores and maps: a function of Transformers' attention interface."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.mT) * scaling
    if attention_mask is not None:
        hidden = attention_mask <= max(module.hidden_below, torch.finfo(attention_mask.dtype).min / 2)
        scores = scores + attention_mask.masked_fill(hidden, 0.0)
    if (karat := getattr(module, "karat", None)) is not None:
        how = {"scaling": scaling, "dropout": dropout, "implementation": "eager"}
        output, maps = karat(module, query, key, value, attention_mask, **how, **kwargs)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, maps = eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    kept, block = module.kept
    kept[block] = Attention(scores.cpu(), maps.cpu())
    return output, maps


RECORDED = "recorded_for_analysis"
AttentionInterface.register(RECORDED, _attend_and_keep)
