# SPDX-License-Identifier: Apache-2.0
"""
The portable path, `attn_implementation="karat_portable"`: plain PyTorch for CPU, MPS, export and compilers, lean in
memory and passes over it. What is computed stands in `basis.py` and `karat_operator.py`; here is how it gets cheap:

* the batch is worked through in chunks, and the backward pass redoes a chunk from q, k and v;
* (H W^T) V = H (W^T V), so that the N x N map of phi1_w2 is never formed;
* Phi of families that are linear in their coefficients is one product with their features, which cost one pass each
  (`LeanFeatures`), and whose derivative is written out;
* on a CPU, memory is written again and again: new pages cost more than the arithmetic on them.

Shapes: as in `basis.py` and `karat_operator.py`; M maps, each of one head of one image.
"""

import contextlib
import itertools
import math

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced() -> bool:
    """
    Tell whether a compiler, the tracer of an exporter, a transform of `torch.func` or forward-mode differentiation
    looks on. They differentiate and plan memory themselves, do not look into an autograd function of ours, and may have
    no values to ask for.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def no_autocast(device_type: str):
    """Make a context without autocast: half precision is computed in fp32."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def portable_karat_attention(operator, query, key, value, scaling, tensors, keep=None):
    """
    Attend as `eager_karat_attention`, lean in memory: nothing of the size of the scores outlives its chunk of the
    batch. The variants without a factored form, and the L1 projection, form the map for one chunk at a time.

    Memory beyond the inputs: O(chunk * h * N^2), with the chunk chosen so that this is a fixed budget.

    Queries, keys and values are (B, h, N, d), `tensors` the operator's, `keep` a mask of the keys, (B or 1, 1, 1, N),
    boolean, or `None`; the output is (B, h, N, d), in the dtype of `query`.
    """
    names = list(tensors)
    factored = operator.mode == "phi1_w2" and not operator.config.project_l1

    def attend(query, key, value, keep, *parameters):
        tensors = dict(zip(names, parameters))
        dtype = torch.promote_types(query.dtype, torch.float32)
        # The queries are fewer numbers to scale than the scores.
        scores = (query.to(dtype) * scaling) @ key.to(dtype).transpose(2, 3)
        scores = scores if keep is None else scores.masked_fill(~keep, 0.0)
        value = _zero_rows(value.to(dtype), keep)
        if factored:
            projected = tensors["projector"].transpose(1, 2) @ value
            output = operator.reduce(scores, tensors, keep, lean_phi) @ projected
        else:
            output = operator.activate(scores, tensors, keep, lean_phi) @ value
        return output.to(query.dtype)

    if is_traced():
        return attend(query, key, value, keep, *tensors.values())
    floats = query.shape[2] * key.shape[2] * max(map(floats_per_score, operator.edges))
    maps = max(1, _budget(query.device) // floats)
    if factored and (lean := lean_features_of(operator.edges[0])) is not None:
        coefficients = lean.coefficients(operator.of_step(tensors, 0))
        chunks = _Chunks(query, maps)
        return _Factored.apply(lean, scaling, chunks, keep, query, key, value, coefficients, tensors["projector"])
    return in_chunks(attend, maps // query.shape[1], (query, key, value, keep), tensors.values())


def _budget(device: torch.device) -> int:
    """Floats that a chunk may hold: within the caches of a CPU, filling the machine on a GPU."""
    return 2**20 * torch.get_num_threads() if device.type == "cpu" else 2**28


def floats_per_score(step) -> int:
    """Count the floats that evaluating a step keeps per score."""
    if step.family == "fourier":
        return 4 * step.grid_size
    if step.family == "spline":
        return 3 * (step.grid_size + step.order)
    if step.family == "rational":
        return 4 * step.out_features * (step.numerator.shape[1] + 2)
    return 8 * step.out_features


def in_chunks(attend, size: int, batched, parameters) -> torch.Tensor:
    """
    Compute `attend(*batched, *parameters)` for `size` images at a time, or one; the backward pass redoes each chunk.

    Args:
        batched: tensors of which those as long as the first are cut; `None` among them stays.
        parameters: tensors that every chunk meets whole.
    """
    return _ChunkedRecompute.apply(attend, max(1, size), len(batched), *batched, *parameters)


class _ChunkedRecompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend, size, count, *tensors):
        batch = len(tensors[0])

        def cut(part, tensors):
            own = [x if x is None or len(x) != batch else x[part] for x in tensors[:count]]
            return [*own, *tensors[count:]]

        ctx.attend, ctx.cut, ctx.parts = attend, cut, _chunks(batch, size)
        ctx.save_for_backward(*tensors)
        outputs = [attend(*cut(part, tensors)) for part in ctx.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        # Gradient checkpointing allows to read `saved_tensors` once.
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed)]
        for part in ctx.parts:
            chunk = zip(ctx.cut(part, tensors), needed)
            chunk = [x if x is None else x.detach().requires_grad_(need) for x, need in chunk]
            wanted = [x for x, need in zip(chunk, needed) if need]
            with torch.enable_grad(), no_autocast(grad_output.device.type):
                output = ctx.attend(*chunk)
                # Not all take part: the scores of constant functions do not, and there may be nothing else.
                if output.requires_grad:
                    found = torch.autograd.grad(output, wanted, grad_output[part], materialize_grads=True)
                else:
                    found = map(torch.zeros_like, wanted)
            for whole, gradient in zip((x for x in ctx.cut(part, grads) if x is not None), found):
                whole += gradient
        return None, None, None, *grads


def _chunks(batch: int, size: int) -> list[slice]:
    """Cut a batch; an empty one is one empty part."""
    return [slice(start, min(start + size, batch)) for start in range(0, max(batch, 1), size)]


# ---------------------------------------------------------------------------------------------- features of a family


class LeanFeatures:
    """
    Features L_k of a step that is linear in its coefficients, with the span of its own F_k and fewer passes over the
    inputs; and functions D_j that span their derivatives. Both include the base function.

    Subclasses say what those of the basis are. `out` is memory that features are written to.
    """

    def __init__(self, step):
        self.step = step

    def of_basis(self, x: torch.Tensor, out: list[torch.Tensor] | None) -> tuple[list, list]:
        """Compute the L_k(x) and D_j(x) of the basis; the L_k are in the first tensors of `out`, or in new ones."""
        raise NotImplementedError

    def stack(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Make the coefficients of the L_k from those of the F_k, (h, K, P, Q)."""
        return coefficients

    def derivative_stack(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Make the coefficients of the D_j in d/dx sum_k c_k L_k(x), (h, J, P, Q), from c, (h, K, P, Q)."""
        raise NotImplementedError

    def features(self, x: torch.Tensor, out: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Compute what Phi is a weighted sum of."""
        features, _ = self.of_basis(x, out)
        return _placed(features if self.step.base is None else [*features, self.step.base(x)], out)

    def features_and_derivatives(self, x: torch.Tensor, out: list[torch.Tensor] | None = None) -> tuple[list, list]:
        """Compute `features` without a graph, and what their derivatives are weighted sums of."""
        features, derivatives = self.of_basis(x, out)
        if self.step.base is not None:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                base = self.step.base(x)
                (derivative,) = torch.autograd.grad(base, x, torch.ones_like(base))
            features, derivatives = [*features, base.detach()], [*derivatives, derivative]
        return _placed(features, out), derivatives

    def coefficients(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Make the weights of `features`, (h, K, P, Q), scales included."""
        coefficients = self.stack(self.step.stack_coefficients(tensors) * tensors["scale_basis"].unsqueeze(1))
        if self.step.base is None:
            return coefficients
        return torch.cat([coefficients, tensors["scale_base"].unsqueeze(1)], dim=1)

    def derivative_coefficients(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Make the weights of the derivatives, (h, J, P, Q), from those of the features, (h, K, P, Q)."""
        if self.step.base is None:
            return self.derivative_stack(coefficients)
        return torch.cat([self.derivative_stack(coefficients[:, :-1]), coefficients[:, -1:]], dim=1)


class LeanFourier(LeanFeatures):
    """Harmonics by recurrence from one sine and one cosine: 2 cos(x) cos(mx) - cos((m-1)x) = cos((m+1)x)."""

    def of_basis(self, x, out):
        # With the factors in `stack`, each further harmonic is one pass over the inputs.
        grid_size = self.step.grid_size
        out = out or [None] * (2 * grid_size)
        cos_out, sin_out = out[:grid_size], out[grid_size:]
        cos, sin = [torch.cos(x, out=cos_out[0])], [torch.sin(x, out=sin_out[0])]
        first = cos[0]
        for m in range(1, grid_size):
            if m == 1:
                minus_half = torch.full((), -0.5, dtype=x.dtype, device=x.device)
                cos.append(torch.addcmul(minus_half, first, first, out=cos_out[1]))
                sin.append(torch.mul(first, sin[0], out=sin_out[1]))
            else:
                weight = -4 if m % 2 == 0 else 1
                cos.append(torch.addcmul(cos[m - 2], first, cos[m - 1], value=weight, out=cos_out[m]))
                sin.append(torch.addcmul(sin[m - 2], first, sin[m - 1], value=weight, out=sin_out[m]))
        return cos + sin, cos + sin

    def stack(self, coefficients):
        # F_m over L_m: 1, 2, -1, -2, 1, ...
        ratios = [(1, 2, -1, -2)[m % 4] for m in range(self.step.grid_size)] * 2
        return coefficients * coefficients.new_tensor(ratios).view(-1, 1, 1)

    def derivative_stack(self, coefficients):
        cos, sin = coefficients.chunk(2, dim=1)
        harmonics = torch.arange(1, self.step.grid_size + 1, device=cos.device, dtype=cos.dtype).view(-1, 1, 1)
        return torch.cat([harmonics * sin, -harmonics * cos], dim=1)


class LeanSplines(LeanFeatures):
    """The splines themselves, and those of one degree less, which span their derivatives."""

    def of_basis(self, x, out):
        order = self.step.order
        if order == 0:
            return self.step.features(x), []
        lower = self.step.splines(x, order - 1)
        return self.step.next_degree(lower, self.step.in_knots(x), order), lower

    def derivative_stack(self, coefficients):
        if self.step.order == 0:
            return coefficients[:, :0]
        # B'_i = (lower_i - lower_{i+1}) / spacing
        none = torch.zeros_like(coefficients[:, :1])
        slope = self.step.grid_size / (self.step.high - self.step.low)
        return slope * coefficients.diff(dim=1, prepend=none, append=none)


_FEATURES = {"fourier": LeanFourier, "spline": LeanSplines}


def lean_features_of(step) -> LeanFeatures | None:
    """Make the lean features of a step of the operator, or `None` if its family has none."""
    return _FEATURES[step.family](step) if step.family in _FEATURES else None


def lean_phi(step, x, tensors, keep=None) -> torch.Tensor:
    """Compute Phi as `step.activate` does, by lean features if the family has them."""
    lean = lean_features_of(step)
    if lean is None:
        return step.activate(x, tensors, keep)
    coefficients = lean.coefficients(tensors)
    if is_traced():
        features = (feature if keep is None else feature * keep for feature in lean.features(x))
        first, *rest = (feature @ coefficients[:, k].transpose(1, 2) for k, feature in enumerate(features))
        return sum(rest, first)
    return _FeatureProduct.apply(lean, x, keep, coefficients)


class _FeatureProduct(torch.autograd.Function):
    """sum_k L_k(x) C_k^T with the derivative written out: both passes share the features."""

    @staticmethod
    def forward(ctx, lean, x, keep, coefficients):
        ctx.lean, ctx.shape = lean, x.shape
        # The heads of all images, one map behind the other.
        x = x.flatten(0, -3).mT.contiguous()
        keep = None if keep is None else keep.expand(*ctx.shape[:-2], 1, -1).flatten(0, -3)
        features = x.new_empty(x.shape[0], coefficients.shape[1], *x.shape[1:])
        places, derivatives = list(features.unbind(1)), []
        if ctx.needs_input_grad[1]:
            _, derivatives = lean.features_and_derivatives(x, places)
        else:
            lean.features(x, places)
        ctx.save_for_backward(keep, coefficients, features, *derivatives)
        y = torch.bmm(weights_of(_of_maps(coefficients, len(x)), keep), features.flatten(1, 2))
        return y.mT.unflatten(0, ctx.shape[:-2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        keep, coefficients, features, *derivatives = ctx.saved_tensors
        dy = dy.flatten(0, -3).mT
        dx = d_coefficients = None
        if ctx.needs_input_grad[1]:
            slopes = weights_of(_of_maps(ctx.lean.derivative_coefficients(coefficients), len(dy)), keep)
            out, product = torch.empty_like(features[:, 0]), torch.empty_like(features[:, 0])
            dx = weighted_sum_backward_x(derivatives, slopes, dy, out, product).mT.unflatten(0, ctx.shape[:-2])
        if ctx.needs_input_grad[3]:
            products = weighted_sum_backward_weights(features.flatten(1, 2), dy, keep)
            d_coefficients = products.unflatten(0, (-1, ctx.lean.step.heads)).sum(0)
            d_coefficients = d_coefficients.unflatten(2, features.shape[1:3]).transpose(1, 2)
        return None, dx, None, d_coefficients


def _of_maps(coefficients: torch.Tensor, maps: int) -> torch.Tensor:
    """(h, K, P, Q) as the weights of M maps, (M, P, K * Q)."""
    return coefficients.transpose(1, 2).flatten(2).repeat(maps // coefficients.shape[0], 1, 1)


def weights_of(matrices: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Mask the weights (M, P, K * Q) of K features: zero for inputs q that `keep`, (M, 1, Q), leaves out."""
    if keep is None:
        return matrices
    return (matrices.unflatten(2, (-1, keep.shape[-1])) * keep.unsqueeze(-2)).flatten(2)


def weighted_sum_backward_x(derivatives, slopes, dy, out, product):
    """
    Compute dx^T = sum_j D_j^T * (dy C'_j)^T in `out`, (M, Q, T), of the size of which `product` is scratch memory: J
    derivatives (M, Q, T), their weights `slopes`, (M, P, J * Q), and the gradient `dy` of y^T, (M, P, T).
    """
    if not derivatives:  # constant functions
        return out.zero_()
    first, *rest = slopes.mT.split(out.shape[1], dim=1)
    torch.bmm(first, dy, out=out).mul_(derivatives[0])
    for derivative, slope in zip(derivatives[1:], rest):
        out.addcmul_(torch.bmm(slope, dy, out=product), derivative)
    return out


def weighted_sum_backward_weights(features, dy, keep) -> torch.Tensor:
    """Compute dC = dy^T F of every map, (M, P, K * Q), for `features`, (M, K * Q, T), and `dy`, (M, P, T)."""
    return weights_of(torch.bmm(dy, features.mT), keep)


# ------------------------------------------------------------------------------------------------------------ H (W^T V)


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
        """Largest M."""
        return min(self.images, self.batch) * (1 if self.by_head else self.heads)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Make new memory for something of the shape of `x`, (B, h, ...), of which the parts are views."""
        return torch.empty_like(x) if self.by_head else torch.empty_like(x, memory_format=torch.contiguous_format)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Cut (B, h, ...), one entry for each map, into parts (M, ...)."""
        if self.by_head:
            return [part for head in x.unbind(1) for part in head.split(self.images)]
        return list(x.flatten(0, 1).split(self.images * self.heads))

    def parameters(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Repeat (h, ...), one entry for each head, for the maps of each part: (M, ...)."""
        sizes = [min(self.images, self.batch - first) for first in range(0, max(self.batch, 1), self.images)]
        if self.by_head:
            return [head.expand(size, *head.shape) for head in x.unbind(0) for size in sizes]
        all_maps = x.repeat(sizes[0], *(1,) * (x.dim() - 1))
        return [all_maps[: size * self.heads] for size in sizes]

    def sums(self, x: torch.Tensor) -> list[torch.Tensor]:
        """View the heads of each part, (1 or h, ...), of (h, ...), which sums the gradients of `parameters`."""
        count = -(-max(self.batch, 1) // self.images)
        return [head for head in x.split(1) for _ in range(count)] if self.by_head else [x] * count


class _Factored(torch.autograd.Function):
    """
    H (W^T V) of the linear families, a chunk at a time. The backward pass, written out, redoes scores and features; H
    and W^T V, of r columns and r rows, are kept, so that it does not redo the products.

    Scores, features and H are transposed: y^T = sum_k C_k F_k^T is then one product, whose few rows are the outputs.
    (Matrix products want the long sides to be contiguous.)
    """

    @staticmethod
    def forward(ctx, lean, scaling, chunks, keep, query, key, value, coefficients, projector):
        ctx.lean, ctx.scaling, ctx.chunks = lean, scaling, chunks
        output, kept = chunks.like(query), []
        memory = _Maps(chunks.most, 1, coefficients.shape[1], query, key)
        masks = _masks(chunks, keep, query)
        tensors = (chunks.parts(x) for x in (query, key, value, output))
        parameters = (chunks.parameters(x) for x in (coefficients.transpose(1, 2).flatten(2), projector.mT))
        for mask, q, k, v, y, weights, project in zip(masks, *tensors, *parameters):
            (scores,), features, places = memory.of(len(q))
            lean.features(_transposed_scores(q, k, scaling, mask, scores), places)
            hidden = torch.bmm(weights_of(weights, mask), features)
            projected = torch.bmm(project, _zero_rows(v.to(hidden.dtype), mask))
            _multiply(hidden.mT, projected, y)
            kept += hidden, projected
        memory.give_back()
        ctx.save_for_backward(keep, query, key, value, coefficients, projector, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        lean, scaling, chunks = ctx.lean, ctx.scaling, ctx.chunks
        # Gradient checkpointing allows to read `saved_tensors` once.
        keep, query, key, value, coefficients, projector, *kept = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_coefficients, needs_projector = ctx.needs_input_grad[4:]
        memory = _Maps(chunks.most, 2, coefficients.shape[1], query, key)
        grads = [chunks.like(x) for x in (query, key, value)]
        slopes = (lean.derivative_coefficients(coefficients) * scaling).transpose(1, 2).flatten(2)
        d_weights = torch.zeros_like(coefficients.transpose(1, 2).flatten(2))
        d_projector = torch.zeros_like(projector)
        masks = _masks(chunks, keep, query)
        tensors = (chunks.parts(x) for x in (query, key, value, grad_output, *grads))
        parameters = (chunks.parameters(x) for x in (slopes, projector))
        sums = (chunks.sums(x) for x in (d_weights, d_projector))
        rows = zip(kept[::2], kept[1::2], masks, *tensors, *parameters, *sums)
        with no_autocast(grad_output.device.type):
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
                _, derivatives = lean.features_and_derivatives(_transposed_scores(q, k, scaling, mask, scores), places)
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

    @classmethod
    def take(cls, floats: int, like: torch.Tensor) -> torch.Tensor:
        """Take at least so many floats."""
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
        """Tell whether memory may be kept: fake tensors are none, and a mode that looks on may count it."""
        return like.device.type == "cpu" and type(like) is torch.Tensor and not is_in_torch_dispatch_mode()

    def give_back(self) -> None:
        most = max(self.KEPT, _budget(self.memory.device))
        if not self.spare and len(self.memory) <= most and self.may_keep(self.memory):
            self.spare.append(self.memory)

    def of(self, maps: int) -> tuple[tuple, torch.Tensor, list]:
        """Cut it for M maps: `count` of (M, N, N); (M, features * N, N), and its views (M, N, N)."""
        features = self.features[:maps]
        return self.scores[:, :maps].unbind(0), features.flatten(1, 2), list(features.unbind(1))


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


def _transposed_scores(query, key, scaling: float, keep: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """
    Scores of M maps in `out`, (M, N, N), with keys as rows and queries as columns, 0 for keys that nobody may see;
    `keep` is (M, 1, N).
    """
    torch.bmm(key.to(out.dtype), (query.to(out.dtype) * scaling).mT, out=out)
    return out if keep is None else out.masked_fill_(~keep.mT, 0.0)


def _zero_rows(value: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Values of keys that nobody may see, as zeros; `keep` is (..., 1, N)."""
    return value if keep is None else value.masked_fill(~keep.mT, 0.0)


def _placed(features: list[torch.Tensor], out: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """`features` in `out`, if that is given: those that are not there yet are copied."""
    if out is None:
        return features
    for feature, place in zip(features, out, strict=True):
        if feature is not place:
            place.copy_(feature)
    return out
