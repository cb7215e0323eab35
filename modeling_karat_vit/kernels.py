# SPDX-License-Identifier: Apache-2.0
"""
Fused Triton kernels of phi1_w2 attention, for every basis.

    x = scaling * q k^T,    H = Phi(x),    U = W^T v,    out = H U

Families that are linear in their coefficients have M features F_m (Fourier: cos x, sin x, cos 2x, ...; B-spline: B_0,
B_1, ...), and so has the base function; then H = sum_m F_m(x) C_m^T, on the matrix units. Wavelets and rational
functions are evaluated per score and output. Scores and features live in registers: device memory sees (B, h, N, r) at
most. The backward pass recomputes the scores twice: once per query tile for dq, once per key tile for dk and the
parameters, whose gradients are summed over a chunk of images in registers, written as one partial sum per chunk, and
reduced. No atomics: two runs give equal bits.

Shapes: B images, h heads, N tokens, d head size, r rank; RP is r and DP is d, padded to a power of two of at least 16.
Importing this file needs Triton; `attention.py` goes without it. With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import os
from dataclasses import dataclass, fields
from functools import wraps

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels of KArAt need Triton.") from error

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

# What the kernels are compiled for, by name.
FAMILIES = {"fourier": 0, "spline": 1, "wavelet": 2, "rational": 3}
WAVELETS = {"mexican_hat": 0, "morlet": 1, "dog": 2, "meyer": 3, "shannon": 4}
BASE_FUNCTIONS = {
    "zero": 0,
    "linear": 1,
    "relu": 2,
    "leaky_relu": 3,
    "relu2": 4,
    "relu6": 5,
    "sigmoid": 6,
    "silu": 7,
    "swish": 7,
    "tanh": 8,
    "gelu": 9,
    "gelu_fast": 10,
    "gelu_new": 10,
    "gelu_pytorch_tanh": 10,
    "quick_gelu": 11,
    "mish": 12,
}
MAX_HEAD_SIZE = 128
MAX_RANK = 64


@triton.jit
def _sin(x, FAST: tl.constexpr):
    # The fast instructions reduce their argument themselves, to an absolute error of about |x| 2^-24: at |x| = 1e3 far
    # below what half precision resolves. Full precision takes the accurate functions.
    if FAST:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sin(x)


@triton.jit
def _cos(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.cos(x)


@triton.jit
def _power(x, n: tl.constexpr):
    y = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(n):
        y = y * x
    return y


@triton.jit
def _spline(x, i: tl.constexpr, ORDER: tl.constexpr, LOW: tl.constexpr, SLOPE: tl.constexpr):
    """
    B_i(x) and its derivative: the cardinal B-spline as a sum of truncated powers, from the nearer end of its support,
    so that the terms stay small.
    """
    if ORDER == 0:
        u = (x - LOW) * SLOPE - i
        value = tl.where((u >= 0.0) & (u < 1.0), 1.0, 0.0)
        derivative = tl.zeros_like(x)
    else:
        t = (x - LOW) * SLOPE + (ORDER - i)
        falling = t > (ORDER + 1) / 2
        t = tl.minimum(t, ORDER + 1 - t)
        value = tl.zeros_like(x)
        derivative = tl.zeros_like(x)
        factor = 1.0
        norm = 1.0
        for j in tl.static_range((ORDER + 1) // 2 + 1):
            rest = tl.maximum(t - j, 0.0)
            power = factor * _power(rest, ORDER - 1)
            value += power * rest
            # The derivative of a ramp is a step, also where rest^0 is 1.
            derivative += tl.where(rest > 0.0, power, 0.0)
            factor = -factor * (ORDER + 1 - j) / (j + 1)
        for j in tl.static_range(1, ORDER):
            norm = norm * j
        value = value * (1.0 / (norm * ORDER))
        derivative = derivative * (SLOPE / norm)
        derivative = tl.where(falling, -derivative, derivative)
    return value, derivative


@triton.jit
def _base(x, BASE: tl.constexpr):
    """b(x) and b'(x)."""
    one = tl.full(x.shape, 1.0, tl.float32)
    if BASE == 1:  # linear
        return x, one
    elif BASE == 2:  # relu
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif BASE == 3:  # leaky_relu
        return tl.where(x > 0.0, x, 0.01 * x), tl.where(x > 0.0, 1.0, 0.01)
    elif BASE == 4:  # relu2
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    elif BASE == 5:  # relu6
        return tl.minimum(tl.maximum(x, 0.0), 6.0), tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif BASE == 6:  # sigmoid
        value = tl.sigmoid(x)
        return value, value * (1.0 - value)
    elif BASE == 7:  # silu
        gate = tl.sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    elif BASE == 8:  # tanh
        value = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        return value, 1.0 - value * value
    elif BASE == 9:  # gelu
        gate = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * gate, gate + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif BASE == 10:  # gelu by tanh
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * slope
    elif BASE == 11:  # quick_gelu
        gate = tl.sigmoid(1.702 * x)
        return x * gate, gate * (1.0 + 1.702 * x * (1.0 - gate))
    else:  # mish
        # tanh(softplus(x)) = (e^2x + 2 e^x) / (e^2x + 2 e^x + 2), which is 1 beyond 20.
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        gate = n / (n + 2.0)
        return x * gate, gate + x * (1.0 - gate * gate) * tl.sigmoid(x)


@triton.jit
def _feature(
    m: tl.constexpr,
    x,
    state,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
    SLOPE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """
    Feature m of M = K (+ 1 with a base function), in order, and what its derivative is made of: F_m, D_m, and the state
    for the next. D_m goes with the coefficients that `_pack` keeps for the derivative.
    """
    if BASE != 0 and m == K:
        value, derivative = _base(x, BASE)
        return value, derivative, state
    elif FAMILY == 0:
        # cos x, sin x, cos 2x, ...: cos((n+1)x) = 2 cos(x) cos(nx) - cos((n-1)x), and the same for the sine.
        cos_1, cos_0, cos, sin_0, sin = state
        if m == 0:
            cos_1 = _cos(x, FAST)
            cos_0 = tl.full(x.shape, 1.0, tl.float32)
            cos = cos_1
            sin_0 = tl.zeros_like(x)
            sin = _sin(x, FAST)
        elif m % 2 == 0:
            cos_0, cos = cos, 2.0 * cos_1 * cos - cos_0
            sin_0, sin = sin, 2.0 * cos_1 * sin - sin_0
        state = (cos_1, cos_0, cos, sin_0, sin)
        if m % 2 == 0:
            return cos, sin, state
        else:
            return sin, cos, state
    else:
        value, derivative = _spline(x, m, ORDER, LOW, SLOPE)
        return value, derivative, state


@triton.jit
def _wavelet(t, WAVELET: tl.constexpr, FAST: tl.constexpr):
    """psi(t) and psi'(t), Shannon's without its window."""
    if WAVELET == 0:  # mexican_hat
        bell = 0.8673250705840776 * tl.exp(-0.5 * t * t)
        return (t * t - 1.0) * bell, t * (3.0 - t * t) * bell
    elif WAVELET == 1:  # morlet
        bell = tl.exp(-0.5 * t * t)
        cos = _cos(5.0 * t, FAST)
        return cos * bell, (-5.0 * _sin(5.0 * t, FAST) - t * cos) * bell
    elif WAVELET == 2:  # dog
        bell = tl.exp(-0.5 * t * t)
        return t * bell, (1.0 - t * t) * bell
    elif WAVELET == 3:  # meyer
        a = tl.abs(t)
        v = tl.minimum(tl.maximum(2.0 * a - 1.0, 0.0), 1.0)
        cube = v * v * v
        nu = 1.5707963267948966 * cube * v * (35.0 + v * (-84.0 + v * (70.0 - 20.0 * v)))
        rest = 1.0 - v
        slope = 1.5707963267948966 * 280.0 * cube * rest * rest * rest
        sin = _sin(3.141592653589793 * a, FAST)
        cos_nu = _cos(nu, FAST)
        derivative = 3.141592653589793 * _cos(3.141592653589793 * a, FAST) * cos_nu - sin * _sin(nu, FAST) * slope
        inside = a < 1.0
        # |t| has derivative 0 at 0, as in PyTorch.
        sign = tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, 0.0))
        return tl.where(inside, sin * cos_nu, 0.0), tl.where(inside, sign * derivative, 0.0)
    else:  # shannon
        y = t * t
        near = y < 0.0625
        far = tl.where(near, 1.0, t)
        value = _sin(far, FAST) / far
        derivative = (_cos(far, FAST) - value) / far
        series = 1.0 - y / 6.0 * (1.0 - y / 20.0 * (1.0 - y / 42.0))
        slope = -t / 3.0 * (1.0 - y / 10.0 * (1.0 - y / 28.0 * (1.0 - y / 54.0)))
        return tl.where(near, series, value), tl.where(near, slope, derivative)


@triton.jit
def _window(keys, N, WAVELET: tl.constexpr):
    """Shannon's Hamming window at the inputs `keys`; 1 for the other wavelets, and for a single input."""
    window = tl.full(keys.shape, 1.0, tl.float32)
    if WAVELET == 4:
        last = tl.maximum(N - 1, 1).to(tl.float32)
        hamming = 0.54 - 0.46 * tl.cos(6.283185307179586 * keys.to(tl.float32) / last)
        window = tl.where(N > 1, hamming, window)
    return window


@triton.jit
def _horner(x, ptr, at, mask, stride, COUNT: tl.constexpr):
    """c_0 + ... + c_(COUNT-1) x^(COUNT-1) and its derivative, c_j at ptr + j * stride + at."""
    value = tl.load(ptr + (COUNT - 1) * stride + at, mask=mask, other=0.0).to(tl.float32) + tl.zeros_like(x)
    slope = tl.zeros_like(x)
    for j in tl.static_range(COUNT - 2, -1, -1):
        slope = slope * x + value
        value = value * x + tl.load(ptr + j * stride + at, mask=mask, other=0.0).to(tl.float32)
    return value, slope


@triton.jit
def _rational(x, first_ptr, second_ptr, at, mask, stride, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """P / (1 + |Q|), its derivative, the reciprocal of the denominator, and the sign of Q."""
    p, p_slope = _horner(x, first_ptr, at, mask, stride, NUMERATOR)
    if DENOMINATOR == 0:
        return p, p_slope, tl.full(x.shape, 1.0, tl.float32), tl.zeros_like(x)
    else:
        q, q_slope = _horner(x, second_ptr, at, mask, stride, DENOMINATOR)
        q_slope = q + x * q_slope
        q = q * x
        reciprocal = 1.0 / (1.0 + tl.abs(q))
        sign = tl.where(q > 0.0, 1.0, tl.where(q < 0.0, -1.0, 0.0))
        value = p * reciprocal
        return value, (p_slope - value * sign * q_slope) * reciprocal, reciprocal, sign


@triton.jit
def _edge(
    p,
    x,
    keys,
    visible,
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    head,
    N,
    R,
    FAMILY: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """
    The functions of output p that are not linear in their parameters: scale * basis(x) and its derivative. `keys` and
    their mask `visible` are shaped to go with `x`.
    """
    own = (head * R + p) * N + keys
    scale = tl.load(scale_ptr + own, mask=visible, other=0.0).to(tl.float32)
    if FAMILY == 2:
        scale *= tl.load(first_ptr + own, mask=visible, other=0.0).to(tl.float32) * _window(keys, N, WAVELET)
        inverse = 1.0 / tl.load(third_ptr + own, mask=visible, other=1.0).to(tl.float32)
        t = (x - tl.load(second_ptr + own, mask=visible, other=0.0).to(tl.float32)) * inverse
        value, derivative = _wavelet(t, WAVELET, FAST)
        return scale * value, scale * inverse * derivative
    else:
        stride = R * N
        first_ptr += head * (NUMERATOR - 1) * stride
        second_ptr += head * (DENOMINATOR - 1) * stride
        value, derivative, _, _ = _rational(x, first_ptr, second_ptr, own, visible, stride, NUMERATOR, DENOMINATOR)
        return scale * value, scale * derivative


@triton.jit
def _pack(
    first_ptr,
    second_ptr,
    scale_ptr,
    base_ptr,
    w_ptr,
    packed_ptr,
    N,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    (h, 2M + 1, N, R) in the dtype of the scores: the M coefficients with their scales, W, and the M coefficients of the
    derivative.
    """
    head = tl.program_id(0)
    m = tl.program_id(1)
    n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RP)
    inside = (n[:, None] < N) & (r[None, :] < R)
    edge = r[None, :] * N + n[:, None]
    size = R * N
    value = tl.load(scale_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    if m == M:
        value = tl.load(w_ptr + head * size + n[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
    elif m == K:
        value = tl.load(base_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    elif FAMILY == 1:
        value *= tl.load(first_ptr + (head * K + m) * size + edge, mask=inside, other=0.0).to(tl.float32)
    elif m % 2 == 0:
        value *= tl.load(first_ptr + (head * (K // 2) + m // 2) * size + edge, mask=inside, other=0.0).to(tl.float32)
    else:
        value *= tl.load(second_ptr + (head * (K // 2) + m // 2) * size + edge, mask=inside, other=0.0).to(tl.float32)
    out = packed_ptr + ((head * (2 * M + 1) + m) * N + n[:, None]) * RP + r[None, :]
    dtype = packed_ptr.dtype.element_ty
    tl.store(out, value.to(dtype), mask=n[:, None] < N)
    if m != M:
        if (FAMILY == 0) & (m < K):
            # d(a cos nx + b sin nx) = -n a sin nx + n b cos nx
            harmonic = (m // 2 + 1).to(tl.float32)
            value *= tl.where(m % 2 == 0, -harmonic, harmonic)
        tl.store(out + (M + 1) * N * RP, value.to(dtype), mask=n[:, None] < N)


@triton.jit
def _tile(ptr, rows, row_stride, columns, N, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of a matrix (N, D), zero outside."""
    inside = rows[:, None] < N
    if D != DP:
        inside = inside & (columns[None, :] < D)
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _visible(keep_ptr, b, keys, N, HAS_KEEP: tl.constexpr):
    """Which keys exist and are not masked."""
    visible = keys < N
    if HAS_KEEP:
        visible = visible & (tl.load(keep_ptr + b * N + keys, mask=visible, other=0) != 0)
    return visible


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    packed_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    keep_ptr,
    out_ptr,
    hidden_ptr,
    u_ptr,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    B,
    H,
    N,
    scaling,
    R,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
    SLOPE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Output of BM queries of one image and head; with SAVE also H and U, which the backward pass wants."""
    dtype = q_ptr.dtype.element_ty
    # Heads vary slowest: programs that run together share coefficients, which then stay in the cache.
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    head = pid // (B * tiles)
    b = ((pid // tiles) % B).to(tl.int64)
    tile = pid % tiles
    rows = tile * BM + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    packed_ptr += head * (2 * M + 1) * N * RP
    q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
    hidden = tl.zeros([BM, RP], tl.float32)
    u = tl.zeros([RP, DP], tl.float32)
    for start in range(0, N, BN):
        keys = start + tl.arange(0, BN)
        visible = _visible(keep_ptr, b, keys, N, HAS_KEEP)
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
        if HAS_KEEP:
            # Where, and not times: what a masked key holds may be infinite.
            k = tl.where(visible[:, None], k, 0.0).to(dtype)
            v = tl.where(visible[:, None], v, 0.0).to(dtype)
        edge = keys[:, None] * RP + r[None, :]
        w = tl.load(packed_ptr + M * N * RP + edge, mask=visible[:, None], other=0.0)
        u = tl.dot(tl.trans(w), v, u, input_precision=PRECISION)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        state = (x, x, x, x, x)
        for m in tl.static_range(M):
            feature, _, state = _feature(m, x, state, FAMILY, K, ORDER, LOW, SLOPE, BASE, FAST)
            coefficients = tl.load(packed_ptr + m * N * RP + edge, mask=visible[:, None], other=0.0)
            hidden = tl.dot(feature.to(dtype), coefficients, hidden, input_precision=PRECISION)
        if FAMILY >= 2:
            for p in range(R):
                values, _ = _edge(
                    p,
                    x,
                    keys[None, :],
                    visible[None, :],
                    first_ptr,
                    second_ptr,
                    third_ptr,
                    scale_ptr,
                    head,
                    N,
                    R,
                    FAMILY,
                    WAVELET,
                    NUMERATOR,
                    DENOMINATOR,
                    FAST,
                )
                hidden += tl.where(r[None, :] == p, tl.sum(values, axis=1)[:, None], 0.0)
    out = tl.dot(hidden.to(dtype), u.to(dtype), input_precision=PRECISION)
    inside = rows[:, None] < N
    out_ptr += ((b * N + rows[:, None]) * H + head) * D + columns[None, :]
    tl.store(out_ptr, out.to(dtype), mask=inside & (columns[None, :] < D))
    if SAVE:
        own = b * H + head
        tl.store(hidden_ptr + (own * N + rows[:, None]) * RP + r[None, :], hidden.to(dtype), mask=inside)
        if tile == 0:
            tl.store(u_ptr + (own * RP + r[:, None]) * DP + columns[None, :], u.to(dtype))


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    packed_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    keep_ptr,
    d_out_ptr,
    hidden_ptr,
    u_ptr,
    d_q_ptr,
    d_hidden_ptr,
    d_u_ptr,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    o_b,
    o_h,
    o_n,
    B,
    H,
    N,
    scaling,
    R,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
    SLOPE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq and dH of BM queries, and their share of dU = H^T d_out."""
    dtype = q_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    head = pid // (B * tiles)
    b = ((pid // tiles) % B).to(tl.int64)
    tile = pid % tiles
    rows = tile * BM + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    own = b * H + head
    packed_ptr += (head * (2 * M + 1) + M + 1) * N * RP
    inside = rows[:, None] < N
    q = _tile(q_ptr + b * q_b + head * q_h, rows, q_n, columns, N, D, DP)
    d_out = _tile(d_out_ptr + b * o_b + head * o_h, rows, o_n, columns, N, D, DP)
    u = tl.load(u_ptr + (own * RP + r[:, None]) * DP + columns[None, :])
    d_hidden = tl.dot(d_out, tl.trans(u), input_precision=PRECISION).to(dtype)
    at = (own * N + rows[:, None]) * RP + r[None, :]
    tl.store(d_hidden_ptr + at, d_hidden, mask=inside)
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    d_u = tl.dot(tl.trans(hidden), d_out, input_precision=PRECISION)
    tl.store(d_u_ptr + ((own * tiles + tile) * RP + r[:, None]) * DP + columns[None, :], d_u)
    d_q = tl.zeros([BM, DP], tl.float32)
    for start in range(0, N, BN):
        keys = start + tl.arange(0, BN)
        visible = _visible(keep_ptr, b, keys, N, HAS_KEEP)
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        if HAS_KEEP:
            k = tl.where(visible[:, None], k, 0.0).to(dtype)
        edge = keys[:, None] * RP + r[None, :]
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        state = (x, x, x, x, x)
        d_x = tl.zeros([BM, BN], tl.float32)
        for m in tl.static_range(M):
            _, derivative, state = _feature(m, x, state, FAMILY, K, ORDER, LOW, SLOPE, BASE, FAST)
            coefficients = tl.load(packed_ptr + m * N * RP + edge, mask=visible[:, None], other=0.0)
            d_x += derivative * tl.dot(d_hidden, tl.trans(coefficients), input_precision=PRECISION)
        if FAMILY >= 2:
            for p in range(R):
                _, derivatives = _edge(
                    p,
                    x,
                    keys[None, :],
                    visible[None, :],
                    first_ptr,
                    second_ptr,
                    third_ptr,
                    scale_ptr,
                    head,
                    N,
                    R,
                    FAMILY,
                    WAVELET,
                    NUMERATOR,
                    DENOMINATOR,
                    FAST,
                )
                d_x += tl.sum(tl.where(r[None, :] == p, d_hidden, 0.0), axis=1)[:, None] * derivatives
        d_q = tl.dot(d_x.to(dtype), k, d_q, input_precision=PRECISION)
    d_q_ptr += ((b * N + rows[:, None]) * H + head) * D + columns[None, :]
    tl.store(d_q_ptr, (d_q * scaling).to(dtype), mask=inside & (columns[None, :] < D))


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    packed_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    keep_ptr,
    d_hidden_ptr,
    d_u_ptr,
    d_k_ptr,
    d_v_ptr,
    partial_ptr,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    B,
    H,
    N,
    scaling,
    CHUNK,
    U_TILES,
    R,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
    SLOPE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk and dv of BN keys in a chunk of images, and the chunk's sums for the coefficients and W of these keys."""
    dtype = q_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    head = pid // (chunks * tiles)
    chunk = (pid // tiles) % chunks
    keys = (pid % tiles) * BN + tl.arange(0, BN)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    edge = keys[:, None] * RP + r[None, :]
    inside = keys[:, None] < N
    packed_ptr += head * (2 * M + 1) * N * RP
    w = tl.load(packed_ptr + M * N * RP + edge, mask=inside, other=0.0)
    packed_ptr += (M + 1) * N * RP
    sums = ()
    # M sums for the features, and one for each parameter of wavelets and rational functions.
    for _ in tl.static_range(M + EDGES):
        sums = sums + (tl.zeros([BN, RP], tl.float32),)
    d_w = tl.zeros([BN, RP], tl.float32)
    for image in range(chunk * CHUNK, tl.minimum(B, (chunk + 1) * CHUNK)):
        b = tl.cast(image, tl.int64)
        own = b * H + head
        visible = _visible(keep_ptr, b, keys, N, HAS_KEEP)
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
        if HAS_KEEP:
            k = tl.where(visible[:, None], k, 0.0).to(dtype)
            v = tl.where(visible[:, None], v, 0.0).to(dtype)
        d_u = tl.zeros([RP, DP], tl.float32)
        for part in range(U_TILES):
            d_u += tl.load(d_u_ptr + ((own * U_TILES + part) * RP + r[:, None]) * DP + columns[None, :])
        d_u = d_u.to(dtype)
        d_v = tl.dot(w, d_u, input_precision=PRECISION)
        d_w = tl.dot(v, tl.trans(d_u), d_w, input_precision=PRECISION)
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
                coefficients = tl.load(packed_ptr + m * N * RP + edge, mask=visible[:, None], other=0.0)
                d_x += derivative * tl.dot(coefficients, tl.trans(d_hidden), input_precision=PRECISION)
                if HAS_KEEP:
                    feature = tl.where(visible[:, None], feature, 0.0)
                new = new + (tl.dot(feature.to(dtype), d_hidden, sums[m], input_precision=PRECISION),)
            if FAMILY >= 2:
                seen = visible[:, None]
                edge_sums = ()
                for j in tl.static_range(EDGES):
                    edge_sums = edge_sums + (sums[M + j],)
                for p in range(R):
                    at_p = r[None, :] == p
                    gradient = tl.sum(tl.where(at_p, d_hidden, 0.0), axis=1)[None, :].to(tl.float32)
                    edge_at = (head * R + p) * N + keys[:, None]
                    scale = tl.load(scale_ptr + edge_at, mask=seen, other=0.0).to(tl.float32)
                    added = ()
                    if FAMILY == 2:
                        scale *= tl.load(first_ptr + edge_at, mask=seen, other=0.0).to(tl.float32)
                        scale *= _window(keys[:, None], N, WAVELET)
                        inverse = 1.0 / tl.load(third_ptr + edge_at, mask=seen, other=1.0).to(tl.float32)
                        t = (x - tl.load(second_ptr + edge_at, mask=seen, other=0.0).to(tl.float32)) * inverse
                        value, derivative = _wavelet(t, WAVELET, FAST)
                        moved = gradient * derivative
                        d_x += scale * inverse * moved
                        added = (gradient * value, moved, moved * t)
                    else:
                        stride = R * N
                        value, derivative, reciprocal, sign = _rational(
                            x,
                            first_ptr + head * (NUMERATOR - 1) * stride,
                            second_ptr + head * (DENOMINATOR - 1) * stride,
                            edge_at,
                            seen,
                            stride,
                            NUMERATOR,
                            DENOMINATOR,
                        )
                        d_x += scale * gradient * derivative
                        power = gradient * reciprocal
                        lower = -power * value * sign
                        for _ in tl.static_range(NUMERATOR):
                            added = added + (power,)
                            power = power * x
                        for _ in tl.static_range(DENOMINATOR):
                            lower = lower * x
                            added = added + (lower,)
                    grown = ()
                    for j in tl.static_range(EDGES):
                        total = tl.sum(tl.where(seen, added[j], 0.0), axis=1)[:, None]
                        grown = grown + (edge_sums[j] + tl.where(at_p, total, 0.0),)
                    edge_sums = grown
                new = new + edge_sums
            sums = new
            d_k = tl.dot(d_x.to(dtype), q, d_k, input_precision=PRECISION)
        at = ((b * N + keys[:, None]) * H + head) * D + columns[None, :]
        store = inside & (columns[None, :] < D)
        if HAS_KEEP:
            d_v = tl.where(visible[:, None], d_v, 0.0)
        tl.store(d_v_ptr + at, d_v.to(dtype), mask=store)
        tl.store(d_k_ptr + at, (d_k * scaling).to(dtype), mask=store)
    partial_ptr += (chunk * H + head).to(tl.int64) * (M + EDGES + 1) * N * RP + edge
    for m in tl.static_range(M + EDGES):
        tl.store(partial_ptr + m * N * RP, sums[m], mask=inside)
    tl.store(partial_ptr + (M + EDGES) * N * RP, d_w, mask=inside)


@triton.jit
def _total(
    partial_ptr,
    m,
    head,
    at,
    inside,
    CHUNKS,
    H,
    N,
    COUNT: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum m of COUNT over the chunks."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNKS, ROWS):
        chunk = start + tl.arange(0, ROWS)
        begin = ((chunk * H + head).to(tl.int64) * COUNT + m) * N * RP
        mask = (chunk < CHUNKS)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial_ptr + begin[:, None] + at[None, :], mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _reduce(
    partial_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    d_first_ptr,
    d_second_ptr,
    d_third_ptr,
    d_scale_ptr,
    d_base_ptr,
    d_w_ptr,
    CHUNKS,
    H,
    N,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum the chunks, and hand the gradient on to coefficients, scales and W."""
    COUNT: tl.constexpr = M + EDGES + 1
    head = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = at // RP
    r = at % RP
    inside = (n < N) & (r < R)
    edge = r * N + n
    size = R * N
    scale = tl.load(scale_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    for m in tl.static_range(M):
        total = _total(partial_ptr, m, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
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
        total = window * _total(partial_ptr, M, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
        amplitude = tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_first_ptr + own, total * scale, mask=inside)
        d_scale += total * amplitude
        # x~ = (x - tau) / s moves with tau as -1/s, and with s as -x~/s.
        inner = -scale * amplitude * window / tl.load(third_ptr + own, mask=inside, other=1.0).to(tl.float32)
        total = _total(partial_ptr, M + 1, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
        tl.store(d_second_ptr + own, total * inner, mask=inside)
        total = _total(partial_ptr, M + 2, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
        tl.store(d_third_ptr + own, total * inner, mask=inside)
    elif FAMILY == 3:
        for j in tl.static_range(NUMERATOR):
            total = _total(partial_ptr, M + j, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
            own = (head * NUMERATOR + j) * size + edge
            d_scale += total * tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_first_ptr + own, total * scale, mask=inside)
        for j in tl.static_range(DENOMINATOR):
            total = _total(partial_ptr, M + NUMERATOR + j, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
            tl.store(d_second_ptr + (head * DENOMINATOR + j) * size + edge, total * scale, mask=inside)
    total = _total(partial_ptr, COUNT - 1, head, at, inside, CHUNKS, H, N, COUNT, RP, BLOCK, ROWS)
    tl.store(d_w_ptr + head * size + n * R + r, total, mask=inside)
    tl.store(d_scale_ptr + head * size + edge, d_scale, mask=inside)


@dataclass(frozen=True)
class Form:
    """
    What the kernels are compiled for.

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
        """As numbers, which custom operators take."""
        return [float(getattr(self, name)) for name in _FORM_FIELDS]

    @classmethod
    def from_list(cls, values: list[float]) -> "Form":
        return cls(*(field.type(value) for field, value in zip(fields(cls), values)))


_FORM_FIELDS = tuple(field.name for field in fields(Form))


def _constants(q, form: Form, rank: int, keep) -> dict:
    full = q.dtype == torch.float32
    head_size = q.shape[-1]
    return {
        "FAMILY": form.family,
        "K": form.features,
        "M": form.features + (form.base != 0),
        "ORDER": form.order,
        "LOW": form.low,
        "SLOPE": form.slope,
        "WAVELET": form.wavelet,
        "NUMERATOR": form.numerator,
        "DENOMINATOR": form.denominator,
        "EDGES": 3 if form.family == 2 else form.numerator + form.denominator,
        "BASE": form.base,
        "FAST": not full and not INTERPRET,
        "PRECISION": "ieee" if full else "tf32",
        "HAS_KEEP": keep is not None,
        "RP": max(16, triton.next_power_of_2(rank)),
        "D": head_size,
        "DP": max(16, triton.next_power_of_2(head_size)),
    }


# Tiles measured best on an H200 at 197 tokens and heads of 64: mostly one warp per 16 rows.
def _query_tile(form: Form) -> dict:
    if form.family >= 2:
        return {"BM": 32, "BN": 32, "num_warps": 2, "num_stages": 2}
    if form.features <= 2:
        return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 16, "num_warps": 4, "num_stages": 2}


def _key_tile(form: Form) -> dict:
    if form.family == 1:
        return {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3 if form.family == 0 else 2}


# Programs that sum coefficients: two for each multiprocessor of an H200. More would only add partial sums to reduce;
# a number of the machine itself would make the rounding depend on the machine.
_PROGRAMS = 264


def _strides(*tensors) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _only(constants: dict, *names: str) -> dict:
    return {name: constants[name] for name in names}


def _on_its_device(launch):
    """Triton launches on the current device: make that the one of the first tensor."""

    @wraps(launch)
    def wrapper(tensor, *args):
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args)

    return wrapper


@_on_its_device
def _run_forward(q, k, v, parameters, keep, scaling: float, form: Form, save: bool):
    """
    Output (B, N, h, d); the packed coefficients, H and U, the last two empty unless `save`.

    `parameters` are three of the basis (absent ones empty), scale_basis, scale_base, and the projector.
    """
    first, second, third, scale, base, projector = parameters
    images, heads, tokens, head_size = q.shape
    rank = projector.shape[-1]
    constants = _constants(q, form, rank, keep)
    m, rp = constants["M"], constants["RP"]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    packed = q.new_empty(heads, 2 * m + 1, tokens, rp)
    _pack[(heads, m + 1, triton.cdiv(tokens, 64))](
        first,
        second,
        scale,
        base,
        projector,
        packed,
        tokens,
        R=rank,
        BLOCK=64,
        **_only(constants, "FAMILY", "K", "M", "RP"),
    )
    out = q.new_empty(images, tokens, heads, head_size)
    hidden = q.new_empty((images, heads, tokens, rp) if save else 0)
    u = q.new_empty((images, heads, rp, constants["DP"]) if save else 0)
    tile = _query_tile(form)
    _forward[(heads * images * triton.cdiv(tokens, tile["BM"]),)](
        q,
        k,
        v,
        packed,
        first,
        second,
        third,
        scale,
        q if keep is None else keep,
        out,
        hidden,
        u,
        *_strides(q, k, v),
        images,
        heads,
        tokens,
        scaling,
        rank,
        SAVE=save,
        **constants,
        **tile,
    )
    return out, packed, hidden, u


@_on_its_device
def _run_backward(d_out, q, k, v, parameters, keep, packed, hidden, u, scaling: float, form: Form):
    """Gradients of q, k and v, (B, N, h, d), and of the parameters; those of absent parameters are empty."""
    first, second, third, scale, _, projector = parameters
    images, heads, tokens, head_size = q.shape
    rank = projector.shape[-1]
    constants = _constants(q, form, rank, keep)
    m, rp = constants["M"], constants["RP"]
    q, k, v, d_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_out))
    visible = q if keep is None else keep
    d_q, d_k, d_v = (q.new_empty(images, tokens, heads, head_size) for _ in range(3))
    d_hidden = torch.empty_like(hidden)
    tile = _query_tile(form)
    tiles = triton.cdiv(tokens, tile["BM"])
    d_u = q.new_empty(images, heads, tiles, rp, constants["DP"], dtype=torch.float32)
    shape = (images, heads, tokens, scaling)
    _backward_queries[(heads * images * tiles,)](
        q,
        k,
        packed,
        first,
        second,
        third,
        scale,
        visible,
        d_out,
        hidden,
        u,
        d_q,
        d_hidden,
        d_u,
        *_strides(q, k, d_out.transpose(1, 2)),
        *shape,
        rank,
        **constants,
        **tile,
    )
    key_tile = _key_tile(form)
    key_tiles = triton.cdiv(tokens, key_tile["BN"])
    chunk = triton.cdiv(images * heads * key_tiles, _PROGRAMS)
    chunks = triton.cdiv(images, chunk)
    partial = q.new_empty(chunks, heads, m + constants["EDGES"] + 1, tokens, rp, dtype=torch.float32)
    _backward_keys[(heads * chunks * key_tiles,)](
        q,
        k,
        v,
        packed,
        first,
        second,
        third,
        scale,
        visible,
        d_hidden,
        d_u,
        d_k,
        d_v,
        partial,
        *_strides(q, k, v),
        *shape,
        chunk,
        tiles,
        rank,
        **constants,
        **key_tile,
    )
    gradients = [torch.empty_like(x) for x in parameters]
    _reduce[(heads, triton.cdiv(tokens * rp, 64))](
        partial,
        first,
        second,
        third,
        scale,
        *gradients,
        chunks,
        heads,
        tokens,
        R=rank,
        BLOCK=64,
        ROWS=16,
        **_only(constants, "FAMILY", "K", "M", "WAVELET", "NUMERATOR", "DENOMINATOR", "EDGES", "RP"),
    )
    return d_q, d_k, d_v, *gradients


def form_of(step) -> Form:
    """The form of a step of the operator (`EdgeFunctions`)."""
    options = {"base": BASE_FUNCTIONS[step.base_fn]}
    if step.family == "fourier":
        options["features"] = 2 * step.grid_size
    elif step.family == "spline":
        options |= {"features": step.grid_size + step.order, "order": step.order, "low": step.low}
        options["slope"] = step.grid_size / (step.high - step.low)
    elif step.family == "wavelet":
        options["wavelet"] = WAVELETS[step.wavelet_type]
    else:
        numerator, denominator = step.rational_order
        options |= {"numerator": numerator + 1, "denominator": denominator}
    return Form(FAMILIES[step.family], **options)


class _FusedAttention(torch.autograd.Function):
    """The kernels with their derivative, for eager PyTorch: cheaper to call than the custom operators."""

    @staticmethod
    def forward(ctx, form, scaling, keep, q, k, v, *parameters):
        save = any(ctx.needs_input_grad)
        out, packed, hidden, u = _run_forward(q, k, v, parameters, keep, scaling, form, save)
        if save:
            ctx.save_for_backward(q, k, v, keep, packed, hidden, u, *parameters)
        ctx.form, ctx.scaling = form, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, keep, packed, hidden, u, *parameters = ctx.saved_tensors
        gradients = _run_backward(d_out, q, k, v, parameters, keep, packed, hidden, u, ctx.scaling, ctx.form)
        gradients = (*(x.transpose(1, 2) for x in gradients[:3]), *gradients[3:])
        return None, None, None, *(x if need else None for x, need in zip(gradients, ctx.needs_input_grad[3:]))


def _register_operators():
    """
    The kernels as custom operators, which torch.compile and CUDA graphs take whole. Registered once per process, also
    where this file is loaded a second time as remote code.
    """
    if hasattr(torch.ops.karat_vit, "attention_v1"):
        return torch.ops.karat_vit.attention_v1

    @torch.library.custom_op("karat_vit::attention_v1", mutates_args=())
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parameters: list[torch.Tensor],
        keep: torch.Tensor | None,
        scaling: float,
        form: list[float],
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return _run_forward(q, k, v, parameters, keep, scaling, Form.from_list(form), save)

    @attention.register_fake
    def _(q, k, v, parameters, keep, scaling, form, save):
        images, heads, tokens, head_size = q.shape
        constants = _constants(q, Form.from_list(form), parameters[5].shape[-1], keep)
        rp, dp = constants["RP"], constants["DP"]
        return (
            q.new_empty(images, tokens, heads, head_size),
            q.new_empty(heads, 2 * constants["M"] + 1, tokens, rp),
            q.new_empty((images, heads, tokens, rp) if save else 0),
            q.new_empty((images, heads, rp, dp) if save else 0),
        )

    @torch.library.custom_op("karat_vit::attention_backward_v1", mutates_args=())
    def attention_backward(
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parameters: list[torch.Tensor],
        keep: torch.Tensor | None,
        packed: torch.Tensor,
        hidden: torch.Tensor,
        u: torch.Tensor,
        scaling: float,
        form: list[float],
    ) -> list[torch.Tensor]:
        form = Form.from_list(form)
        return list(_run_backward(d_out, q, k, v, parameters, keep, packed, hidden, u, scaling, form))

    @attention_backward.register_fake
    def _(d_out, q, k, v, parameters, keep, packed, hidden, u, scaling, form):
        images, heads, tokens, head_size = q.shape
        d_qkv = [q.new_empty(images, tokens, heads, head_size) for _ in range(3)]
        return d_qkv + [torch.empty_like(x) for x in parameters]

    def setup_context(ctx, inputs, output):
        q, k, v, parameters, keep, scaling, form, _ = inputs
        _, packed, hidden, u = output
        ctx.save_for_backward(q, k, v, keep, packed, hidden, u, *parameters)
        ctx.scaling, ctx.form = scaling, form

    def backward(ctx, d_out, *_):
        q, k, v, keep, packed, hidden, u, *parameters = ctx.saved_tensors
        gradients = torch.ops.karat_vit.attention_backward_v1(
            d_out, q, k, v, parameters, keep, packed, hidden, u, ctx.scaling, ctx.form
        )
        d_q, d_k, d_v = (x.transpose(1, 2) for x in gradients[:3])
        return d_q, d_k, d_v, gradients[3:], None, None, None, None

    attention.register_autograd(backward, setup_context=setup_context)
    return torch.ops.karat_vit.attention_v1


_attention = _register_operators()


def fused_attention(q, k, v, parameters, keep, scaling: float, form: Form) -> torch.Tensor:
    """
    KArAt attention of phi1_w2.

    Args:
        q, k, v: (B, h, N, d), of one dtype, fp32, fp16 or bf16; any strides.
        parameters: three tensors of the basis, the absent ones empty, scale_basis, scale_base, (h, r, N) each with what
            a family needs between h and r, and the projector (h, N, r).
        keep: boolean (B, N), or `None`: keys that are False contribute nothing.
        scaling: factor of the scores.
        form: of the step, from `form_of`.

    Returns:
        (B, h, N, d), laid out as (B, N, h, d), in the dtype of `q`.
    """
    if torch.compiler.is_compiling():
        out = _attention(q, k, v, list(parameters), keep, scaling, form.to_list(), torch.is_grad_enabled())[0]
    else:
        out = _FusedAttention.apply(form, scaling, keep, q, k, v, *parameters)
    return out.transpose(1, 2)
