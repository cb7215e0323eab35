# SPDX-License-Identifier: Apache-2.0
"""
Launching the fused kernels (`fused_kernels.py`): plan, launchers, autograd, and operators for torch.compile.

Importing this file needs Triton; `karat_operator.py` goes without it.
"""

import hashlib
import os
from dataclasses import dataclass, fields
from functools import cache, wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, get_type_hints

import torch


try:
    import triton
    from triton import knobs
    from triton.runtime.driver import driver
except ImportError as error:
    raise ImportError("The fused kernels of KArAt need Triton.") from error

from .fused_functions import BASE_FUNCTIONS, FAMILIES, WAVELETS
from .fused_kernels import (
    _add_parts,
    _backward_edges,
    _backward_hidden,
    _backward_keys,
    _backward_queries,
    _backward_values,
    _forward,
    _prepare,
    _reduce,
)
from .portable import no_autocast


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
MAX_HEAD_SIZE = 128
MAX_RANK = 64

_KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        _prepare,
        _forward,
        _backward_hidden,
        _backward_queries,
        _backward_keys,
        _backward_edges,
        _add_parts,
        _backward_values,
        _reduce,
    )
}


@dataclass(frozen=True)
class Form:
    """
    Function family that the kernels are compiled for.

    Args:
        family: of `FAMILIES`.
        features: features of a family that is linear in its coefficients, 0 for the others.
        order, low, slope: degree of the splines, where their grid begins, and its intervals per unit of x.
        wavelet: of `WAVELETS`.
        numerator, denominator: coefficients of the rational functions.
        base: of `BASE_FUNCTIONS`.
    """

    family: int
    features: int = 0
    order: int = 0
    low: float = 0.0
    slope: float = 0.0
    wavelet: int = 0
    numerator: int = 0
    denominator: int = 0
    base: int = 0

    def to_list(self) -> list[float]:
        """Give the fields as numbers, which custom operators take."""
        return [float(getattr(self, name)) for name in _FORM_FIELDS]

    @classmethod
    def from_list(cls, values: list[float]) -> "Form":
        return cls(*(kind(value) for kind, value in zip(get_type_hints(cls).values(), values)))


_FORM_FIELDS = tuple(field.name for field in fields(Form))


def _tiles(form: Form) -> tuple[dict[str, dict], dict[str, int]]:
    """
    What measured best on an H100 at 197 tokens and heads of 64: rows, columns, warps and stages of a tile, for tiles
    that are full and, where that pays, for the small ones of a rest; and how many programs sum gradients over images,
    as many as run at a time.
    """
    programs = {"_backward_keys": 264, "_backward_keys_rest": 1056, "_backward_edges": 1584, "_backward_values": 1056}
    if form.family >= FAMILIES["wavelet"]:
        tiles = {"_forward": (64, 32, 2, 2), "_backward_edges": (16, 16, 1, 1)}
        if form.family == FAMILIES["wavelet"]:
            # Of rational functions, a few queries alone take longer than a tile that they leave empty.
            tiles["_forward_rest"] = (16, 64, 1, 2)
            if form.wavelet in (WAVELETS["meyer"], WAVELETS["shannon"]):
                tiles["_forward"] = (64, 32, 4, 2)
    else:
        tiles = {
            "_forward": (64, 16, 4, 3),
            "_forward_rest": (16, 16, 1, 3),
            "_backward_queries": (64, 32, 4, 3),
            "_backward_queries_rest": (16, 16, 1, 3),
            "_backward_keys": (32, 64, 4, 3),
            "_backward_keys_rest": (16, 16, 1, 2),
        }
        if form.family == FAMILIES["spline"]:
            tiles |= {"_backward_queries": (64, 16, 4, 3), "_backward_keys": (16, 64, 4, 3)}
        elif form.features <= 2:
            tiles |= {"_forward": (64, 32, 4, 4), "_backward_queries": (64, 32, 4, 4), "_backward_keys": (16, 64, 4, 4)}
            programs["_backward_keys"] = 396
    names = ("BM", "BN", "num_warps", "num_stages")
    options: dict[str, dict[str, int]] = {name: dict(zip(names, tile)) for name, tile in tiles.items()}
    return options | {
        "_backward_hidden": {"BLOCK": _PADDING, "num_stages": 3},
        "_backward_values": {"BLOCK": 32, "num_warps": 2, "num_stages": 3},
        "_add_parts": {"BLOCK": 2048},
        "_reduce": {"BLOCK": 16, "ROWS": 128, "num_warps": 2},
    }, programs


@cache
class _Plan:
    """How to compile the kernels for one kind of attention: `options` are their compile-time arguments by name."""

    def __init__(
        self,
        form: Form,
        rank: int,
        head_size: int,
        dtype: torch.dtype,
        masked: bool,
        save: bool,
        tokens: int,
        device: torch.device,
    ):
        full = dtype == torch.float32
        self.features = form.features + (form.base != 0)
        # Numbers per edge of the families that are not linear in them.
        self.edges = 3 if form.family == FAMILIES["wavelet"] else form.numerator + form.denominator
        self.rank = rank
        self.rank_padded = max(16, triton.next_power_of_2(rank))
        self.head_size_padded = max(16, triton.next_power_of_2(head_size))
        constants = {
            "NP": _padded(tokens),
            "FAMILY": form.family,
            "K": form.features,
            "M": self.features,
            "ORDER": form.order,
            "LOW": form.low,
            "SLOPE": form.slope,
            "WAVELET": form.wavelet,
            "NUMERATOR": form.numerator,
            "DENOMINATOR": form.denominator,
            "EDGES": self.edges,
            "BASE": form.base,
            "FAST": not full and not INTERPRET,
            "PRECISION": "ieee" if full else "tf32",
            "HAS_KEEP": masked,
            "SAVE": save,
            "R": rank,
            "RP": self.rank_padded,
            "D": head_size,
            "DP": self.head_size_padded,
        }
        self.tiles, self.programs = _tiles(form)
        if self.edges and self.rank_padded == 16:
            # Of so many registers, twelve warps share a multiprocessor; larger ranks need more.
            self.tiles["_backward_edges"]["maxnreg"] = 168
        self._fit(dtype.itemsize, _loadable(device))
        own = self.tiles | {"_prepare": {"BLOCK": _PADDING}}
        self.options = {}
        for name, options in own.items():
            names = _KERNELS[name.removesuffix("_rest")].arg_names
            own_constants = {key: value for key, value in constants.items() if key in names}
            # Said, because Triton 3.9 warns of its default, and 3.10 will have another.
            self.options[name] = own_constants | options | {"enable_fp_fusion": True}

    def launches(self, name: str, side: str, tokens: int, whole: bool) -> list[tuple[str, int, int]]:
        """
        Share out `tokens` among tiles: (name of the options, first token, tiles) of each launch. Unless
        `whole`, a rest that would leave most of a tile empty has a launch of its own, in small tiles.
        """
        tile = self.tiles[name][side]
        small = self.tiles.get(f"{name}_rest", {side: tile})[side]
        full, rest = divmod(tokens, tile)
        if whole or rest == 0 or _cdiv(rest, small) * small > tile // 2:
            return [(name, 0, _cdiv(tokens, tile))]
        launches = [(name, 0, full), (f"{name}_rest", full * tile, _cdiv(rest, small))]
        return launches if full else launches[1:]

    def _moved(self, name: str, tile: dict) -> int:
        """Numbers that a round of a kernel's loop loads."""
        features, columns = self.features * self.rank_padded, self.head_size_padded
        if "keys" in name:
            return tile["BM"] * (self.rank_padded + columns) + (0 if tile["KEPT"] else tile["BN"] * features)
        if name == "_backward_hidden":
            return tile["BLOCK"] * (self.rank_padded + columns)
        if name == "_backward_values":
            return (tile["BLOCK"] + self.rank_padded) * columns
        return tile["BN"] * (features + columns)

    def _fit(self, itemsize: int, room: int) -> None:
        """Fewer stages, then smaller tiles of keys, where what is loaded would take more than `room` bytes."""
        for name, tile in self.tiles.items():
            if "num_stages" not in tile:
                continue
            if "keys" in name:
                tile["KEPT"] = tile["BN"] * self.features * self.rank_padded * itemsize <= room
            while tile["num_stages"] > 1 and tile["num_stages"] * self._moved(name, tile) * itemsize > room:
                tile["num_stages"] -= 1
            if not tile.get("KEPT", True):
                while max(tile["BM"], tile["BN"]) > 16 and self._moved(name, tile) * itemsize > room:
                    tile[max(("BN", "BM"), key=tile.__getitem__)] //= 2


_compiled: dict[tuple, dict[str, tuple]] = {}


class _Launcher:
    """
    Launches the kernels of one pass on the current device and stream, with the options of a plan. All that a kernel
    gets follows from the plan, the strides and alignment of `tensors`, the first of which is there, and `sizes`.

    Triton binds and hashes some forty arguments at each launch, which takes longer than the kernels of a small batch
    run. Here a compiled kernel is kept for each kind of arguments, and launched directly.
    """

    def __init__(self, plan: _Plan, tensors, *sizes):
        self.plan = plan
        if INTERPRET:
            return
        device = tensors[0].get_device()
        kind = (plan, device, sizes, *(x.stride() for x in tensors), *(x.data_ptr() % 16 == 0 for x in tensors))
        self.compiled = _compiled.setdefault(kind, {})
        self.stream = driver.active.get_current_stream(device)
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Of profilers. Triton prepares for them at each launch, whether there are any or not.
        self.watched = any(getattr(hook, "calls", hook) for hook in hooks)

    def __call__(self, kernel, programs: int, *arguments, name: str | None = None) -> None:
        """`name`: of the plan's options, where it is not the kernel's own."""
        name, grid = name or kernel.__name__, (programs, 1, 1)
        if INTERPRET:
            kernel[grid](*arguments, **self.plan.options[name])
            return
        if name not in self.compiled:
            options = self.plan.options[name]
            binary = kernel[grid](*arguments, **options)
            self.compiled[name] = binary, [options[constant] for constant in kernel.arg_names[len(arguments) :]]
            return
        binary, constants = self.compiled[name]
        # Addresses, for Triton asks the driver about each tensor.
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        if self.watched:
            binary[grid](*values, *constants)
        else:
            none = None, None, None  # Nothing for hooks, and no hooks.
            binary.run(*grid, self.stream, binary.function, binary.packed_metadata, *none, *values, *constants)


class _TracedLauncher:
    """Writes launches into the graph of torch.compile, so that inductor makes them part of the code that it emits."""

    def __init__(self, plan: _Plan, tensors, *sizes):
        self.plan = plan

    def __call__(self, kernel, programs: int, *arguments, name: str | None = None) -> None:
        options = self.plan.options[name or kernel.__name__]
        torch.library.wrap_triton(kernel)[(programs, 1, 1)](*arguments, **options)


class _NoLauncher:
    """Launches nothing, where only the shapes of the outputs are asked for."""

    def __init__(self, plan: _Plan, tensors, *sizes):
        pass

    def __call__(self, kernel, programs: int, *arguments, name: str | None = None) -> None:
        pass


# Programs that keep an H100 or H200 busy: two for each multiprocessor. A number of the machine itself would make the
# rounding depend on the machine.
_PROGRAMS = 264
# Blocks of tokens that are worth a program of their own.
_BLOCKS = 8


@cache
def _loadable(device: torch.device) -> int:
    """Bytes of shared memory for what a kernel loads again and again: a little less than half of all."""
    if device.type != "cuda":
        return 100 * 2**10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin * 100 // 227


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _chunk(images: int, programs_per_image: int, programs: int) -> int:
    """Images that each of at most so many programs sums over."""
    return max(1, min(images, _cdiv(images * programs_per_image, programs)))


def _shares(images: int, heads: int, tiles: int, programs: int) -> tuple[int, int, int]:
    """
    Images for each of about so many programs that take all keys and queries of their images; and, where images and
    heads would leave a GPU idle, in how many parts tiles of keys and of queries are shared out.
    """
    each = programs // (images * heads)
    if each < 4:
        return max(1, images * heads // programs), max(1, min(tiles, each)), 1
    # min(tiles, isqrt(each)), of whose value torch.compile would make a graph for each batch.
    key_parts = 1
    while key_parts < tiles and (key_parts + 1) ** 2 <= each:
        key_parts += 1
    return 1, key_parts, min(tiles, each // key_parts)


def _parts(programs: int, tokens: int) -> int:
    """In how many parts U and dU are summed, where tokens are many and images and heads would leave a GPU idle."""
    return min(_cdiv(tokens, _PADDING * _BLOCKS), _cdiv(_PROGRAMS, max(1, programs)))


def _new_square(q: torch.Tensor, plan: "_Plan", parts: int) -> torch.Tensor:
    """Make room for U or dU, (B, h, RP, DP), in one part or more."""
    shape = (*q.shape[:2], plan.rank_padded, plan.head_size_padded)
    return q.new_empty(shape) if parts == 1 else q.new_empty(*shape[:2], parts, *shape[2:], dtype=torch.float32)


def _sum_of_parts(square: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return square if square.ndim == 4 else square.sum(2).to(dtype)


# Tokens are padded to a multiple of the largest tile of keys, so that nothing masks what `_prepare` wrote.
_PADDING = 64


def _padded(tokens: int) -> int:
    return _cdiv(tokens, _PADDING) * _PADDING


def _sizes(q: torch.Tensor, parameters) -> tuple[int, ...]:
    """B, h, N, d and r. The kernels are compiled for all but B, which alone may be a symbol of torch.compile."""
    images, *sizes = q.shape
    return images, *map(int, (*sizes, parameters[5].shape[-1]))


def _on_its_device(run):
    """Triton launches on the current device: make that the one of the first tensor."""

    @wraps(run)
    def wrapper(tensor, *args):
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return run(tensor, *args)
        with torch.cuda.device_of(tensor):
            return run(tensor, *args)

    return wrapper


@_on_its_device
def _run_forward(q, k, v, parameters, keep, scaling: float, form: Form, save: bool, launcher=_Launcher):
    """
    Output (B, N, h, d), and what the backward pass wants: the packed parameters, H and U, empty where there is none, H
    also unless `save`.

    `parameters` are three of the basis (absent ones empty), scale_basis, scale_base, and the projector.
    """
    images, heads, tokens, head_size, rank = _sizes(q, parameters)
    padded = _padded(tokens)
    plan = _Plan(form, rank, head_size, q.dtype, keep is not None, save, tokens, q.device)
    rp = plan.rank_padded
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    packed = q.new_empty(heads, 2 * plan.features + 1, padded, rp)
    # What is written is never one tensor under two names: a compiler would keep one of the two.
    edges = q.new_empty((heads, plan.edges, rank, padded) if plan.edges else 0, dtype=torch.float32)
    visible = q if keep is None else keep
    launch = launcher(plan, (q, k, v, visible, *parameters), *q.shape)
    sizes = (images, heads, tokens)
    parts = _parts(images * heads, tokens)
    u = _new_square(q, plan, parts)
    programs = heads * (images * parts + (plan.features + 1 + plan.edges) * (padded // _PADDING))
    tensors = (*parameters, v, visible, packed, edges, u)
    launch(_prepare, programs, *tensors, *v.stride()[:3], *sizes, parts)
    u = _sum_of_parts(u, q.dtype)
    out = q.new_empty(images, tokens, heads, head_size)
    hidden = q.new_empty((images, heads, tokens, rp) if save else 0)
    tensors = (q, k, packed, edges, visible, u, out, hidden)
    numbers = (*q.stride()[:3], *k.stride()[:3], *sizes, scaling)
    for name, first, tiles in plan.launches("_forward", "BM", tokens, images * heads < _PROGRAMS):
        launch(_forward, heads * images * tiles, *tensors, *numbers, first, tiles, name=name)
    return out, packed, edges, hidden, u


@_on_its_device
def _run_backward(
    d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling: float, form: Form, launcher=_Launcher
):
    """Gradients of q, k and v, (B, N, h, d), and of the parameters; those of absent parameters are empty."""
    images, heads, tokens, head_size, rank = _sizes(q, parameters)
    plan = _Plan(form, rank, head_size, q.dtype, keep is not None, True, tokens, q.device)
    rp = plan.rank_padded
    q, k, v, d_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_out))
    visible = q if keep is None else keep
    launch = launcher(plan, (q, k, v, d_out, visible, *parameters), *q.shape)
    sizes = (images, heads, tokens)
    d_q, d_k, d_v = (q.new_empty(images, tokens, heads, head_size) for _ in range(3))
    d_hidden = q.new_empty(images, heads, rp, _padded(tokens)) if plan.edges else torch.empty_like(hidden)
    batch_stride, row_stride, head_stride, _ = d_out.stride()
    strides = (batch_stride, head_stride, row_stride)
    parts = _parts(images * heads, tokens)
    d_u = _new_square(q, plan, parts)
    tensors: tuple[Any, ...] = (d_out, hidden, u, d_hidden, d_u)
    launch(_backward_hidden, images * heads * parts, *tensors, *strides, *sizes, parts)
    d_u = _sum_of_parts(d_u, q.dtype)
    numbers = (*q.stride()[:3], *k.stride()[:3], *sizes, scaling)
    sums = heads * (plan.features + plan.edges)
    if plan.edges:
        tiles = _cdiv(tokens, plan.tiles["_backward_edges"]["BN"])
        size, key_parts, query_parts = _shares(images, heads, tiles, plan.programs["_backward_edges"])
        chunks, ends = [_cdiv(images, size) * query_parts], [tokens]
        grown_q = q.new_empty(key_parts, *d_q.shape, dtype=torch.float32)
        grown_k = d_k if query_parts == 1 else q.new_empty(query_parts, *d_k.shape, dtype=torch.float32)
        partial = q.new_empty(chunks[0] * sums * tokens * rp, dtype=torch.float32)
        tensors = (q, k, packed, edges, visible, d_hidden, grown_q, grown_k, partial)
        ranges: tuple[int, ...] = (size, key_parts, query_parts)
        launch(_backward_edges, heads * chunks[0] * key_parts, *tensors, *numbers, *ranges)
        programs = _cdiv(d_q.numel(), plan.options["_add_parts"]["BLOCK"])
        launch(_add_parts, programs, grown_q, d_q, key_parts, d_q.numel())
        if query_parts > 1:
            launch(_add_parts, programs, grown_k, d_k, query_parts, d_k.numel())
    else:
        few = images * heads < _PROGRAMS
        tensors = (q, k, packed, visible, d_hidden, d_q)
        for name, first, tiles in plan.launches("_backward_queries", "BM", tokens, few):
            launch(_backward_queries, heads * images * tiles, *tensors, *numbers, first, tiles, name=name)
        launches = plan.launches("_backward_keys", "BN", tokens, few)
        ends = [*(first for _, first, _ in launches[1:]), tokens]
        sizes_of_chunks = [_chunk(images, heads * tiles, plan.programs[name]) for name, _, tiles in launches]
        chunks = [_cdiv(images, size) for size in sizes_of_chunks]
        rows = [n * sums * (end - first) for n, (_, first, _), end in zip(chunks, launches, ends)]
        # Where in `partial` each launch begins. Not views of it: what is written through a view, a compiler copies.
        *areas, all_rows = accumulate(rows, initial=0)
        partial = q.new_empty(all_rows * rp, dtype=torch.float32)
        tensors = (q, k, packed, visible, d_hidden, d_k, partial)
        for (name, first, tiles), n, size, end, area in zip(launches, chunks, sizes_of_chunks, ends, areas):
            ranges = (size, first, tiles, end, area)
            launch(_backward_keys, heads * n * tiles, *tensors, *numbers, *ranges, name=name)
    tiles = _cdiv(tokens, plan.options["_backward_values"]["BLOCK"])
    size = _chunk(images, heads * tiles, plan.programs["_backward_values"])
    w_chunks = _cdiv(images, size)
    w_partial = q.new_empty(w_chunks, heads, tokens, rp, dtype=torch.float32)
    tensors = (v, packed, visible, d_u, d_v, w_partial)
    launch(_backward_values, heads * w_chunks * tiles, *tensors, *v.stride()[:3], *sizes, size)
    # Parameters that a family lacks are empty, and their own gradient.
    gradients = [torch.empty_like(x) if x.numel() else x for x in parameters]
    programs = heads * _cdiv(tokens * rp, plan.options["_reduce"]["BLOCK"])
    numbers = (chunks[0], chunks[1] if len(chunks) > 1 else 0, w_chunks, ends[0], heads, tokens)
    launch(_reduce, programs, partial, w_partial, *parameters[:4], *gradients, *numbers)
    return d_q, d_k, d_v, *gradients


@cache
def _form(family: str, base_fn: str, *options) -> Form:
    base = BASE_FUNCTIONS[base_fn]
    if family == "fourier":
        (grid_size,) = options
        return Form(FAMILIES[family], features=2 * grid_size, base=base)
    if family == "spline":
        grid_size, order, low, high = options
        slope = grid_size / (high - low)
        return Form(FAMILIES[family], features=grid_size + order, order=order, low=low, slope=slope, base=base)
    if family == "wavelet":
        (wavelet,) = options
        return Form(FAMILIES[family], wavelet=WAVELETS[wavelet], base=base)
    numerator, denominator = options
    return Form(FAMILIES[family], numerator=numerator + 1, denominator=denominator, base=base)


def form_of(step) -> Form:
    """Make the form of a step of the operator (`EdgeFunctions`)."""
    # torch.compile warns about caches.
    make = _form.__wrapped__ if torch.compiler.is_compiling() else _form
    if step.family == "fourier":
        return make("fourier", step.base_fn, step.grid_size)
    if step.family == "spline":
        return make("spline", step.base_fn, step.grid_size, step.order, step.low, step.high)
    if step.family == "wavelet":
        return make("wavelet", step.base_fn, step.wavelet_type)
    return make("rational", step.base_fn, *step.rational_order)


class _FusedAttention(torch.autograd.Function):
    """The kernels with their derivative, for eager PyTorch: cheaper to call than the custom operators."""

    @staticmethod
    def forward(ctx, form, scaling, keep, q, k, v, *parameters):
        save = any(ctx.needs_input_grad)
        out, packed, edges, hidden, u = _run_forward(q, k, v, parameters, keep, scaling, form, save)
        if save:
            ctx.save_for_backward(q, k, v, keep, packed, edges, hidden, u, *parameters)
        ctx.form, ctx.scaling = form, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, keep, packed, edges, hidden, u, *parameters = ctx.saved_tensors
        gradients = _run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, ctx.scaling, ctx.form)
        gradients = (*(x.transpose(1, 2) for x in gradients[:3]), *gradients[3:])
        return None, None, None, *(x if need else None for x, need in zip(gradients, ctx.needs_input_grad[3:]))


def _register_operators():
    """
    The kernels as operators, for torch.compile and what records through it. Inductor looks into them and launches the
    kernels itself; Triton's interpreter, which has nothing that could be traced, runs them whole.

    They are named after the text of the three files, for which they are registered once in a process: they may be
    loaded a second time, or in another version, as remote code; and PyTorch keeps what it compiled by the names of
    operators.
    """
    sources = (Path(__file__).with_name(f"fused{part}.py").read_bytes() for part in ("", "_kernels", "_functions"))
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    name = f"attention_{version}"
    if hasattr(torch.ops.karat_vit, name):
        return getattr(torch.ops.karat_vit, name)
    if INTERPRET:
        operator, launcher = torch.library.custom_op, _Launcher
    else:
        operator, launcher = torch.library.triton_op, _TracedLauncher

    def run_forward(q, k, v, parameters, keep, scaling, form, save, launcher):
        return _run_forward(q, k, v, parameters, keep, float(scaling), Form.from_list(form), save, launcher)

    @operator(f"karat_vit::{name}", mutates_args=())
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parameters: list[torch.Tensor],
        keep: torch.Tensor | None,
        scaling: float,
        form: list[float],
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return run_forward(q, k, v, parameters, keep, scaling, form, save, launcher)

    @attention.register_fake
    def _(*args):
        return run_forward(*args, _NoLauncher)

    def run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form, launcher):
        saved = packed, edges, hidden, u
        form = Form.from_list(form)
        gradients = _run_backward(d_out, q, k, v, parameters, keep, *saved, float(scaling), form, launcher)
        # An operator returns none of its arguments.
        return [x if x.numel() else torch.empty_like(x) for x in gradients]

    @operator(f"karat_vit::attention_backward_{version}", mutates_args=())
    def attention_backward(
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parameters: list[torch.Tensor],
        keep: torch.Tensor | None,
        packed: torch.Tensor,
        edges: torch.Tensor,
        hidden: torch.Tensor,
        u: torch.Tensor,
        scaling: float,
        form: list[float],
    ) -> list[torch.Tensor]:
        return run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form, launcher)

    @attention_backward.register_fake
    def _(*args):
        return run_backward(*args, _NoLauncher)

    def setup_context(ctx, inputs, output):
        q, k, v, parameters, keep, scaling, form, _ = inputs
        _, packed, edges, hidden, u = output
        ctx.save_for_backward(q, k, v, keep, packed, edges, hidden, u, *parameters)
        ctx.scaling, ctx.form = scaling, form

    def backward(ctx, d_out, *_):
        q, k, v, keep, packed, edges, hidden, u, *parameters = ctx.saved_tensors
        gradients = attention_backward(
            d_out, q, k, v, parameters, keep, packed, edges, hidden, u, ctx.scaling, ctx.form
        )
        d_q, d_k, d_v = (x.transpose(1, 2) for x in gradients[:3])
        return d_q, d_k, d_v, gradients[3:], None, None, None, None

    attention.register_autograd(backward, setup_context=setup_context)
    return getattr(torch.ops.karat_vit, name)


_attention = _register_operators()


def fused_karat_attention(operator, query, key, value, scaling, keep=None, grids=None):
    """
    Attend as `eager_karat_attention` of phi1_w2, by the fused kernels: memory linear in N, no N x N tensor in device
    memory, forward or backward.

    Args:
        operator: a `KArAtOperator`.
        query, key, value: (B, h, N, d), the query in fp32, fp16 or bf16; any strides.
        scaling: factor of the scores.
        keep: boolean (B or 1, N), or `None`.
        grids: patch grids (own, wanted) to resample the parameters between, or `None`.

    Returns:
        Output (B, h, N, d), laid out as (B, N, h, d), in the dtype of `query`.
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
        with no_autocast(query.device.type):
            tensors = operator.tensors(torch.float32, grids)
        own, projector = operator.of_step(tensors, 0), tensors["projector"]
    absent = (own["scale_basis"].new_empty(0),) * (3 - len(step.parameter_names))
    # A family may lack one of its parameters: a rational function of constant denominator.
    basis = [absent[0] if (tensor := own.get(name)) is None else tensor for name in step.parameter_names]
    # Three of the basis, the scales, (h, r, N) each with what a family needs between h and r, and W, (h, N, r).
    parameters = [*basis, *absent, own["scale_basis"], own["scale_base"], projector]
    parameters = [parameter.contiguous() for parameter in parameters]
    keep = keep if keep is None else keep.expand(query.shape[0], -1).contiguous()
    form, inputs = form_of(step), (query, key, value)
    if torch.compiler.is_compiling():
        out = _attention(*inputs, parameters, keep, scaling, form.to_list(), torch.is_grad_enabled())[0]
    elif not torch.is_grad_enabled():
        # An autograd function cannot tell, and would save H.
        out = _run_forward(*inputs, parameters, keep, scaling, form, False)[0]
    else:
        out = _FusedAttention.apply(form, scaling, keep, *inputs, *parameters)
    return out.transpose(1, 2)
