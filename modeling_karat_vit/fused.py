# SPDX-License-Identifier: Apache-2.0
"""
Launching the fused kernels (`fused_kernels.py`): plan, launchers, autograd, and operators for torch.compile.

Importing this file needs Triton; `karat_operator.py` goes without it.
"""

import ctypes
import hashlib
import os
from functools import cache, reduce, wraps
from itertools import accumulate
from operator import itemgetter, or_
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, get_type_hints

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


class Form(NamedTuple):
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
        return list(map(float, self))

    @classmethod
    def from_list(cls, values: list[float]) -> "Form":
        return cls(*(kind(value) for kind, value in zip(get_type_hints(cls).values(), values)))


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


def _launch(plan: _Plan, kernel, programs: int, *arguments, name: str | None = None) -> None:
    """Launch a kernel with the options of a plan; `name`: of the options, where it is not the kernel's own."""
    kernel[(programs, 1, 1)](*arguments, **plan.options[name or kernel.__name__])


def _launch_traced(plan: _Plan, kernel, programs: int, *arguments, name: str | None = None) -> None:
    """Write a launch into the graph of torch.compile, so that inductor makes it part of the code that it emits."""
    options = plan.options[name or kernel.__name__]
    torch.library.wrap_triton(kernel)[(programs, 1, 1)](*arguments, **options)


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


def _with_rows(*tensors) -> list[torch.Tensor]:
    """The tensors, each copied unless the numbers of a row lie side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _in_parts(total: torch.Tensor, parts: int) -> torch.Tensor:
    """Make room for the parts that `_add` sums into `total`, one behind the other; one part is `total` itself."""
    return total if parts == 1 else total.new_empty(parts, *total.shape, dtype=torch.float32)


def _add(launch, plan: "_Plan", parts: torch.Tensor, total: torch.Tensor) -> None:
    if parts is not total:
        size = total.numel()
        launch(plan, _add_parts, _cdiv(size, plan.options["_add_parts"]["BLOCK"]), parts, total, parts.shape[0], size)


# Tokens are padded to a multiple of the largest tile of keys, so that nothing masks what `_prepare` wrote.
_PADDING = 64


def _padded(tokens: int) -> int:
    return _cdiv(tokens, _PADDING) * _PADDING


def _sizes(q: torch.Tensor, parameters) -> tuple[int, ...]:
    """B, h, N, d and r. The kernels are compiled for all but B, which alone may be a symbol of torch.compile."""
    images, *sizes = q.shape
    return images, *map(int, (*sizes, parameters[3].shape[1]))


def _on_its_device(run):
    """Triton launches on the current device: make that the one of the first tensor."""

    @wraps(run)
    def wrapper(tensor, *args):
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return run(tensor, *args)
        with torch.cuda.device_of(tensor):
            return run(tensor, *args)

    return wrapper


def _run_forward(q, k, v, parameters, keep, scaling: float, form: Form, save: bool, launch):
    """
    Output (B, N, h, d), and what the backward pass wants: the packed parameters, H and U, empty where there is none, H
    also unless `save`.

    `parameters` are three of the basis (absent ones empty), scale_basis, scale_base, and the projector.
    """
    images, heads, tokens, head_size, rank = _sizes(q, parameters)
    padded = _padded(tokens)
    plan = _Plan(form, rank, head_size, q.dtype, keep is not None, save, tokens, q.device)
    rp = plan.rank_padded
    packed = q.new_empty(heads, 2 * plan.features + 1, padded, rp)
    # What is written is never one tensor under two names: a compiler would keep one of the two.
    edges = q.new_empty((heads, plan.edges, rank, padded) if plan.edges else 0, dtype=torch.float32)
    visible = q if keep is None else keep
    sizes = (images, heads, tokens)
    parts = _parts(images * heads, tokens)
    u = q.new_empty(images, heads, rp, plan.head_size_padded)
    u_parts = _in_parts(u, parts)
    programs = heads * (images * parts + (plan.features + 1 + plan.edges) * (padded // _PADDING))
    tensors = (*parameters, v, visible, packed, edges, u_parts)
    launch(plan, _prepare, programs, *tensors, *v.stride()[:3], *sizes, parts)
    _add(launch, plan, u_parts, u)
    out = q.new_empty(images, tokens, heads, head_size)
    hidden = q.new_empty((images, heads, tokens, rp) if save else 0)
    tensors = (q, k, packed, edges, visible, u, out, hidden)
    numbers = (*q.stride()[:3], *k.stride()[:3], *sizes, scaling)
    for name, first, tiles in plan.launches("_forward", "BM", tokens, images * heads < _PROGRAMS):
        launch(plan, _forward, heads * images * tiles, *tensors, *numbers, first, tiles, name=name)
    return out, packed, edges, hidden, u


def _run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling: float, form: Form, launch):
    """
    Gradients of q, k and v, (B, N, h, d), and of the parameters; those of absent parameters are empty. Of the
    `parameters` it wants the first four.
    """
    images, heads, tokens, head_size, rank = _sizes(q, parameters)
    plan = _Plan(form, rank, head_size, q.dtype, keep is not None, True, tokens, q.device)
    rp = plan.rank_padded
    visible = q if keep is None else keep
    sizes = (images, heads, tokens)
    d_q, d_k, d_v = (q.new_empty(images, tokens, heads, head_size) for _ in range(3))
    d_hidden = q.new_empty(images, heads, rp, _padded(tokens)) if plan.edges else torch.empty_like(hidden)
    batch_stride, row_stride, head_stride, _ = d_out.stride()
    strides = (batch_stride, head_stride, row_stride)
    parts = _parts(images * heads, tokens)
    d_u = torch.empty_like(u)
    d_u_parts = _in_parts(d_u, parts)
    tensors: tuple[Any, ...] = (d_out, hidden, u, d_hidden, d_u_parts)
    launch(plan, _backward_hidden, images * heads * parts, *tensors, *strides, *sizes, parts)
    _add(launch, plan, d_u_parts, d_u)
    numbers = (*q.stride()[:3], *k.stride()[:3], *sizes, scaling)
    sums = heads * (plan.features + plan.edges)
    if plan.edges:
        tiles = _cdiv(tokens, plan.tiles["_backward_edges"]["BN"])
        size, key_parts, query_parts = _shares(images, heads, tiles, plan.programs["_backward_edges"])
        chunks, ends = [_cdiv(images, size) * query_parts], [tokens]
        # Of one part, too, dq is one of its own: it grows in fp32.
        grown_q = q.new_empty(key_parts, *d_q.shape, dtype=torch.float32)
        grown_k = _in_parts(d_k, query_parts)
        partial = q.new_empty(chunks[0] * sums * tokens * rp, dtype=torch.float32)
        tensors = (q, k, packed, edges, visible, d_hidden, grown_q, grown_k, partial)
        ranges: tuple[int, ...] = (size, key_parts, query_parts)
        launch(plan, _backward_edges, heads * chunks[0] * key_parts, *tensors, *numbers, *ranges)
        _add(launch, plan, grown_q, d_q)
        _add(launch, plan, grown_k, d_k)
    else:
        few = images * heads < _PROGRAMS
        tensors = (q, k, packed, visible, d_hidden, d_q)
        for name, first, tiles in plan.launches("_backward_queries", "BM", tokens, few):
            launch(plan, _backward_queries, heads * images * tiles, *tensors, *numbers, first, tiles, name=name)
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
            launch(plan, _backward_keys, heads * n * tiles, *tensors, *numbers, *ranges, name=name)
    tiles = _cdiv(tokens, plan.options["_backward_values"]["BLOCK"])
    size = _chunk(images, heads * tiles, plan.programs["_backward_values"])
    w_chunks = _cdiv(images, size)
    w_partial = q.new_empty(w_chunks, heads, tokens, rp, dtype=torch.float32)
    tensors = (v, packed, visible, d_u, d_v, w_partial)
    launch(plan, _backward_values, heads * w_chunks * tiles, *tensors, *v.stride()[:3], *sizes, size)
    basis_and_scale = parameters[:4]
    scale = parameters[3]
    # Parameters that a family lacks are empty, and their own gradient.
    gradients = [torch.empty_like(x) if x.numel() else x for x in basis_and_scale]
    gradients += [torch.empty_like(scale), scale.new_empty(heads, tokens, rank)]
    programs = heads * _cdiv(tokens * rp, plan.options["_reduce"]["BLOCK"])
    numbers = (chunks[0], chunks[1] if len(chunks) > 1 else 0, w_chunks, ends[0], heads, tokens)
    launch(plan, _reduce, programs, partial, w_partial, *basis_and_scale, *gradients, *numbers)
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


class _Pass:
    """
    One pass over inputs of one kind: its launches, with all that follows from shapes, strides and options worked out
    once. A call hands out addresses: of inputs, of outputs, and in the `room`, one tensor for all that the pass itself
    allocates.

    Triton binds and hashes some forty arguments at each launch, and asks the driver about each tensor, which takes
    longer than the kernels of a small batch run. So it launches the first time alone, and for profilers; after that the
    driver is called itself, with arguments that lie where they are.

    Args:
        run: called with a function that launches, and the inputs; gives its outputs, and what to keep in the room.
        inputs: tensors, or `None`; the first one is there.
        before: a pass whose room is the last input: `run` gets what it kept instead.
    """

    def __init__(self, run, *inputs, before: "_Pass | None" = None):
        # Each of its own, for one tensor may be given twice.
        views: list[Any] = [x if x is None else x.detach() for x in inputs]
        # Where each tensor lies: in which input, room or output, from which byte on, and, in a room, as what.
        places: dict[int, tuple[int, int, Any]] = {
            id(x): (index, 0, None) for index, x in enumerate(views) if x is not None
        }
        if before is not None:
            room, last = views.pop(), len(views)
            for begin, shape, dtype in before.kept:
                x = room[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                places[id(x)] = last, begin, dtype
                views.append(x)
        launched = []

        def take_down(plan, kernel, programs, *arguments, name=None):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            rest, options = arguments[len(tensors) :], plan.options[name or kernel.__name__]
            launched.append((kernel, programs, tensors, rest, options))

        outputs, kept = run(take_down, *views)
        self.outputs = [None if x is None else (x.shape, x.stride(), x.dtype) for x in outputs]
        of_outputs = {x.data_ptr(): len(inputs) + 1 + index for index, x in enumerate(outputs) if x is not None}
        self.size = 0
        for _, _, tensors, *_ in launched:
            for x in tensors:
                if id(x) in places:
                    continue
                if x.data_ptr() in of_outputs:
                    places[id(x)] = of_outputs[x.data_ptr()], 0, None
                else:
                    places[id(x)] = len(inputs), self.size, x.dtype
                    self.size += _cdiv(x.nbytes, _ALIGNMENT) * _ALIGNMENT
        self.kept: list[tuple[int, torch.Size, torch.dtype]] = [(places[id(x)][1], x.shape, x.dtype) for x in kept]
        self.places = list(places.values())
        numbers = {name: index for index, name in enumerate(places)}
        self.launches = [
            (kernel, programs, itemgetter(*(numbers[id(x)] for x in tensors)), rest, options)
            for kernel, programs, tensors, rest, options in launched
        ]
        self.pointers = (ctypes.c_uint64 * len(places))()
        self.lock = Lock()  # Of the pointers, and until the driver has read them.
        self.launch: Any = None  # the driver's
        self.compiled: list[tuple] = []
        # Backward passes after this one, by the strides of what they meet.
        self.backward: dict[tuple, _Pass] = {}

    def __call__(self, *inputs) -> tuple[list, torch.Tensor]:
        """Outputs, each a new tensor or `None`, and the room."""
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        if reduce(or_, addresses) % 16:
            # The kernels are compiled for what is aligned.
            return self(*map(_aligned, inputs))
        first = inputs[0]
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                return self(*inputs)
        room = first.new_empty(self.size, dtype=torch.uint8)
        outputs = [x if x is None else first.new_empty_strided(x[0], x[1], dtype=x[2]) for x in self.outputs]
        if not self.compiled or _is_watched():
            self._launch_by_triton([*inputs, room, *outputs])
            return outputs, room
        addresses += [room.data_ptr(), *(0 if x is None else x.data_ptr() for x in outputs)]
        pointers = [addresses[index] + offset for index, offset, _ in self.places]
        stream = ctypes.c_void_p(driver.active.get_current_stream(first.get_device()))
        with self.lock:
            self.pointers[:] = pointers
            failed = any(self.launch(*head, stream, arguments, None) for head, arguments, _ in self.compiled)
        if failed:
            # It says why, or makes what is missing, such as the context of a new thread.
            self._launch_by_triton([*inputs, room, *outputs])
        return outputs, room

    def _launch_by_triton(self, tensors: list) -> None:
        views = [tensors[i] if kind is None else tensors[i][offset:].view(kind) for i, offset, kind in self.places]
        launched = []
        for kernel, programs, pick, rest, options in self.launches:
            binary = kernel[(programs, 1, 1)](*pick(views), *rest, **options)
            launched.append((binary, kernel.arg_names, programs, pick, rest))
        if not INTERPRET and not self.compiled and all(_is_plain(binary.metadata) for binary, *_ in launched):
            self.launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
            self.compiled = [self._compile(*launch) for launch in launched]

    def _compile(self, binary, names, programs: int, pick, rest) -> tuple:
        """What the driver wants to launch a kernel: function, grid, threads and shared memory; and the arguments."""
        begin, step = ctypes.addressof(self.pointers), ctypes.sizeof(ctypes.c_uint64)
        places = pick(range(begin, begin + step * len(self.pointers), step))
        arguments = list(places)
        numbers: list[Any] = []
        for name, value in zip(names[len(places) :], rest):
            # Triton makes a constant of a number that is 1.
            if (kind := binary.src.signature[name]) != "constexpr":
                numbers.append(_C_TYPES[kind](value))
                arguments.append(ctypes.addressof(numbers[-1]))
        # Two addresses of scratch memory end the arguments; these kernels want none.
        numbers.append(ctypes.c_uint64(0))
        arguments += [ctypes.addressof(numbers[-1])] * 2
        head = ctypes.c_void_p(binary.function), programs, 1, 1, 32 * binary.metadata.num_warps, 1, 1
        # The binary and the numbers only have to stay.
        return (*head, binary.metadata.shared), (ctypes.c_void_p * len(arguments))(*arguments), (binary, numbers)


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """What begins at a multiple of 16 bytes; all else is copied, strides of 0 and gaps included."""
    if x is None or x.data_ptr() % 16 == 0:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride(), 0)


_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "f32": ctypes.c_float}


def _is_plain(metadata) -> bool:
    """Whether a kernel is launched with nothing but its arguments."""
    extras = "global_scratch_size profile_scratch_size launch_cooperative_grid launch_pdl instrumentation_mode".split()
    return metadata.num_ctas == 1 and not any(getattr(metadata, name, 0) for name in extras)


def _is_watched() -> bool:
    """Whether a profiler has hooks in Triton's launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


# Bytes, of what is in a room.
_ALIGNMENT = 256
_passes: dict[tuple, _Pass] = {}


def _pass_over(form: Form, scaling: float, save: bool, q, k, v, keep, *parameters) -> _Pass:
    """The forward pass for inputs of this kind; with `save` its room is what the backward pass wants."""
    strides = q.stride(), k.stride(), v.stride()
    kind = form, scaling, save, keep is None, q.dtype, q.get_device(), q.shape, parameters[5].shape, *strides
    found = _passes.get(kind)
    if found is not None:
        return found

    def run(launch, q, k, v, keep, *parameters):
        out, *kept = _run_forward(q, k, v, _present(parameters), keep, scaling, form, save, launch)
        return [out.transpose(1, 2)], kept

    _passes[kind] = found = _Pass(run, q, k, v, keep, *parameters)
    return found


def _pass_back(form: Form, scaling: float, forward: _Pass, d_out, q, k, v, *saved) -> _Pass:
    """The backward pass after a forward pass, for a gradient and what was saved, of these strides."""
    strides = d_out.stride(), q.stride(), k.stride(), v.stride()
    found = forward.backward.get(strides)
    if found is not None:
        return found

    def run(launch, d_out, q, k, v, keep, *rest):
        parameters, kept = _present(rest[:4]), rest[4:]
        gradients = _run_backward(d_out, q, k, v, parameters, keep, *kept, scaling, form, launch)
        of_inputs = [x.transpose(1, 2) for x in gradients[:3]]
        return [*of_inputs, None, *(x if x.numel() else None for x in gradients[3:])], ()

    forward.backward[strides] = found = _Pass(run, d_out.transpose(1, 2), q, k, v, *saved, before=forward)
    return found


def _present(parameters) -> list[torch.Tensor]:
    """The parameters, where absent ones are empty."""
    absent = parameters[3].new_empty(0)
    return [absent if x is None else x for x in parameters]


class _FusedAttention(torch.autograd.Function):
    """The kernels with their derivative, for eager PyTorch: cheaper to call than the custom operators."""

    @staticmethod
    def forward(ctx, form, scaling, q, k, v, keep, *parameters):
        forward = _pass_over(form, scaling, True, q, k, v, keep, *parameters)
        (out,), room = forward(q, k, v, keep, *parameters)
        ctx.save_for_backward(q, k, v, keep, *parameters[:4], room)
        ctx.options = form, scaling, forward
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        # Hooks of what is saved may bring it back with other strides.
        q, k, v, *rest = ctx.saved_tensors
        inputs = *_with_rows(d_out, q, k, v), *rest
        gradients, _ = _pass_back(*ctx.options, *inputs)(*inputs)
        return None, None, *gradients


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

    def launch_nothing(*args, **kwargs):
        """Only the shapes of the outputs are asked for."""

    if INTERPRET:
        operator, launch = torch.library.custom_op, _launch
    else:
        operator, launch = torch.library.triton_op, _launch_traced

    @_on_its_device
    def run_forward(q, k, v, parameters, keep, scaling, form, save, launch):
        inputs = *_with_rows(q, k, v), parameters, keep
        return _run_forward(*inputs, float(scaling), Form.from_list(form), save, launch)

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
        return run_forward(q, k, v, parameters, keep, scaling, form, save, launch)

    @attention.register_fake
    def _(*args):
        return run_forward(*args, launch_nothing)

    @_on_its_device
    def run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form, launch):
        inputs = *_with_rows(d_out, q, k, v), parameters, keep, packed, edges, hidden, u
        gradients = _run_backward(*inputs, float(scaling), Form.from_list(form), launch)
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
        return run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form, launch)

    @attention_backward.register_fake
    def _(*args):
        return run_backward(*args, launch_nothing)

    def setup_context(ctx, inputs, output):
        q, k, v, parameters, keep, scaling, form, _ = inputs
        _, packed, edges, hidden, u = output
        ctx.save_for_backward(q, k, v, keep, packed, edges, hidden, u, *parameters[:4])
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
    key, value = [x if x.dtype == query.dtype else x.to(query.dtype) for x in (key, value)]
    if grids is None:
        own, projector = step(torch.float32), operator.projector
        projector = projector if projector.dtype == torch.float32 else projector.to(torch.float32)
    else:
        with no_autocast(query.device.type):
            tensors = operator.tensors(torch.float32, grids)
        own, projector = operator.of_step(tensors, 0), tensors["projector"]
    # A family may lack some of three parameters: a rational function of constant denominator has one.
    basis = [own.get(name) for name in step.parameter_names]
    # Three of the basis, the scales, (h, r, N) each with what a family needs between h and r, and W, (h, N, r).
    parameters = [*basis, *(None,) * (3 - len(basis)), own["scale_basis"], own["scale_base"], projector]
    parameters = [x if x is None else x.contiguous() for x in parameters]
    keep = keep if keep is None else keep.expand(query.shape[0], -1).contiguous()
    form, inputs = form_of(step), (query, key, value)
    if torch.compiler.is_compiling():
        options = scaling, form.to_list(), torch.is_grad_enabled()
        return _attention(*inputs, _present(parameters), keep, *options)[0].transpose(1, 2)
    inputs = (*_with_rows(*inputs), keep, *parameters)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _FusedAttention.apply(form, scaling, *inputs)
    (out,), _ = _pass_over(form, scaling, False, *inputs)(*inputs)
    return out
