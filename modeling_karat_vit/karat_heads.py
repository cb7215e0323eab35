# SPDX-License-Identifier: Apache-2.0
"""
KArAt heads inside the attention of another vision model.

Transformers' attention modules hand queries, keys, values and mask to a function that their configuration names.
`KArAtHeads.put_into` gives one module a configuration of its own, which names `karat_heads`: nothing of the model's
code is copied. (A module that does not go through this interface is replaced by a subclass.) Softmax heads are computed
as `attn_implementation` says, KArAt heads by `"eager"`, the reference, `"karat_portable"`, or the fused kernels where
they apply.

Shapes: B images (or windows), h heads, N tokens, d head size.
"""

import copy
import math
import sys
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_karat_vit import OPERATOR_STRUCTURE, KArAtViTConfig
from .karat_operator import KArAtOperator
from .modeling_karat_vit import KARAT_IMPLEMENTATIONS
from .portable import floats_per_score, in_chunks, is_traced, no_autocast


STARTS = ("residual", "replace")
OPERATOR_FIELDS = (*OPERATOR_STRUCTURE, "train_basis", "train_base", "karat_init")
_CHUNK = 2**24  # Floats that a chunk of biased scores may take.


@strict
class OperatorConfig(KArAtViTConfig):
    """
    What an operator has to know: its own fields (`OPERATOR_FIELDS`), the heads, and the tokens as `prefix_tokens`
    (special tokens) before a patch grid, which is `image_size` with patches of one pixel.
    """

    model_type = "karat_operator"

    prefix_tokens: int = 1

    @classmethod
    def of(cls, heads: int, karat_heads: int | None, head_size: int, prefix_tokens: int, grid, operator: dict):
        """Make it. With `karat_heads=None` all are KArAt's; a `ValueError` names what in `operator` is no setting."""
        unknown = sorted(set(operator) - set(OPERATOR_FIELDS))
        if unknown:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in unknown)}: no setting of the operator. It has "
                f"{', '.join(OPERATOR_FIELDS)}."
            )
        return cls(
            hidden_size=heads * head_size,
            num_attention_heads=heads,
            num_karat_heads=karat_heads,
            image_size=list(grid),
            patch_size=1,
            prefix_tokens=prefix_tokens,
            **operator,
        )

    @property
    def num_tokens(self) -> int:
        """N: special tokens and patches."""
        return math.prod(self.patch_grid()) + self.prefix_tokens


class KArAtHeads(nn.Module):
    """
    The KArAt heads of one attention module: its first `num_karat_heads`.

    Args:
        config: settings of the operator.
        start: `"residual"`: every head stays softmax, and `gamma`, one number per KArAt head and 0 at the start, times
            KArAt is added. `"replace"`: KArAt takes the place of softmax.
        lowest: what a mask adds to the scores of pairs that may not be seen, or less; above it, it is a bias.
    """

    def __init__(self, config: OperatorConfig, start: str, lowest: float):
        super().__init__()
        self.operator = KArAtOperator(config)
        self.heads = int(config.num_karat_heads or config.num_attention_heads)
        self.lowest = lowest
        self.gamma = nn.Parameter(torch.zeros(self.heads)) if start == "residual" else None
        self.recorded = None

    def extra_repr(self) -> str:
        return f"heads={self.heads}, start={'replace' if self.gamma is None else 'residual'}"

    def put_into(self, attention: Any) -> None:
        """Make Transformers' attention interface call these heads for `attention`, which holds them as `karat`."""
        self.model_config = attention.config
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = "karat_heads"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise `gamma`, leaving it alone if it was loaded; the operator initialises itself."""
        if self.gamma is not None:
            init.zeros_(self.gamma)

    def forward(
        self,
        attention,
        query,
        key,
        value,
        attention_mask,
        scaling: float,
        dropout: float = 0.0,
        implementation: str | None = None,
        weight: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        Attend.

        Args:
            attention: the module whose heads these are.
            query, key, value: (B, h, N, d), all heads.
            attention_mask: as the interface has it: `None`, keys (B, N), or (B or 1, h or 1, N, N), boolean or added to
                the scores.
            implementation: how to attend; default: as the model's configuration says.
            weight: factor of `gamma`, (KArAt heads, 1, 1).

        Returns:
            Output (B, N, h, d); with `eager` the attention maps (B, h, N, N), otherwise `None`. Under the residual
            start a map is softmax + gamma * KArAt.
        """
        implementation = implementation or self.model_config._attn_implementation
        kwargs |= {"scaling": scaling, "dropout": dropout}
        first = self.heads if self.gamma is None and self.recorded is None else 0
        output: Any = None
        maps: Any = None
        if first < query.shape[1]:
            softmax = _softmax_function(implementation, attention)
            rest = (x[:, first:] for x in (query, key, value))
            output, maps = softmax(attention, *rest, _of_heads(attention_mask, slice(first, None)), **kwargs)
        mask = _of_heads(attention_mask, slice(0, self.heads))
        own = (query[:, : self.heads], key[:, : self.heads], value[:, : self.heads])
        if self.recorded is not None:
            target = output[:, :, : self.heads].transpose(1, 2)
            self.recorded.append((*own, mask, scaling, target))
            return output, maps
        karat, karat_maps = self.attend(*own, mask, scaling, implementation)
        karat = karat.transpose(1, 2)
        if self.gamma is None:
            output = karat if output is None else torch.cat([karat, output], dim=2)
            if karat_maps is not None:
                maps = karat_maps if maps is None else torch.cat([karat_maps, maps], dim=1)
            return output.contiguous(), maps if implementation == "eager" else None
        others = query.shape[1] - self.heads
        gamma = self.gamma.to(karat.dtype)[:, None, None]
        gamma = gamma if weight is None else gamma * weight
        output = output + F.pad(karat * gamma[:, 0], (0, 0, 0, others))
        if karat_maps is not None and maps is not None:
            maps = maps + F.pad(karat_maps * gamma, (0, 0, 0, 0, 0, others))
        return output, maps

    def attend(self, query, key, value, attention_mask, scaling: float, implementation: str):
        """The KArAt heads alone: output (B, h, N, d), and with `eager` the maps (B, h, N, N), otherwise `None`."""
        config = self.operator.config
        if query.shape[2] != config.num_tokens or key.shape[2] != config.num_tokens:
            raise ValueError(
                f"The KArAt heads were made for {config.num_tokens} tokens ({config.prefix_tokens} special and "
                f"{'x'.join(map(str, config.patch_grid()))} patches), and met {key.shape[2]}: give `karatize` the "
                "`image_size` of your images, or resize them."
            )
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                f"KArAt heads take a tensor as mask, not a {type(attention_mask).__name__}: use "
                "`attn_implementation='sdpa'` or 'eager' with masks."
            )
        if attention_mask is None or attention_mask.dim() == 2:
            keep = None if attention_mask is None else attention_mask.bool()
            way = self.operator.way(implementation, query)
            output, maps, _ = self.operator(query, key, value, scaling, way, keep)
            return output, maps
        if attention_mask.dtype == torch.bool:
            bias, keep = None, attention_mask
        else:
            keep = attention_mask > max(self.lowest, torch.finfo(attention_mask.dtype).min / 2)
            bias = attention_mask.masked_fill(~keep, 0.0)
        return biased_karat_attention(
            self.operator, query, key, value, scaling, bias, keep, with_maps=implementation == "eager"
        )


def biased_karat_attention(operator, query, key, value, scaling, bias, keep, with_maps: bool = False):
    """
    KArAt attention whose scores have a bias, and whose mask is one of pairs: `Phi(Q K^T * scaling + bias)`. A pair that
    may not be seen contributes nothing to H, and its entry of the map is 0.

    Memory beyond the inputs: the biased scores and the map of as many images as `_CHUNK` floats hold, in the backward
    pass, too, which computes them again. (The kernels and the paths without bias form no map of the whole batch.)

    Queries, keys and values are (B, h, N, d), `bias` (or `None`) and the boolean `keep` broadcastable to (B, h, N, N).
    Returns the output, (B, h, N, d), in the dtype of `query`, and `with_maps` the activated maps, (B, h, N, N), of the
    whole batch, otherwise `None`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query.device.type):
        tensors = operator.tensors(dtype)
        names = list(tensors)

        def attend(query, key, value, bias, keep, *parameters):
            scores = (query.to(dtype) * scaling) @ key.to(dtype).transpose(2, 3)
            scores = scores if bias is None else scores + bias
            # The lean arithmetic masks keys alone.
            maps = operator.activate(scores, dict(zip(names, parameters)), keep)
            return (maps @ value.to(dtype)).to(query.dtype), maps.to(query.dtype)

        parts = query, key, value, bias, keep
        if with_maps or is_traced():
            output, maps = attend(*parts, *tensors.values())
            return output, maps if with_maps else None
        floats = query.shape[1] * query.shape[2] ** 2 * max(map(floats_per_score, operator.edges))
        return in_chunks(lambda *x: attend(*x)[0], _CHUNK // floats, parts, tensors.values()), None


def karat_heads_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What `karat_heads` names in Transformers' attention interface: the heads that `put_into` gave the module."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.karat(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("karat_heads", karat_heads_forward)


def _softmax_function(implementation: str, attention: nn.Module):
    """How the module would have computed its softmax heads: by a method of its own, or as the interface says."""
    if (own := getattr(attention, "softmax_heads", None)) is not None:
        return lambda attention, *args, **kwargs: own(*args, **kwargs)
    if implementation in KARAT_IMPLEMENTATIONS:
        implementation = "sdpa"
    eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _of_heads(mask, heads: slice):
    """The part of a mask that these heads see."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        return mask[:, heads]
    return mask
