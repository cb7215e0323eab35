# SPDX-License-Identifier: Apache-2.0
"""
Fused Triton kernels of phi1_w2 attention, for every basis; `fused.py` launches them.

    x = scaling * q k^T,    H = Phi(x),    U = W^T v,    out = H U

Families that are linear in their coefficients have M features F_m (Fourier: cos x, sin x, cos 2x, ...; B-spline: B_0,
B_1, ...), and so has the base function; then H = sum_m F_m(x) C_m^T, on the matrix units. Wavelets and rational
functions are evaluated per score and output. Scores and features live in registers: device memory sees (B, h, N, r) at
most. The backward pass of the former recomputes the scores twice: once per query tile for dq, once per key tile for dk
and the parameters, whose gradients are summed over a chunk of images in registers, written as one partial sum per
chunk, and reduced. That of the latter, where every function of every score counts, evaluates them once: dq grows from
one tile of keys to the next in device memory. No atomics: two runs give equal bits.

Shapes: B images, h heads, N tokens, d head size, r rank; RP is r and DP is d, padded to a power of two of at least 16.
With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # Transformers demands of remote code what it imports outside of a `try`.
    raise

from .fused_functions import (
    _add_edges,
    _add_row_sums,
    _base,
    _edge,
    _feature,
    _tile,
    _total,
    _unit,
    _visible,
    _window,
)


# Numbers that change from batch to batch are no reason to compile anew, as Triton would for 1 and for multiples of 16.
_COUNTS = "B H N PARTS CHUNK FIRST TILES END AREA CHUNKS REST_CHUNKS W_CHUNKS REST KEY_PARTS QUERY_PARTS SIZE"
_kernel = triton.jit(do_not_specialize=tuple(_COUNTS.split()))


@triton.jit
def _pack(
    first_ptr, second_ptr, third_ptr, scale_ptr, base_ptr, w_ptr, packed_ptr, edges_ptr,
    head, m, block, N,
    NP: tl.constexpr, FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr, EDGES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Part m of the parameters of one head, for a block of tokens."""
    n = block * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RP)
    inside = (n[:, None] < N) & (r[None, :] < R)
    edge = r[None, :] * N + n[:, None]
    size = R * N
    value = tl.load(scale_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    if m > M:
        e = m - M - 1
        if FAMILY == 2:
            own = head * size + edge
            if e == 0:
                value *= tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
                value *= _window(n, N, WAVELET)[:, None]
            else:
                value = _unit(WAVELET) / tl.load(third_ptr + own, mask=inside, other=1.0).to(tl.float32)
                if e == 1:
                    value *= -tl.load(second_ptr + own, mask=inside, other=0.0).to(tl.float32)
        elif e < NUMERATOR:
            value *= tl.load(first_ptr + (head * NUMERATOR + e) * size + edge, mask=inside, other=0.0).to(tl.float32)
        else:
            own = (head * (EDGES - NUMERATOR) + e - NUMERATOR) * size + edge
            value = tl.load(second_ptr + own, mask=inside, other=0.0).to(tl.float32)
        at = ((head * EDGES + e) * R + r[None, :]) * NP + n[:, None]
        tl.store(edges_ptr + at, tl.where(inside, value, 0.0), mask=r[None, :] < R)
    else:
        if m == M:
            value = tl.load(w_ptr + head * size + n[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
        elif m == K:
            value = tl.load(base_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
        elif FAMILY == 1:
            value *= tl.load(first_ptr + (head * K + m) * size + edge, mask=inside, other=0.0).to(tl.float32)
        elif m % 2 == 0:
            own = (head * (K // 2) + m // 2) * size + edge
            value *= tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
        else:
            own = (head * (K // 2) + m // 2) * size + edge
            value *= tl.load(second_ptr + own, mask=inside, other=0.0).to(tl.float32)
        at = ((head * (2 * M + 1) + m) * NP + n[:, None]) * RP + r[None, :]
        dtype = packed_ptr.dtype.element_ty
        tl.store(packed_ptr + at, value.to(dtype))
        if m != M:
            if (FAMILY == 0) & (m < K):
                # d(a cos nx + b sin nx) = -n a sin nx + n b cos nx
                harmonic = (m // 2 + 1).to(tl.float32)
                value *= tl.where(m % 2 == 0, -harmonic, harmonic)
            tl.store(packed_ptr + (M + 1) * NP * RP + at, value.to(dtype))


@_kernel
def _prepare(
    first_ptr, second_ptr, third_ptr, scale_ptr, base_ptr, w_ptr, v_ptr, keep_ptr, packed_ptr, edges_ptr, u_ptr,
    v_b, v_h, v_n, B, H, N, PARTS,
    NP: tl.constexpr, FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    U = W^T v of one part of the keys, image and head, (PARTS, B, H, RP, DP), or, beyond the B x H x PARTS programs for
    that, the parameters as the other kernels read them, zero beyond N and R:

    * `packed` (h, 2M + 1, NP, RP), in the dtype of the scores: the M coefficients with their scales, W, and the M
      coefficients of the derivative;
    * `edges` (h, EDGES, R, NP), fp32: of wavelets scale * amplitude * window, -tau / s and 1 / s, both in units of
      `_unit`; of rational functions numerators with their scales, and denominators.
    """
    pid = tl.program_id(0)
    if pid >= B * H * PARTS:
        pid -= B * H * PARTS
        blocks: tl.constexpr = NP // BLOCK
        parts: tl.constexpr = M + 1 + EDGES
        _pack(
            first_ptr, second_ptr, third_ptr, scale_ptr, base_ptr, w_ptr, packed_ptr, edges_ptr,
            pid // (parts * blocks), (pid // blocks) % parts, pid % blocks, N, NP, FAMILY, K, M, WAVELET, NUMERATOR,
            EDGES, R, RP, BLOCK,
        )  # fmt: skip
    else:
        dtype = v_ptr.dtype.element_ty
        part = pid % PARTS
        head = pid // (B * PARTS)
        b = (pid // PARTS % B).to(tl.int64)
        columns = tl.arange(0, DP)
        r = tl.arange(0, RP)
        u = tl.zeros([RP, DP], tl.float32)
        blocks_of_all = tl.cdiv(N, BLOCK)
        for block in range(part * blocks_of_all // PARTS, (part + 1) * blocks_of_all // PARTS):
            keys = block * BLOCK + tl.arange(0, BLOCK)
            v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
            if HAS_KEEP:
                v = tl.where(_visible(keep_ptr, b, keys, N)[:, None], v, 0.0).to(dtype)
            inside = (keys[:, None] < N) & (r[None, :] < R)
            w = tl.load(w_ptr + (head * N + keys[:, None]) * R + r[None, :], mask=inside, other=0.0)
            u = tl.dot(tl.trans(w.to(dtype)), v, u, input_precision=PRECISION)
        at = (((part * B + b) * H + head) * RP + r[:, None]) * DP + columns[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty))


@_kernel
def _forward(
    q_ptr, k_ptr, packed_ptr, edges_ptr, keep_ptr, u_ptr, out_ptr, hidden_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, B, H, N, scaling, FIRST, TILES,
    NP: tl.constexpr, R: tl.constexpr, FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ORDER: tl.constexpr,
    LOW: tl.constexpr, WAVELET: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr, SLOPE: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, SAVE: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """
    Output of BM queries of one image and head, of TILES tiles that begin with query FIRST; with SAVE also H, which the
    backward pass wants.
    """
    dtype = q_ptr.dtype.element_ty
    scaling = tl.cast(scaling, tl.float32)  # inductor may pass it in fp64
    # Heads vary slowest: programs that run together share coefficients, which then stay in the cache.
    pid = tl.program_id(0)
    head = pid // (B * TILES)
    b = ((pid // TILES) % B).to(tl.int64)
    rows = FIRST + (pid % TILES) * BM + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    own = b * H + head
    packed_ptr += head * (2 * M + 1) * NP * RP
    edges_ptr += head * EDGES * R * NP
    q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
    hidden = tl.zeros([BM, RP], tl.float32)
    for start in range(0, N, BN):
        keys = start + tl.arange(0, BN)
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        if HAS_KEEP:
            visible = _visible(keep_ptr, b, keys, N)
            # Where, and not times: what a masked key holds may be infinite.
            k = tl.where(visible[:, None], k, 0.0).to(dtype)
        edge = keys[:, None] * RP + r[None, :]
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        state = (x, x, x, x, x)
        for m in tl.static_range(M):
            feature, _, state = _feature(m, x, state, FAMILY, K, ORDER, LOW, SLOPE, BASE, FAST)
            coefficients = tl.load(packed_ptr + m * NP * RP + edge)
            if HAS_KEEP:
                coefficients = tl.where(visible[:, None], coefficients, 0.0).to(dtype)
            hidden = tl.dot(feature.to(dtype), coefficients, hidden, input_precision=PRECISION)
        if FAMILY >= 2:
            for p in tl.range(0, R, loop_unroll_factor=2):
                own_edges = edges_ptr + p * NP + keys[None, :]
                values = _edge(x, own_edges, R * NP, FAMILY, WAVELET, NUMERATOR, DENOMINATOR, FAST)
                if HAS_KEEP:
                    values = tl.where(visible[None, :], values, 0.0)
                hidden = _add_row_sums(hidden, values, tl.where(r[None, :] == p, 1.0, 0.0))
    u = tl.load(u_ptr + (own * RP + r[:, None]) * DP + columns[None, :])
    out = tl.dot(hidden.to(dtype), u, input_precision=PRECISION)
    inside = rows[:, None] < N
    out_ptr += ((b * N + rows[:, None]) * H + head) * D + columns[None, :]
    tl.store(out_ptr, out.to(dtype), mask=inside & (columns[None, :] < D))
    if SAVE:
        tl.store(hidden_ptr + (own * N + rows[:, None]) * RP + r[None, :], hidden.to(dtype), mask=inside)


@_kernel
def _backward_hidden(
    d_out_ptr, hidden_ptr, u_ptr, d_hidden_ptr, d_u_ptr,
    o_b, o_h, o_n, B, H, N, PARTS,
    NP: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, RP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    dH = d_out U^T, and dU = H^T d_out, of a part of the queries of one image and head. dH is (B, h, N, RP), or, for
    families whose functions are taken one by one, (B, h, RP, NP).
    """
    dtype = u_ptr.dtype.element_ty
    pid = tl.program_id(0)
    part = pid % PARTS
    own = (pid // PARTS).to(tl.int64)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    d_out_ptr += (own // H) * o_b + (own % H) * o_h
    square = r[:, None] * DP + columns[None, :]
    u = tl.load(u_ptr + own * RP * DP + square)
    d_u = tl.zeros([RP, DP], tl.float32)
    blocks = tl.cdiv(N, BLOCK)
    for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        inside = rows[:, None] < N
        at = (own * N + rows[:, None]) * RP + r[None, :]
        d_out = _tile(d_out_ptr, rows, o_n, columns, N, D, DP)
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
        d_hidden = tl.dot(d_out, tl.trans(u), input_precision=PRECISION)
        if EDGES == 0:
            tl.store(d_hidden_ptr + at, d_hidden.to(dtype), mask=inside)
        else:
            tl.store(d_hidden_ptr + (own * RP + r[None, :]) * NP + rows[:, None], d_hidden.to(dtype))
        d_u = tl.dot(tl.trans(hidden), d_out, d_u, input_precision=PRECISION)
    tl.store(d_u_ptr + (part * B * H + own) * RP * DP + square, d_u.to(d_u_ptr.dtype.element_ty))


@_kernel
def _backward_queries(
    q_ptr, k_ptr, packed_ptr, keep_ptr, d_hidden_ptr, d_q_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, B, H, N, scaling, FIRST, TILES,
    NP: tl.constexpr, FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ORDER: tl.constexpr,
    LOW: tl.constexpr, SLOPE: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of BM queries, as in `_forward`, of a family that is linear in its coefficients."""
    dtype = q_ptr.dtype.element_ty
    scaling = tl.cast(scaling, tl.float32)  # inductor may pass it in fp64
    # Heads vary slowest: programs that run together share coefficients, which then stay in the cache.
    pid = tl.program_id(0)
    head = pid // (B * TILES)
    b = ((pid // TILES) % B).to(tl.int64)
    rows = FIRST + (pid % TILES) * BM + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    own = b * H + head
    packed_ptr += (head * (2 * M + 1) + M + 1) * NP * RP
    inside = rows[:, None] < N
    q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
    at = (own * N + rows[:, None]) * RP + r[None, :]
    d_hidden = tl.load(d_hidden_ptr + at, mask=inside, other=0.0)
    d_q = tl.zeros([BM, DP], tl.float32)
    for start in range(0, N, BN):
        keys = start + tl.arange(0, BN)
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        if HAS_KEEP:
            # A key of zeros hands no gradient on to its query.
            k = tl.where(_visible(keep_ptr, b, keys, N)[:, None], k, 0.0).to(dtype)
        edge = keys[:, None] * RP + r[None, :]
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        state = (x, x, x, x, x)
        d_x = tl.zeros([BM, BN], tl.float32)
        for m in tl.static_range(M):
            _, derivative, state = _feature(m, x, state, FAMILY, K, ORDER, LOW, SLOPE, BASE, FAST)
            coefficients = tl.load(packed_ptr + m * NP * RP + edge)
            d_x += derivative * tl.dot(d_hidden, tl.trans(coefficients), input_precision=PRECISION)
        d_q = tl.dot(d_x.to(dtype), k, d_q, input_precision=PRECISION)
    d_q_ptr += ((b * N + rows[:, None]) * H + head) * D + columns[None, :]
    tl.store(d_q_ptr, (d_q * scaling).to(dtype), mask=inside & (columns[None, :] < D))


@_kernel
def _backward_keys(
    q_ptr, k_ptr, packed_ptr, keep_ptr, d_hidden_ptr, d_k_ptr, partial_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, B, H, N, scaling, CHUNK, FIRST, TILES, END, AREA,
    NP: tl.constexpr, FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ORDER: tl.constexpr,
    LOW: tl.constexpr, SLOPE: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """
    dk of BN keys, of TILES tiles from key FIRST to END, in a chunk of images, and the chunk's sums for the coefficients
    of these keys: `partial` is (chunks, H, M, END - FIRST, RP), from its row AREA of RP on.
    """
    dtype = q_ptr.dtype.element_ty
    scaling = tl.cast(scaling, tl.float32)  # inductor may pass it in fp64
    pid = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    head = pid // (chunks * TILES)
    chunk = (pid // TILES) % chunks
    keys = FIRST + (pid % TILES) * BN + tl.arange(0, BN)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    edge = keys[:, None] * RP + r[None, :]
    inside = keys[:, None] < END
    packed_ptr += head * (2 * M + 1) * NP * RP
    partial_ptr += ((chunk * H + head).to(tl.int64) * M * (END - FIRST) + AREA - FIRST) * RP
    slopes = ()
    if KEPT:
        for m in tl.static_range(M):
            slopes = slopes + (tl.load(packed_ptr + (M + 1 + m) * NP * RP + edge),)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([BN, RP], tl.float32),)
    for image in range(chunk * CHUNK, tl.minimum(B, (chunk + 1) * CHUNK)):
        b = tl.cast(image, tl.int64)
        own = b * H + head
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        if HAS_KEEP:
            visible = _visible(keep_ptr, b, keys, N)
            k = tl.where(visible[:, None], k, 0.0).to(dtype)
        d_k = tl.zeros([BN, DP], tl.float32)
        for start in range(0, N, BM):
            rows = start + tl.arange(0, BM)
            q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
            at = (own * N + rows[:, None]) * RP + r[None, :]
            d_hidden = tl.load(d_hidden_ptr + at, mask=rows[:, None] < N, other=0.0)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling
            state = (x, x, x, x, x)
            d_x = tl.zeros([BN, BM], tl.float32)
            new = ()
            for m in tl.static_range(M):
                feature, derivative, state = _feature(m, x, state, FAMILY, K, ORDER, LOW, SLOPE, BASE, FAST)
                coefficients = slopes[m] if KEPT else tl.load(packed_ptr + (M + 1 + m) * NP * RP + edge)
                d_x += derivative * tl.dot(coefficients, tl.trans(d_hidden), input_precision=PRECISION)
                if HAS_KEEP:
                    feature = tl.where(visible[:, None], feature, 0.0)
                new = new + (tl.dot(feature.to(dtype), d_hidden, sums[m], input_precision=PRECISION),)
            sums = new
            d_k = tl.dot(d_x.to(dtype), q, d_k, input_precision=PRECISION)
        at = ((b * N + keys[:, None]) * H + head) * D + columns[None, :]
        store = inside & (columns[None, :] < D)
        if HAS_KEEP:
            d_k = tl.where(visible[:, None], d_k, 0.0)
        tl.store(d_k_ptr + at, (d_k * scaling).to(dtype), mask=store)
    for m in tl.static_range(M):
        tl.store(partial_ptr + m * (END - FIRST) * RP + edge, sums[m], mask=inside)


@_kernel
def _backward_edges(
    q_ptr, k_ptr, packed_ptr, edges_ptr, keep_ptr, d_hidden_ptr, d_q_ptr, d_k_ptr, partial_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, B, H, N, scaling, CHUNK, KEY_PARTS, QUERY_PARTS,
    NP: tl.constexpr, R: tl.constexpr, FAMILY: tl.constexpr, M: tl.constexpr, WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, EDGES: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """
    dq, dk and the sums for the parameters of a family whose functions are taken one by one, of a chunk of images, a
    part of the keys and a part of the queries: `d_q` (KEY_PARTS, B, N, H, D), fp32, `d_k` (QUERY_PARTS, B, N, H, D),
    and `partial` (chunks x QUERY_PARTS, H, M + EDGES, N, RP). dq grows from one tile of keys to the next.
    """
    dtype = q_ptr.dtype.element_ty
    scaling = tl.cast(scaling, tl.float32)  # inductor may pass it in fp64
    pid = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    query_part = pid % QUERY_PARTS
    key_part = pid // QUERY_PARTS % KEY_PARTS
    chunk = pid // (QUERY_PARTS * KEY_PARTS) % chunks
    head = pid // (QUERY_PARTS * KEY_PARTS * chunks)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    packed_ptr += (head * (2 * M + 1) + M + 1) * NP * RP
    edges_ptr += head * EDGES * R * NP
    partial_ptr += ((chunk * QUERY_PARTS + query_part) * H + head).to(tl.int64) * (M + EDGES) * N * RP
    key_tiles = tl.cdiv(N, BN)
    query_tiles = tl.cdiv(N, BM)
    first_tile = key_part * key_tiles // KEY_PARTS
    first_row = query_part * query_tiles // QUERY_PARTS * BM
    last_row = (query_part + 1) * query_tiles // QUERY_PARTS * BM
    for tile in range(first_tile, (key_part + 1) * key_tiles // KEY_PARTS):
        keys = tile * BN + tl.arange(0, BN)
        edge = keys[:, None] * RP + r[None, :]
        inside = (keys[:, None] < N) & (columns[None, :] < D)
        own_edges = edges_ptr + keys[:, None]
        sums = ()
        for _ in tl.static_range(M + EDGES):
            sums = sums + (tl.zeros([BN, RP], tl.float32),)
        for image in range(chunk * CHUNK, tl.minimum(B, (chunk + 1) * CHUNK)):
            b = tl.cast(image, tl.int64)
            own_hidden = d_hidden_ptr + (b * H + head) * RP * NP
            own_d_q = d_q_ptr + ((key_part * B + b) * N * H + head) * D
            own_d_k = d_k_ptr + ((query_part * B + b) * N * H + head) * D
            k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
            if HAS_KEEP:
                visible = _visible(keep_ptr, b, keys, N)
                k = tl.where(visible[:, None], k, 0.0).to(dtype)
            d_k = tl.zeros([BN, DP], tl.float32)
            for start in range(first_row, last_row, BM):
                rows = start + tl.arange(0, BM)
                q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
                x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling
                d_x = tl.zeros([BN, BM], tl.float32)
                new = ()
                if M == 1:
                    d_hidden = tl.trans(tl.load(own_hidden + r[:, None] * NP + rows[None, :]))
                    feature, derivative = _base(x, BASE)
                    coefficients = tl.load(packed_ptr + edge)
                    d_x += derivative * tl.dot(coefficients, tl.trans(d_hidden), input_precision=PRECISION)
                    if HAS_KEEP:
                        feature = tl.where(visible[:, None], feature, 0.0)
                    new = new + (tl.dot(feature.to(dtype), d_hidden, sums[0], input_precision=PRECISION),)
                edge_sums = ()
                for j in tl.static_range(EDGES):
                    edge_sums = edge_sums + (sums[M + j],)
                for p in tl.range(0, R, loop_unroll_factor=2):
                    gradient = tl.load(own_hidden + p * NP + rows).to(tl.float32)[None, :]
                    if HAS_KEEP:
                        gradient = tl.where(visible[:, None], gradient, 0.0)
                    chosen = tl.where(r[None, :] == p, 1.0, 0.0)
                    d_x, edge_sums = _add_edges(
                        x, gradient, d_x, edge_sums, own_edges + p * NP, chosen, R * NP, FAMILY, WAVELET, NUMERATOR,
                        DENOMINATOR, EDGES, FAST,
                    )  # fmt: skip
                sums = new + edge_sums
                half_d_x = d_x.to(dtype)
                d_k = tl.dot(half_d_x, q, d_k, input_precision=PRECISION)
                d_q = tl.dot(tl.trans(half_d_x), k, input_precision=PRECISION) * scaling
                at = own_d_q + rows[:, None] * (H * D) + columns[None, :]
                store = (rows[:, None] < N) & (columns[None, :] < D)
                # As a branch it takes up to a third of the whole kernel's time.
                grown = tl.zeros([BM, 1], tl.int32) + tile > first_tile
                d_q += tl.load(at, mask=store & grown, other=0.0)
                tl.store(at, d_q, mask=store)
            if HAS_KEEP:
                d_k = tl.where(visible[:, None], d_k, 0.0)
            d_k = (d_k * scaling).to(d_k_ptr.dtype.element_ty)
            tl.store(own_d_k + keys[:, None] * (H * D) + columns[None, :], d_k, mask=inside)
        for m in tl.static_range(M + EDGES):
            tl.store(partial_ptr + m * N * RP + edge, sums[m], mask=keys[:, None] < N)
        # What one tile of keys wrote, the next one reads.
        tl.debug_barrier()


@_kernel
def _add_parts(parts_ptr, out_ptr, PARTS, SIZE, BLOCK: tl.constexpr):
    """The sum over the first dimension of `parts`, (PARTS, SIZE)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * tl.cast(SIZE, tl.int64) + at, mask=at < SIZE, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < SIZE)


@_kernel
def _backward_values(
    v_ptr, packed_ptr, keep_ptr, d_u_ptr, d_v_ptr, partial_ptr,
    v_b, v_h, v_n, B, H, N, CHUNK,
    NP: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, RP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dv = W dU of a block of keys in a chunk of images, and the chunk's sum dW = v dU^T: (chunks, H, N, RP)."""
    dtype = v_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    head = pid // (chunks * tiles)
    chunk = (pid // tiles) % chunks
    keys = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    edge = keys[:, None] * RP + r[None, :]
    square = r[:, None] * DP + columns[None, :]
    inside = keys[:, None] < N
    store = inside & (columns[None, :] < D)
    w = tl.load(packed_ptr + (head * (2 * M + 1) + M) * NP * RP + edge)
    d_w = tl.zeros([BLOCK, RP], tl.float32)
    for image in range(chunk * CHUNK, tl.minimum(B, (chunk + 1) * CHUNK)):
        b = tl.cast(image, tl.int64)
        own = b * H + head
        v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
        d_u = tl.load(d_u_ptr + own * RP * DP + square)
        d_v = tl.dot(w, d_u, input_precision=PRECISION)
        if HAS_KEEP:
            visible = _visible(keep_ptr, b, keys, N)[:, None]
            v = tl.where(visible, v, 0.0).to(dtype)
            d_v = tl.where(visible, d_v, 0.0)
        d_w = tl.dot(v, tl.trans(d_u), d_w, input_precision=PRECISION)
        tl.store(d_v_ptr + ((b * N + keys[:, None]) * H + head) * D + columns[None, :], d_v.to(dtype), mask=store)
    tl.store(partial_ptr + (chunk * H + head).to(tl.int64) * N * RP + edge, d_w, mask=inside)


@_kernel
def _reduce(
    partial_ptr, w_partial_ptr, first_ptr, second_ptr, third_ptr, scale_ptr, d_first_ptr, d_second_ptr, d_third_ptr,
    d_scale_ptr, d_base_ptr, d_w_ptr,
    CHUNKS, REST_CHUNKS, W_CHUNKS, REST, H, N,
    FAMILY: tl.constexpr, K: tl.constexpr, M: tl.constexpr, WAVELET: tl.constexpr, NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr, EDGES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """
    Sum the chunks, and hand the gradient on to coefficients, scales and W. `partial` holds the sums of the keys below
    REST, and behind them those of the other keys, which have a number of chunks of their own.
    """
    COUNT: tl.constexpr = M + EDGES
    blocks = tl.cdiv(N * RP, BLOCK)
    head = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = at // RP
    r = at % RP
    inside = (n < N) & (r < R)
    edge = r * N + n
    rest = n >= REST
    span = tl.where(rest, N - REST, REST).to(tl.int64) * RP
    first = at + head * COUNT * span + tl.where(rest, tl.cast(CHUNKS, tl.int64) * H * COUNT * REST - REST, 0) * RP
    step = H * COUNT * span
    chunks = tl.where(rest, REST_CHUNKS, CHUNKS)
    most = tl.max(tl.where(inside, chunks, 0), axis=0)
    size = R * N
    scale = tl.load(scale_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    for m in tl.static_range(M):
        total = _total(partial_ptr, first + m * span, step, chunks, most, inside, BLOCK, ROWS)
        if m == K:
            tl.store(d_base_ptr + head * size + edge, total, mask=inside)
        elif FAMILY == 0 and m % 2 == 1:
            own = (head * (K // 2) + m // 2) * size + edge
            d_scale += total * tl.load(second_ptr + own, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_second_ptr + own, total * scale, mask=inside)
        else:
            own = (head * (K // 2) + m // 2 if FAMILY == 0 else head * K + m) * size + edge
            d_scale += total * tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_first_ptr + own, total * scale, mask=inside)
    if FAMILY == 2:
        own = head * size + edge
        window = _window(n, N, WAVELET)
        total = window * _total(partial_ptr, first + M * span, step, chunks, most, inside, BLOCK, ROWS)
        amplitude = tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_first_ptr + own, total * scale, mask=inside)
        d_scale += total * amplitude
        # x~ = (x - tau) / s moves with tau as -1/s, and with s as -x~/s; the sums are in units of `_unit`.
        inner = -scale * amplitude * window / tl.load(third_ptr + own, mask=inside, other=1.0).to(tl.float32)
        total = _total(partial_ptr, first + (M + 1) * span, step, chunks, most, inside, BLOCK, ROWS)
        tl.store(d_second_ptr + own, total * inner * _unit(WAVELET), mask=inside)
        total = _total(partial_ptr, first + (M + 2) * span, step, chunks, most, inside, BLOCK, ROWS)
        tl.store(d_third_ptr + own, total * inner, mask=inside)
    elif FAMILY == 3:
        for j in tl.static_range(NUMERATOR):
            total = _total(partial_ptr, first + (M + j) * span, step, chunks, most, inside, BLOCK, ROWS)
            own = (head * NUMERATOR + j) * size + edge
            d_scale += total * tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_first_ptr + own, total * scale, mask=inside)
        for j in tl.static_range(DENOMINATOR):
            total = _total(partial_ptr, first + (M + NUMERATOR + j) * span, step, chunks, most, inside, BLOCK, ROWS)
            # The scale is in these sums already.
            tl.store(d_second_ptr + (head * DENOMINATOR + j) * size + edge, total, mask=inside)
    if M == K:
        # There is no base function, and its scale may be trainable all the same.
        tl.store(d_base_ptr + head * size + edge, tl.zeros_like(scale), mask=inside)
    chunks = tl.full([BLOCK], 0, tl.int32) + W_CHUNKS
    step = tl.full([BLOCK], 0, tl.int64) + H * N * RP
    first = at + head.to(tl.int64) * N * RP
    total = _total(w_partial_ptr, first, step, chunks, W_CHUNKS, inside, BLOCK, ROWS)
    tl.store(d_w_ptr + head * size + n * R + r, total, mask=inside)
    tl.store(d_scale_ptr + head * size + edge, d_scale, mask=inside)
