# SPDX-License-Identifier: Apache-2.0
"""
The operator of Kolmogorov-Arnold Attention, and the reference.

`KArAtOperator` holds the parameters. `activate` is the mathematics: rows of scores in, activated rows out. Three
functions attend with it: `eager_karat_attention`, the reference, which gives the attention maps;
`portable_karat_attention` (`portable.py`), which never forms the activated map of phi1_w2 and keeps nothing of the size
of the scores for the backward pass; and `fused_karat_attention` (`fused.py`), whose Triton kernels keep the scores on
the chip.

Shapes: B images, h KArAt heads, N tokens, d head size, r rank. Scores are S = Q K^T * scaling, (B, h, N, N).
"""

import itertools
import math
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import logging

from .basis import EdgeFunctions, FrozenParameter, Start, make_edges
from .portable import is_traced, no_autocast, portable_karat_attention


fused_karat_attention: Any
try:
    from .fused import INTERPRET, MAX_HEAD_SIZE, MAX_RANK, fused_karat_attention
except ImportError:  # no Triton
    fused_karat_attention = None

logger = logging.get_logger(__name__)

_MEAN_COMPONENT = slice(0, 1)


def _phi(step: EdgeFunctions, x, tensors, keep=None) -> torch.Tensor:
    return step.activate(x, tensors, keep)


class KArAtOperator(nn.Module):
    """
    Learnable activation of every row of scores: a composition of steps Phi and, in the modular variants, a linear
    projector W without bias.

    | variant | steps | `edges` | `projector` |
    | --- | --- | --- | --- |
    | phi1_w2 | W Phi(s) | N -> r | (h, N, r) |
    | w1_phi2 | Phi(W s) | r -> N | (h, r, N) |
    | depth L >= 2 | Phi_L(... Phi_1(s)) | N -> r, r -> r, ..., r -> N | none |
    | full rank | Phi(s) | N -> N | none |
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        heads = config.num_karat_heads or config.num_attention_heads
        tokens, rank = config.num_tokens, config.karat_rank
        self.mode = config.modular_mode
        if self.mode == "phi1_w2":
            widths = [tokens, rank]
        elif self.mode == "w1_phi2":
            widths = [rank, tokens]
        else:
            widths = [tokens] + [rank] * (config.karat_depth - 1) + [tokens]
        self.edges = nn.ModuleList(
            make_edges(config, heads, n_in, n_out, self._start(n_in, last=index == len(widths) - 2))
            for index, (n_in, n_out) in enumerate(itertools.pairwise(widths))
        )
        self.projector = None
        if self.mode is not None:
            shape = (tokens, rank) if self.mode == "phi1_w2" else (rank, tokens)
            self.projector = nn.Parameter(torch.empty(heads, *shape))
        # Why the fused kernels do not apply, by all that may change between calls: asked at every call.
        self._obstacles: dict[tuple, str | None] = {}

    def __getstate__(self):
        # A copy may get another configuration, and a pickle another machine.
        return {**self.__dict__, "_obstacles": {}}

    def extra_repr(self) -> str:
        projector = "" if self.projector is None else f", projector={tuple(self.projector.shape)}"
        return f"{self.mode or 'phi only'}, project_l1={self.config.project_l1}{projector}"

    def _start(self, in_features: int, last: bool) -> Start:
        """
        The start of one step under `karat_init="scaled"`, which keeps the variance of the attention output for scores
        of unit variance, and makes a row of zero scores start near 1/N, which is where softmax starts.
        """
        tokens = self.config.num_tokens
        # The base function starts as a mean over the inputs, as the constant component does.
        base_scale = 1.0 / in_features
        if self.mode == "phi1_w2":
            # One component is the plain mean over the tokens; its column of W spreads it evenly.
            return Start(in_features**-0.5, 1.0 / tokens, _MEAN_COMPONENT, base_scale)
        if last:
            # This step gives the row itself, which sums over the N tokens once more when it meets V.
            constant = 1.0 / (tokens * in_features)
            return Start((in_features * tokens) ** -0.5, constant, slice(None), base_scale / tokens)
        return Start(in_features**-0.5, 0.0, _MEAN_COMPONENT, base_scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise W, leaving it alone if it was loaded. The steps in `edges` initialise themselves."""
        if self.projector is None:
            return
        scaled, tokens = self.config.karat_init == "scaled", self.config.num_tokens
        # W of w1_phi2 meets the scores themselves: 1/sqrt(N) hands their variance on.
        std = tokens**-0.5 if scaled and self.mode == "w1_phi2" else 0.02
        values = init.trunc_normal_(torch.empty_like(self.projector.data), mean=0.0, std=std, a=-2.0, b=2.0)
        if scaled and self.mode == "phi1_w2":
            values[..., _MEAN_COMPONENT] += 1.0 / tokens
        init.copy_(self.projector, values)

    def freeze(self) -> None:
        """Switch off the gradients that `train_basis`, `train_base` and a zero base function rule out."""
        for step in self.edges:
            if step.base is None and not isinstance(step.scale_base, FrozenParameter):
                # Nor does anything switch this one on again: DistributedDataParallel would wait for a gradient.
                step.scale_base = FrozenParameter(step.scale_base.detach(), requires_grad=False)
            for name, parameter in step.named_parameters():
                trainable = self.config.train_base if name == "scale_base" else self.config.train_basis
                if not trainable:
                    parameter.requires_grad_(False)

    def tensors(self, dtype: torch.dtype, grids=None) -> dict[str, torch.Tensor]:
        """
        Give the parameters by name, cast to `dtype`, and resampled if `grids`, patch grids (own, wanted), differ.
        """
        tensors = {} if self.projector is None else {"projector": self.projector.to(dtype)}
        for index, step in enumerate(self.edges):
            tensors |= {f"edges.{index}.{name}": tensor for name, tensor in step(dtype).items()}
        if grids is not None and tuple(grids[0]) != tuple(grids[1]):
            tensors = {name: self.resample(name, tensor, *grids) for name, tensor in tensors.items()}
        return tensors

    def resample(self, name: str, tensor: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]):
        """
        Resample one parameter for another patch grid, (rows, columns).

        Each token axis is interpolated as position embeddings are: [CLS] apart, the patches bicubic in two dimensions.
        The patch part of the scales and of W is multiplied by (N-1)/(N'-1) per token axis, so that sums over the tokens
        keep their size. Widths of wavelets are interpolated as log|s|.
        """
        if tuple(grid) == tuple(new_grid):
            return tensor
        ratio = 1.0
        if name == "projector" or name.endswith(("scale_base", "scale_basis")):
            ratio = grid[0] * grid[1] / (new_grid[0] * new_grid[1])
        is_width = name.endswith(".width")
        for axis in self._token_axes(name):
            tensor = tensor.movedim(axis, -1)
            if is_width:
                sign = resample_tokens(tensor.sign(), grid, new_grid, mode="nearest")
                widths = sign * resample_tokens(tensor.abs().log(), grid, new_grid).exp()
                # [CLS] as it is, without the rounding of exp(log).
                tensor = torch.cat([tensor[..., :1], widths[..., 1:]], dim=-1)
            else:
                tensor = resample_tokens(tensor, grid, new_grid)
                tensor = torch.cat([tensor[..., :1], tensor[..., 1:] * ratio], dim=-1)
            tensor = tensor.movedim(-1, axis)
        return tensor

    def _token_axes(self, name: str) -> tuple[int, ...]:
        """The axes of a parameter that run over the N tokens, counted from the end."""
        if name == "projector":
            return (-2,) if self.mode == "phi1_w2" else (-1,)
        step = int(name.split(".")[1])
        axes: tuple[int, ...] = (-1,) if step == 0 and self.mode != "w1_phi2" else ()
        if step == len(self.edges) - 1 and self.mode != "phi1_w2":
            axes += (-2,)
        return axes

    @staticmethod
    def of_step(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """Pick the parameters of one step, named as in its module."""
        prefix = f"edges.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def reduce(self, scores, tensors, keep=None, phi=_phi) -> torch.Tensor:
        """Compute all but the last step: what is left of the scores has r columns, or N with full rank."""
        x = scores
        if self.mode == "w1_phi2":
            return x @ tensors["projector"].transpose(1, 2)
        steps = self.edges if self.mode == "phi1_w2" else self.edges[:-1]
        for index, step in enumerate(steps):
            x = phi(step, x, self.of_step(tensors, index), keep if index == 0 else None)
        return x

    def activate(self, scores, tensors, keep=None, phi=_phi) -> torch.Tensor:
        """
        Compute the activated attention map.

        Args:
            scores: (B, h, N, N), finite.
            tensors: the parameters, from `tensors()`.
            keep: boolean, broadcastable to `scores`; keys that are False neither shape the row nor appear in it.
            phi: computes a step; the portable path has a cheaper way.

        Returns:
            (B, h, N, N)
        """
        scores = scores if keep is None else scores.masked_fill(~keep, 0.0)
        x = self.reduce(scores, tensors, keep, phi)
        if self.mode == "phi1_w2":
            x = x @ tensors["projector"].transpose(1, 2)
        else:
            last = len(self.edges) - 1
            # With full rank the last step is the first, and meets the keys.
            first = last == 0 and self.mode is None
            x = phi(self.edges[last], x, self.of_step(tensors, last), keep if first else None)
        if self.config.project_l1:
            return project_on_simplex(x, keep)
        return x if keep is None else x * keep

    def way(self, implementation: str, query: torch.Tensor) -> str:
        """Choose how to attend (see `forward`): as `implementation` names it, or else the fastest way that applies."""
        if implementation in ("eager", "karat_portable"):
            return implementation
        device, dtype = query.device.type, query.dtype
        if not is_traced():
            # Past what Transformers' configurations do at each access.
            kind = device, dtype, object.__getattribute__(self.config, "project_l1")
            if kind not in self._obstacles:
                self._obstacles[kind] = why_not_fused(self.config, device, dtype)
            obstacle = self._obstacles[kind]
        elif torch.compiler.is_compiling():
            obstacle = why_not_fused(self.config, device, dtype)
        else:
            obstacle = "tracers, `torch.func` and forward-mode differentiation cannot look into them"
        if obstacle is None and query.shape[0] > 0:
            return "karat_triton"
        if implementation == "karat_triton" and obstacle and not torch.compiler.is_compiling():
            logger.warning_once(f"KArAt heads run 'karat_portable' and not the fused kernels: {obstacle}.")
        return "karat_portable"

    def forward(self, query, key, value, scaling: float, way: str, keep=None, grids=None):
        """
        Attend.

        Args:
            query, key, value: (B, h, N, d), the KArAt heads alone.
            scaling: factor of the scores, 1/sqrt(d).
            way: `"eager"`, `"karat_portable"` or `"karat_triton"`.
            keep: boolean mask of the keys (B, N), or, for `eager` alone, per query (B, 1 or h, N, N), or `None`.
            grids: patch grids (own, wanted) to resample the parameters between, or `None`.

        Returns:
            Output (B, h, N, d) in the dtype of `query`; from `eager` also the activated maps and the scores, (B, h, N,
            N) each, otherwise `None` twice.
        """
        if way == "karat_triton":
            return fused_karat_attention(self, query, key, value, scaling, keep, grids), None, None
        dtype = torch.promote_types(query.dtype, torch.float32)
        # Half precision is computed in fp32, so autocast has to stay out.
        with no_autocast(query.device.type):
            tensors = self.tensors(dtype, grids)
            if keep is not None and keep.dim() == 2:
                keep = keep[:, None, None, :]
            if way == "eager":
                return eager_karat_attention(self, query, key, value, scaling, tensors, keep)
            return portable_karat_attention(self, query, key, value, scaling, tensors, keep), None, None


def freeze_untrained(model: nn.Module) -> None:
    """Switch off the gradients that the settings of the model's operators rule out."""
    for module in model.modules():
        if isinstance(module, KArAtOperator):
            module.freeze()


def eager_karat_attention(operator, query, key, value, scaling, tensors, keep=None):
    """
    Attend by the reference: scores, activation, product, at least in fp32.

    Returns:
        Output (B, h, N, d), activated maps and scores (B, h, N, N), all in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scaling
    maps = operator.activate(scores, tensors, keep)
    value = value.to(dtype)
    if keep is not None and keep.shape[-2] == 1:
        # What a key holds that nobody may see may be infinite. A mask per query has no such keys.
        value = value.masked_fill(~keep.transpose(-2, -1), 0.0)
    output = maps @ value
    return output.to(query.dtype), maps.to(query.dtype), scores.to(query.dtype)


def why_not_fused(config, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Say why the fused kernels do not apply to a model of this configuration there; `None` if they do."""
    heads, rank = config.hidden_size // config.num_attention_heads, config.karat_rank
    if fused_karat_attention is None:
        return "Triton is not installed"
    if config.modular_mode != "phi1_w2":
        return f"they compute modular_mode='phi1_w2', and it is {config.modular_mode!r}"
    if config.project_l1:
        return "project_l1 needs whole rows"
    if not 1 <= heads <= MAX_HEAD_SIZE or rank > MAX_RANK:
        return f"head size {heads} or karat_rank {rank} is above {MAX_HEAD_SIZE} or {MAX_RANK}"
    if device_type != "cuda" and not (device_type == "cpu" and INTERPRET):
        return f"they run on CUDA, and the model is on {device_type}"
    if device_type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (8, 0)):
        return "they need an NVIDIA GPU of compute capability 8.0 or more"
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"they compute in fp32, fp16 and bf16, and the model is in {dtype}"
    return None


def project_on_simplex(rows: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """
    Project each row on the probability simplex, in the Euclidean sense (the paper's L1 projection; Duchi et al. 2008).

    Args:
        rows: (..., N).
        keep: boolean, broadcastable; entries that are False leave before the projection and come out as 0. A row of
            which nothing is left is all 0.

    Returns:
        (..., N), non-negative, each row of sum 1.
    """
    with torch.no_grad():
        visible = rows if keep is None else rows.masked_fill(~keep, torch.finfo(rows.dtype).min)
        largest = visible.amax(-1, keepdim=True)
    # A shift of the row does not change its projection, and sums of small numbers are exact where rows are large.
    rows = rows - largest
    with torch.no_grad():
        # The threshold is never more than 1 below the largest entry: what lies lower takes no part.
        shifted = rows if keep is None else rows.masked_fill(~keep, -2.0)
        ordered = shifted.sort(dim=-1, descending=True).values
        counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
        inside = ordered - (ordered.cumsum(-1) - 1) / counts > 0
        rho = inside.sum(-1, keepdim=True).clamp(min=1)
        threshold = (ordered.cumsum(-1).gather(-1, rho - 1) - 1) / rho
        support = shifted > threshold
        support = support if keep is None else support & keep
        size = support.sum(-1, keepdim=True).clamp(min=1)
    # On its support the projection is linear, so this has the right gradient without one for the sort.
    kept = torch.where(support, rows, torch.zeros_like(rows))
    threshold = (kept.sum(-1, keepdim=True) - 1) / size
    return torch.where(support, rows - threshold, torch.zeros_like(rows))


def resample_tokens(tensor: torch.Tensor, grid, new_grid, mode: str = "bicubic") -> torch.Tensor:
    """
    Interpolate the last axis, [CLS] and `grid` = (rows, columns) patches, to `new_grid`; [CLS] stays as it is.

    Args:
        tensor: (..., 1 + rows * columns).
        mode: `"bicubic"` or `"nearest"`.

    Returns:
        (..., 1 + new rows * new columns); the tensor itself if the grids are equal.
    """
    if tuple(grid) == tuple(new_grid):
        return tensor
    cls, patches = tensor[..., :1], tensor[..., 1:]
    leading = patches.shape[:-1]
    patches = rearrange(patches.reshape(-1, patches.shape[-1]), "b (y x) -> b 1 y x", y=grid[0], x=grid[1])
    options = {"align_corners": False} if mode == "bicubic" else {}
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches = F.interpolate(patches.to(dtype), size=tuple(new_grid), mode=mode, **options).to(tensor.dtype)
    return torch.cat([cls, patches.reshape(*leading, math.prod(new_grid))], dim=-1)


def eager_softmax_attention(query, key, value, scaling, dropout: float = 0.0, keep=None):
    """
    Attend by softmax and give the maps, for the heads beside KArAt heads: at least in fp32, fp64 stays fp64.

    Args:
        query, key, value: (B, h, N, d).
        dropout: probability of dropping an attention weight.
        keep: boolean, broadcastable to the scores.

    Returns:
        Output (B, h, N, d), maps and scores (B, h, N, N), all in the dtype of `query`.
    """
    with no_autocast(query.device.type):
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scaling
        visible = scores if keep is None else scores.masked_fill(~keep, torch.finfo(dtype).min)
        maps = F.dropout(visible.softmax(-1), p=dropout)
        output = maps @ value.to(dtype)
        return output.to(query.dtype), maps.to(query.dtype), scores.to(query.dtype)
