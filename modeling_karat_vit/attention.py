# SPDX-License-Identifier: Apache-2.0
"""
The operator of Kolmogorov-Arnold Attention and its ways to compute it.

`KArAtOperator` holds the parameters. `activate` is the mathematics: rows of scores in, activated rows out. Three
functions attend with it: `eager_karat_attention`, the reference, which gives the attention maps;
`portable_karat_attention`, which never forms the activated map of phi1_w2 and keeps nothing of the size of the scores
for the backward pass; and `fused_karat_attention`, whose Triton kernels (`kernels.py`) keep the scores on the chip.

Shapes: B images, h KArAt heads, N tokens, d head size, r rank. Scores are S = Q K^T * scaling, (B, h, N, N).
"""

import contextlib
import itertools
import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import initialization as init

from .basis import (
    FrozenParameter,
    LinearEdgeFunctions,
    Start,
    is_traced,
    make_edges,
    weighted_sum,
    weighted_sum_backward_weights,
    weighted_sum_backward_x,
    weights_of,
)


try:
    from .kernels import INTERPRET, MAX_HEAD_SIZE, MAX_RANK, form_of, fused_attention
except ImportError:  # no Triton
    fused_attention = None

_MEAN_COMPONENT = slice(0, 1)


class KArAtOperator(nn.Module):
    """
    The learnable activation of every row of scores: a composition of steps Phi and, in the modular variants, a linear
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
        The parameters by name, cast to `dtype`, and resampled where `grids`, a pair of patch grids (own, wanted), says
        so.
        """
        tensors = {} if self.projector is None else {"projector": self.projector.to(dtype)}
        for index, step in enumerate(self.edges):
            tensors |= {f"edges.{index}.{name}": tensor for name, tensor in step(dtype).items()}
        if grids is not None and tuple(grids[0]) != tuple(grids[1]):
            tensors = {name: self.resample(name, tensor, *grids) for name, tensor in tensors.items()}
        return tensors

    def resample(self, name: str, tensor: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]):
        """
        One parameter for another patch grid, (rows, columns).

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
        axes = (-1,) if step == 0 and self.mode != "w1_phi2" else ()
        if step == len(self.edges) - 1 and self.mode != "phi1_w2":
            axes += (-2,)
        return axes

    def reduce(self, scores, tensors, keep=None, lean=False) -> torch.Tensor:
        """Everything but the last step: what is left of the scores has r columns, or N with full rank."""
        x = scores
        if self.mode == "w1_phi2":
            return x @ tensors["projector"].transpose(1, 2)
        steps = self.edges if self.mode == "phi1_w2" else self.edges[:-1]
        for index, step in enumerate(steps):
            x = step.activate(x, _of(tensors, f"edges.{index}."), keep if index == 0 else None, lean)
        return x

    def activate(self, scores, tensors, keep=None, lean=False) -> torch.Tensor:
        """
        The activated attention map.

        Args:
            scores: (B, h, N, N), finite.
            tensors: the parameters, from `tensors()`.
            keep: boolean, broadcastable to `scores`; keys that are False neither shape the row nor appear in it.
            lean: use the cheaper arithmetic of the portable path.

        Returns:
            (B, h, N, N)
        """
        scores = scores if keep is None else scores.masked_fill(~keep, 0.0)
        x = self.reduce(scores, tensors, keep, lean)
        if self.mode == "phi1_w2":
            x = x @ tensors["projector"].transpose(1, 2)
        else:
            # With full rank the last step is the first, and meets the keys.
            first = len(self.edges) == 1 and self.mode is None
            tensors = _of(tensors, f"edges.{len(self.edges) - 1}.")
            x = self.edges[-1].activate(x, tensors, keep if first else None, lean)
        if self.config.project_l1:
            return project_on_simplex(x, keep)
        return x if keep is None else x * keep

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
        with _no_autocast(query.device.type):
            tensors = self.tensors(dtype, grids)
            if keep is not None and keep.dim() == 2:
                keep = keep[:, None, None, :]
            if way == "eager":
                return eager_karat_attention(self, query, key, value, scaling, tensors, keep)
            return portable_karat_attention(self, query, key, value, scaling, tensors, keep), None, None


def eager_karat_attention(operator, query, key, value, scaling, tensors, keep=None):
    """
    The reference: scores, activation, product, at least in fp32.

    Returns:
        Output (B, h, N, d), activated maps and scores (B, h, N, N), all in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scaling
    maps = operator.activate(scores, tensors, keep)
    output = maps @ _zero_rows(value.to(dtype), keep)
    return output.to(query.dtype), maps.to(query.dtype), scores.to(query.dtype)


def portable_karat_attention(operator, query, key, value, scaling, tensors, keep=None):
    """
    The same output, lean in memory: the batch is worked through in chunks, and the backward pass redoes a chunk from
    q, k and v, so that nothing of the size of the scores outlives its chunk. For phi1_w2, (H W^T) V = H (W^T V), and
    the N x N map is never formed; the other variants and the L1 projection form it for one chunk at a time.

    Memory beyond the inputs: O(chunk * h * N^2), with the chunk chosen so that this is a fixed budget.

    Returns:
        Output (B, h, N, d) in the dtype of `query`.
    """
    names = list(tensors)
    factored = operator.mode == "phi1_w2" and not operator.config.project_l1

    def attend(keep, query, key, value, *parameters):
        tensors = dict(zip(names, parameters))
        scores = _visible_scores(query, key, scaling, keep)
        value = _zero_rows(value.to(scores.dtype), keep)
        if factored:
            projected = tensors["projector"].transpose(1, 2) @ value
            output = operator.reduce(scores, tensors, keep, lean=True) @ projected
        else:
            output = operator.activate(scores, tensors, keep, lean=True) @ value
        return output.to(query.dtype)

    if is_traced():
        return attend(keep, query, key, value, *tensors.values())
    floats = query.shape[2] * key.shape[2] * max(step.floats_per_score for step in operator.edges)
    maps = max(1, _budget(query.device) // floats)
    if factored and isinstance(operator.edges[0], LinearEdgeFunctions):
        (step,) = operator.edges
        coefficients = step.lean_coefficients(_of(tensors, "edges.0."))
        chunks = _Chunks(query, maps)
        return _Factored.apply(step, scaling, chunks, keep, query, key, value, coefficients, tensors["projector"])
    chunk = max(1, maps // query.shape[1])
    return _ChunkedRecompute.apply(attend, chunk, keep, query, key, value, *tensors.values())


def fused_karat_attention(operator, query, key, value, scaling, keep=None, grids=None):
    """
    The same output by the fused kernels: memory linear in N, no N x N tensor in device memory, forward or backward.

    Args:
        keep: boolean (B or 1, N), or `None`.
        grids: patch grids (own, wanted) to resample the parameters between, or `None`.

    Returns:
        Output (B, h, N, d) in the dtype of `query`.
    """
    if INTERPRET and query.dtype == torch.bfloat16:
        # Triton's interpreter would multiply bf16 as the integers that it keeps it in.
        output = fused_karat_attention(operator, query.float(), key, value, scaling, keep, grids)
        return output.to(query.dtype)
    (step,) = operator.edges
    # The kernels take one dtype, and would read another one as it.
    key, value = key.to(query.dtype), value.to(query.dtype)
    if grids is None:
        own, projector = step(torch.float32), operator.projector.to(torch.float32)
    else:
        with _no_autocast(query.device.type):
            tensors = operator.tensors(torch.float32, grids)
        own, projector = _of(tensors, "edges.0."), tensors["projector"]
    absent = (own["scale_basis"].new_empty(0),) * (3 - len(step.parameter_names))
    # A family may lack one of its parameters: a rational function of constant denominator.
    basis = [absent[0] if (tensor := own.get(name)) is None else tensor for name in step.parameter_names]
    parameters = [*basis, *absent, own["scale_basis"], own["scale_base"], projector]
    return fused_attention(query, key, value, parameters, keep, scaling, form_of(step))


def why_not_fused(config, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the fused kernels do not apply to a model of this configuration there; `None` if they do."""
    heads, rank = config.hidden_size // config.num_attention_heads, config.karat_rank
    if fused_attention is None:
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


def _budget(device: torch.device) -> int:
    """Floats that a chunk of the portable path may hold: within the caches of a CPU, filling the machine on a GPU."""
    return 2**20 * torch.get_num_threads() if device.type == "cpu" else 2**28


class _ChunkedRecompute(torch.autograd.Function):
    """
    `attend(keep, query, key, value, *parameters)` over chunks of the batch; the backward pass recomputes each chunk.
    """

    @staticmethod
    def forward(ctx, attend, chunk, keep, query, key, value, *parameters):
        ctx.attend, ctx.chunk = attend, chunk
        ctx.save_for_backward(keep, query, key, value, *parameters)
        outputs = [attend(*part, *parameters) for part in _chunks(chunk, keep, query, key, value)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        # Gradient checkpointing allows to read `saved_tensors` once.
        keep, query, key, value, *parameters = ctx.saved_tensors
        batched = (query, key, value)
        needed = ctx.needs_input_grad[3:]
        batched_grads = [torch.empty_like(x) if need else None for x, need in zip(batched, needed)]
        parameter_grads = [torch.zeros_like(p) if need else None for p, need in zip(parameters, needed[3:])]
        leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed[3:])]
        start = 0
        for keep_part, *parts in _chunks(ctx.chunk, keep, *batched):
            stop = start + parts[0].shape[0]
            parts = [x.detach().requires_grad_(need) for x, need in zip(parts, needed)]
            wanted = [x for x in (*parts, *leaves) if x.requires_grad]
            with torch.enable_grad(), _no_autocast(grad_output.device.type):
                output = ctx.attend(keep_part, *parts, *leaves)
                # Not all take part: the scores of constant functions do not, and there may be nothing else.
                if output.requires_grad:
                    grads = torch.autograd.grad(output, wanted, grad_output[start:stop], materialize_grads=True)
                else:
                    grads = map(torch.zeros_like, wanted)
                grads = iter(grads)
            for whole, need in zip(batched_grads, needed):
                if need:
                    whole[start:stop] = next(grads)
            for whole, need in zip(parameter_grads, needed[3:]):
                if need:
                    whole += next(grads)
            start = stop
        return None, None, None, *batched_grads, *parameter_grads


def _chunks(size: int, keep, *batched):
    """Parts of at most `size` images; `keep` may have a batch of its own or one for all."""
    batch = batched[0].shape[0]
    # An empty batch is one empty part.
    for start in range(0, max(batch, 1), size):
        part = slice(start, start + size)
        yield (keep if keep is None or keep.shape[0] == 1 else keep[part]), *(x[part] for x in batched)


class _Chunks:
    """
    The maps of a batch, about `maps` of them at a time. Every tensor is cut the same way, into a list of its parts; M
    is the number of maps in a part.

    On a CPU a part has several images of one head: the same number for every thread, because products of batches of
    matrices are split by whole matrices, and the three heads of an image would keep the second of two threads idle for
    half of the time. With fewer images, or room for fewer maps, than threads, and on other devices, where a few large
    launches are best, a part has all heads of its images.
    """

    def __init__(self, query: torch.Tensor, maps: int):
        self.batch, self.heads = query.shape[:2]
        threads = torch.get_num_threads()
        self.by_head = query.device.type == "cpu" and min(self.batch, maps) >= threads
        self.images = max(1, maps // threads) * threads if self.by_head else max(1, maps // self.heads)

    @property
    def most(self) -> int:
        """The largest M."""
        return min(self.images, self.batch) * (1 if self.by_head else self.heads)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """New memory for something of the shape of `x`, (B, h, ...), of which the parts are views."""
        return torch.empty_like(x) if self.by_head else torch.empty_like(x, memory_format=torch.contiguous_format)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of (B, h, ...), one entry for each map: (M, ...)."""
        if self.by_head:
            return [part for head in x.unbind(1) for part in head.split(self.images)]
        return list(x.flatten(0, 1).split(self.images * self.heads))

    def parameters(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of (h, ...), one entry for each head: (M, ...)."""
        sizes = [min(self.images, self.batch - first) for first in range(0, max(self.batch, 1), self.images)]
        if self.by_head:
            return [head.expand(size, *head.shape) for head in x.unbind(0) for size in sizes]
        all_maps = x.repeat(sizes[0], *(1,) * (x.dim() - 1))
        return [all_maps[: size * self.heads] for size in sizes]

    def sums(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Where to sum what `parameters` gave: of (h, ...) the heads of each part, (1 or h, ...)."""
        count = -(-max(self.batch, 1) // self.images)
        return [head for head in x.split(1) for _ in range(count)] if self.by_head else [x] * count


class _Factored(torch.autograd.Function):
    """
    H (W^T V) of the linear families, a chunk at a time. The backward pass, written out, redoes scores and features; H
    and W^T V, of r columns and r rows, are kept, so that it does not redo the products.

    Scores, features and H are transposed, so that one product serves all features (see `weighted_sum`).
    """

    @staticmethod
    def forward(ctx, step, scaling, chunks, keep, query, key, value, coefficients, projector):
        ctx.step, ctx.scaling, ctx.chunks = step, scaling, chunks
        output, kept = chunks.like(query), []
        memory = _Maps(chunks.most, 1, coefficients.shape[1], query, key)
        masks = _masks(chunks, keep, query)
        tensors = (chunks.parts(x) for x in (query, key, value, output))
        parameters = (chunks.parameters(x) for x in (coefficients.transpose(1, 2).flatten(2), projector.mT))
        for mask, q, k, v, y, weights, project in zip(masks, *tensors, *parameters):
            (scores,), features, places = memory.of(len(q))
            step.lean_features(_transposed_scores(q, k, scaling, mask, scores), places)
            hidden = weighted_sum(features, weights_of(weights, mask))
            projected = torch.bmm(project, _zero_rows(v.to(hidden.dtype), mask))
            _multiply(hidden.mT, projected, y)
            kept += hidden, projected
        memory.give_back()
        ctx.save_for_backward(keep, query, key, value, coefficients, projector, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        step, scaling, chunks = ctx.step, ctx.scaling, ctx.chunks
        # Gradient checkpointing allows to read `saved_tensors` once.
        keep, query, key, value, coefficients, projector, *kept = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_coefficients, needs_projector = ctx.needs_input_grad[4:]
        memory = _Maps(chunks.most, 2, coefficients.shape[1], query, key)
        grads = [chunks.like(x) for x in (query, key, value)]
        slopes = (step.derivative_coefficients(coefficients) * scaling).transpose(1, 2).flatten(2)
        d_weights = torch.zeros_like(coefficients.transpose(1, 2).flatten(2))
        d_projector = torch.zeros_like(projector)
        masks = _masks(chunks, keep, query)
        tensors = (chunks.parts(x) for x in (query, key, value, grad_output, *grads))
        parameters = (chunks.parameters(x) for x in (slopes, projector))
        sums = (chunks.sums(x) for x in (d_weights, d_projector))
        rows = zip(kept[::2], kept[1::2], masks, *tensors, *parameters, *sums)
        with _no_autocast(grad_output.device.type):
            for hidden, projected, mask, q, k, v, dy, dq, dk, dv, slope, project, d_weight, d_project in rows:
                q, k, v, dy = (x.to(hidden.dtype) for x in (q, k, v, dy))
                d_projected = torch.bmm(hidden, dy)
                if needs_v:
                    _multiply(project, d_projected, dv)
                    if mask is not None:
                        dv.masked_fill_(~mask.mT, 0.0)
                if needs_projector:
                    _add(d_project, torch.bmm(_zero_rows(v, mask), d_projected.mT))
                if not (needs_q or needs_k or needs_coefficients):
                    continue
                d_hidden = torch.bmm(projected, dy.mT)
                (scores, product), features, places = memory.of(len(q))
                _, derivatives = step.lean_features_and_derivatives(
                    _transposed_scores(q, k, scaling, mask, scores), places
                )
                if needs_coefficients:
                    _add(d_weight, weighted_sum_backward_weights(features, d_hidden, mask))
                if needs_q or needs_k:
                    # The features are there, and the scores no longer needed.
                    slope = weights_of(slope, mask)
                    d_scores = weighted_sum_backward_x(derivatives, slope, d_hidden, scores, product)
                if needs_q:
                    _multiply(d_scores.mT, k, dq)
                if needs_k:
                    _multiply(d_scores, q, dk)
        memory.give_back()
        d_coefficients = d_weights.unflatten(2, coefficients.shape[1::2]).transpose(1, 2)
        found = (*grads, d_coefficients, d_projector)
        return None, None, None, None, *(x if need else None for x, need in zip(found, ctx.needs_input_grad[4:]))


class _Maps:
    """
    Memory for the chunks of a call: `count` times the scores of M maps at most, transposed, and `features` of them.

    On a CPU it is kept from call to call (`give_back`): new pages cost more than the arithmetic on them.
    """

    spare: list[torch.Tensor] = []  # One or none; who takes it has it for himself, in any thread.
    KEPT = 2**24  # Floats, or as many as the budget is.

    def __init__(self, most: int, count: int, features: int, query: torch.Tensor, key: torch.Tensor):
        shape = (count + features, most, key.shape[2], query.shape[2])
        self.memory = self.take(math.prod(shape), query)
        memory = self.memory[: math.prod(shape)].view(shape)
        self.scores, self.features = memory[:count], memory[count:].view(most, features, *shape[2:])
        self.size = None

    @classmethod
    def take(cls, floats: int, like: torch.Tensor) -> torch.Tensor:
        """At least so many floats."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if cls.may_keep(like):
            try:
                memory = cls.spare.pop()
            except IndexError:
                memory = None
            if memory is not None and memory.dtype == dtype and len(memory) >= floats:
                return memory
            # A tensor of the inference mode could not be written to outside.
            with torch.inference_mode(False):
                return like.new_empty(floats, dtype=dtype)
        return like.new_empty(floats, dtype=dtype)

    @staticmethod
    def may_keep(like: torch.Tensor) -> bool:
        """Not what is no memory (fake tensors), and nothing while a mode looks on that counts memory."""
        return like.device.type == "cpu" and type(like) is torch.Tensor and not is_in_torch_dispatch_mode()

    def give_back(self) -> None:
        most = max(self.KEPT, _budget(self.memory.device))
        if not self.spare and len(self.memory) <= most and self.may_keep(self.memory):
            self.spare.append(self.memory)

    def of(self, maps: int) -> tuple[tuple, torch.Tensor, list]:
        """For M maps: `count` of (M, N, N); (M, features * N, N), and its views (M, N, N)."""
        if maps != self.size:
            self.size, features = maps, self.features[:maps]
            self.views = self.scores[:, :maps].unbind(0), features.flatten(1, 2), list(features.unbind(1))
        return self.views


def _masks(chunks: _Chunks, keep: torch.Tensor | None, query: torch.Tensor):
    """`keep`, (B or 1, 1, 1, N), for the maps of each part: (M, 1, N), or `None` again and again."""
    return itertools.repeat(None) if keep is None else chunks.parts(keep.expand(*query.shape[:2], 1, -1))


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """The products a b of batches of matrices, in `out`, which may be of another dtype."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def _add(total: torch.Tensor, products: torch.Tensor) -> None:
    """Add M matrices to those of their heads, (1 or h, ...)."""
    total += products.unflatten(0, (-1, len(total))).sum(0)


def project_on_simplex(rows: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """
    Euclidean projection of each row on the probability simplex (the paper's L1 projection; Duchi et al. 2008).

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
    Softmax attention with its maps, for the heads beside KArAt heads: at least in fp32, fp64 stays fp64.

    Args:
        query, key, value: (B, h, N, d).
        dropout: probability of dropping an attention weight.
        keep: boolean, broadcastable to the scores.

    Returns:
        Output (B, h, N, d), maps and scores (B, h, N, N), all in the dtype of `query`.
    """
    with _no_autocast(query.device.type):
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scaling
        visible = scores if keep is None else scores.masked_fill(~keep, torch.finfo(dtype).min)
        maps = F.dropout(visible.softmax(-1), p=dropout)
        output = maps @ value.to(dtype)
        return output.to(query.dtype), maps.to(query.dtype), scores.to(query.dtype)


def _of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _visible_scores(query, key, scaling: float, keep: torch.Tensor | None) -> torch.Tensor:
    """Scores of the portable path, at least in fp32, 0 for keys that nobody may see: (B, h, N, N)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # The queries are fewer numbers to scale than the scores.
    scores = (query.to(dtype) * scaling) @ key.to(dtype).transpose(2, 3)
    return scores if keep is None else scores.masked_fill(~keep, 0.0)


def _transposed_scores(query, key, scaling: float, keep: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """The same of M maps in `out`, (M, N, N), with keys as rows and queries as columns; `keep` is (M, 1, N)."""
    query, key = query.to(out.dtype), key.to(out.dtype)
    if out.device.type == "cpu":
        torch.baddbmm(out, key, query.mT, beta=0, alpha=scaling, out=out)
    else:  # Not on every device does zero times what lies there give zero.
        torch.bmm(key, (query * scaling).mT, out=out)
    return out if keep is None else out.masked_fill_(~keep.mT, 0.0)


def _zero_rows(value: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Values of keys that nobody may see, as zeros; a mask per query has no such keys, and acts on the map."""
    if keep is None or keep.shape[-2] != 1:
        return value
    return value.masked_fill(~keep.transpose(-2, -1), 0.0)


def _no_autocast(device_type: str):
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
