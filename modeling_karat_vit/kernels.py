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

import math
import os
from dataclasses import dataclass, fields
from functools import cache, wraps

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
def _exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


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
        t = x * SLOPE + (ORDER - i - LOW * SLOPE)
        falling = t > (ORDER + 1) / 2
        t = tl.minimum(t, ORDER + 1 - t)
        value = tl.zeros_like(x)
        derivative = tl.zeros_like(x)
        factor = 1.0
        for j in tl.static_range(1, ORDER + 1):
            factor = factor / j
        # t is at most (ORDER + 1) / 2 now: later terms are zero.
        for j in tl.static_range((ORDER + 2) // 2):
            rest = tl.maximum(t - j, 0.0)
            power = factor * _power(rest, ORDER - 1)
            value += power * rest
            if ORDER == 1:
                # The derivative of a ramp is a step, also where rest^0 is 1.
                power = tl.where(rest > 0.0, power, 0.0)
            derivative += power
            factor = -factor * (ORDER + 1 - j) / (j + 1)
        derivative = derivative * tl.where(falling, -SLOPE * ORDER, SLOPE * ORDER)
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
def _unit(WAVELET: tl.constexpr):
    """
    What x~ is multiplied by before `_wavelet` sees it: for the wavelets with a bell the square root of log2(e) / 2, so
    that exp(-x~^2 / 2) = 2^(-t^2) takes one instruction after the square.
    """
    return 0.8493218002880191 if WAVELET <= 2 else 1.0


@triton.jit
def _wavelet(t, WAVELET: tl.constexpr, FAST: tl.constexpr):
    """psi and its derivative at t, in units of `_unit`; Shannon's without its window."""
    if WAVELET == 0:  # mexican_hat: 0.8673 (x~^2 - 1) bell
        bell = _exp2(-t * t, FAST)
        factor = 1.2023678546086178 * (t * t) - 0.8673250705840776
        return factor * bell, (t * bell) * (2.4047357092172357 - 1.3862943611198906 * factor)
    elif WAVELET == 1:  # morlet: cos(5 x~) bell
        bell = _exp2(-t * t, FAST)
        angle = 5.887050112577373 * t
        value = _cos(angle, FAST) * bell
        return value, -5.887050112577373 * (_sin(angle, FAST) * bell) - 1.3862943611198906 * (t * value)
    elif WAVELET == 2:  # dog: x~ bell
        bell = 1.1774100225154747 * _exp2(-t * t, FAST)
        return t * bell, bell - 1.3862943611198906 * (t * t) * bell
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
def _horner(x, ptr, step, COUNT: tl.constexpr):
    """c_0 + ... + c_(COUNT-1) x^(COUNT-1) and its derivative, c_j at ptr + j * step."""
    value = tl.load(ptr + (COUNT - 1) * step) + tl.zeros_like(x)
    slope = tl.zeros_like(x)
    for j in tl.static_range(COUNT - 2, -1, -1):
        slope = slope * x + value
        value = value * x + tl.load(ptr + j * step)
    return value, slope


@triton.jit
def _rational(x, ptr, step, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, FAST: tl.constexpr):
    """
    P / (1 + |Q|), the reciprocal of the denominator, the value with the sign of Q, and the derivatives of P and Q: the
    derivative of the whole is (P' - signed value * Q') * reciprocal.
    """
    p, p_slope = _horner(x, ptr, step, NUMERATOR)
    if DENOMINATOR == 0:
        return p, tl.full(x.shape, 1.0, tl.float32), tl.zeros_like(x), p_slope, tl.zeros_like(x)
    else:
        q, q_slope = _horner(x, ptr + NUMERATOR * step, step, DENOMINATOR)
        q_slope = q + x * q_slope
        q = q * x
        reciprocal = _reciprocal(1.0 + tl.abs(q), FAST)
        value = p * reciprocal
        signed = tl.where(q > 0.0, value, tl.where(q < 0.0, -value, 0.0))
        return value, reciprocal, signed, p_slope, q_slope


@triton.jit
def _edge(
    x,
    ptr,
    step,
    FAMILY: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """scale * basis(x) and its derivative for one output of a family that is not linear in its parameters."""
    if FAMILY == 2:
        scale = tl.load(ptr)
        inverse = tl.load(ptr + 2 * step)
        value, derivative = _wavelet(x * inverse + tl.load(ptr + step), WAVELET, FAST)
        return scale * value, (scale * inverse) * derivative
    else:
        value, reciprocal, signed, p_slope, q_slope = _rational(x, ptr, step, NUMERATOR, DENOMINATOR, FAST)
        return value, (p_slope - signed * q_slope) * reciprocal


@triton.jit
def _add_row_sums(total, values, chosen):
    """Add the sums of the rows of `values` to one column of `total`, where `chosen`, (1, RP), is 1."""
    return total + tl.sum(values, axis=1)[:, None] * chosen


@triton.jit
def _column(matrix, p, r):
    """Column p of `matrix`, (rows, RP), as (rows, 1)."""
    return tl.sum(tl.where(r[None, :] == p, matrix.to(tl.float32), 0.0), axis=1)[:, None]


@triton.jit
def _tile(ptr, rows, row_stride, columns, N, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of a matrix (N, D), zero outside."""
    inside = rows[:, None] < N
    if D != DP:
        inside = inside & (columns[None, :] < D)
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _visible(keep_ptr, b, keys, N):
    """Which keys are not masked."""
    return tl.load(keep_ptr + b * N + keys, mask=keys < N, other=0) != 0


@triton.jit
def _pack(
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    base_ptr,
    w_ptr,
    packed_ptr,
    edges_ptr,
    head,
    m,
    block,
    N,
    NP: tl.constexpr,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    EDGES: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


@triton.jit
def _prepare(
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    base_ptr,
    w_ptr,
    v_ptr,
    keep_ptr,
    packed_ptr,
    edges_ptr,
    u_ptr,
    v_b,
    v_h,
    v_n,
    B,
    H,
    N,
    NP: tl.constexpr,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    U = W^T v of one image and head, (RP, DP), or, beyond the B x H programs for that, the parameters as the other
    kernels read them, zero beyond N and R:

    * `packed` (h, 2M + 1, NP, RP), in the dtype of the scores: the M coefficients with their scales, W, and the M
      coefficients of the derivative;
    * `edges` (h, EDGES, R, NP), fp32: of wavelets scale * amplitude * window, -tau / s and 1 / s, both in units of
      `_unit`; of rational functions numerators with their scales, and denominators.
    """
    pid = tl.program_id(0)
    if pid >= B * H:
        pid -= B * H
        blocks: tl.constexpr = NP // BLOCK
        parts: tl.constexpr = M + 1 + EDGES
        _pack(
            first_ptr,
            second_ptr,
            third_ptr,
            scale_ptr,
            base_ptr,
            w_ptr,
            packed_ptr,
            edges_ptr,
            pid // (parts * blocks),
            (pid // blocks) % parts,
            pid % blocks,
            N,
            NP,
            FAMILY,
            K,
            M,
            WAVELET,
            NUMERATOR,
            EDGES,
            R,
            RP,
            BLOCK,
        )
    else:
        dtype = v_ptr.dtype.element_ty
        head = pid // B
        b = (pid % B).to(tl.int64)
        columns = tl.arange(0, DP)
        r = tl.arange(0, RP)
        u = tl.zeros([RP, DP], tl.float32)
        for start in range(0, N, BLOCK):
            keys = start + tl.arange(0, BLOCK)
            v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
            if HAS_KEEP:
                v = tl.where(_visible(keep_ptr, b, keys, N)[:, None], v, 0.0).to(dtype)
            inside = (keys[:, None] < N) & (r[None, :] < R)
            w = tl.load(w_ptr + (head * N + keys[:, None]) * R + r[None, :], mask=inside, other=0.0)
            u = tl.dot(tl.trans(w.to(dtype)), v, u, input_precision=PRECISION)
        tl.store(u_ptr + ((b * H + head) * RP + r[:, None]) * DP + columns[None, :], u.to(dtype))


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    packed_ptr,
    edges_ptr,
    keep_ptr,
    u_ptr,
    out_ptr,
    hidden_ptr,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    B,
    H,
    N,
    scaling,
    NP: tl.constexpr,
    R: tl.constexpr,
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
    """Output of BM queries of one image and head; with SAVE also H, which the backward pass wants."""
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
            for p in range(R):
                own_edges = edges_ptr + p * NP + keys[None, :]
                values, _ = _edge(x, own_edges, R * NP, FAMILY, WAVELET, NUMERATOR, DENOMINATOR, FAST)
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


@triton.jit
def _backward_queries_tile(
    q_ptr,
    k_ptr,
    packed_ptr,
    edges_ptr,
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
    b,
    head,
    tile,
    tiles,
    first,
    NP: tl.constexpr,
    R: tl.constexpr,
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
    """dq and dH of one tile of queries, and its share of dU."""
    dtype = q_ptr.dtype.element_ty
    rows = first + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    own = b * H + head
    packed_ptr += (head * (2 * M + 1) + M + 1) * NP * RP
    edges_ptr += head * EDGES * R * NP
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
        if FAMILY >= 2:
            for p in range(R):
                own_edges = edges_ptr + p * NP + keys[None, :]
                _, derivatives = _edge(x, own_edges, R * NP, FAMILY, WAVELET, NUMERATOR, DENOMINATOR, FAST)
                d_x += _column(d_hidden, p, r) * derivatives
        d_q = tl.dot(d_x.to(dtype), k, d_q, input_precision=PRECISION)
    d_q_ptr += ((b * N + rows[:, None]) * H + head) * D + columns[None, :]
    tl.store(d_q_ptr, (d_q * scaling).to(dtype), mask=inside & (columns[None, :] < D))


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    packed_ptr,
    edges_ptr,
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
    NP: tl.constexpr,
    R: tl.constexpr,
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
    TAIL: tl.constexpr,
    TAIL_BN: tl.constexpr,
):
    """dq and dH of BM queries, and their share of dU = H^T d_out."""
    # Heads vary slowest: programs that run together share coefficients, which then stay in the cache.
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    head = pid // (B * tiles)
    b = ((pid // tiles) % B).to(tl.int64)
    tile = pid % tiles
    if TAIL < BM and tile == tiles - 1:
        _backward_queries_tile(
            q_ptr,
            k_ptr,
            packed_ptr,
            edges_ptr,
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
            b,
            head,
            tile,
            tiles,
            tile * BM,
            NP,
            R,
            FAMILY,
            K,
            M,
            ORDER,
            LOW,
            WAVELET,
            NUMERATOR,
            DENOMINATOR,
            EDGES,
            SLOPE,
            BASE,
            FAST,
            PRECISION,
            HAS_KEEP,
            RP,
            D,
            DP,
            TAIL,
            TAIL_BN,
        )
    else:
        _backward_queries_tile(
            q_ptr,
            k_ptr,
            packed_ptr,
            edges_ptr,
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
            b,
            head,
            tile,
            tiles,
            tile * BM,
            NP,
            R,
            FAMILY,
            K,
            M,
            ORDER,
            LOW,
            WAVELET,
            NUMERATOR,
            DENOMINATOR,
            EDGES,
            SLOPE,
            BASE,
            FAST,
            PRECISION,
            HAS_KEEP,
            RP,
            D,
            DP,
            BM,
            BN,
        )


@triton.jit
def _backward_keys_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    packed_ptr,
    edges_ptr,
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
    head,
    chunk,
    first,
    NP: tl.constexpr,
    R: tl.constexpr,
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
    KEPT: tl.constexpr,
):
    """dk and dv of one tile of keys in a chunk of images, and the chunk's sums for these keys."""
    dtype = q_ptr.dtype.element_ty
    keys = first + tl.arange(0, BN)
    columns = tl.arange(0, DP)
    r = tl.arange(0, RP)
    edge = keys[:, None] * RP + r[None, :]
    inside = keys[:, None] < N
    packed_ptr += head * (2 * M + 1) * NP * RP
    edges_ptr += head * EDGES * R * NP + keys[:, None]
    partial_ptr += (chunk * H + head).to(tl.int64) * (M + EDGES + 1) * N * RP
    w = tl.load(packed_ptr + M * NP * RP + edge)
    slopes = ()
    if KEPT:
        for m in tl.static_range(M):
            slopes = slopes + (tl.load(packed_ptr + (M + 1 + m) * NP * RP + edge),)
    sums = ()
    # M sums for the features, and one for each parameter of wavelets and rational functions.
    for _ in tl.static_range(M + EDGES):
        sums = sums + (tl.zeros([BN, RP], tl.float32),)
    d_w = tl.zeros([BN, RP], tl.float32)
    for image in range(chunk * CHUNK, tl.minimum(B, (chunk + 1) * CHUNK)):
        b = tl.cast(image, tl.int64)
        own = b * H + head
        k = _tile(k_ptr + b * k_b + head * k_h, keys, k_n, columns, N, D, DP)
        v = _tile(v_ptr + b * v_b + head * v_h, keys, v_n, columns, N, D, DP)
        if HAS_KEEP:
            visible = _visible(keep_ptr, b, keys, N)
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
                coefficients = slopes[m] if KEPT else tl.load(packed_ptr + (M + 1 + m) * NP * RP + edge)
                d_x += derivative * tl.dot(coefficients, tl.trans(d_hidden), input_precision=PRECISION)
                if HAS_KEEP:
                    feature = tl.where(visible[:, None], feature, 0.0)
                new = new + (tl.dot(feature.to(dtype), d_hidden, sums[m], input_precision=PRECISION),)
            if FAMILY >= 2:
                edge_sums = ()
                for j in tl.static_range(EDGES):
                    edge_sums = edge_sums + (sums[M + j],)
                for p in range(R):
                    column = tl.load(d_hidden_ptr + (own * N + rows) * RP + p, mask=rows < N, other=0.0)
                    gradient = column.to(tl.float32)[None, :]
                    if HAS_KEEP:
                        gradient = tl.where(visible[:, None], gradient, 0.0)
                    at_p = edges_ptr + p * NP
                    added = ()
                    if FAMILY == 2:
                        inverse = tl.load(at_p + 2 * R * NP)
                        t = x * inverse + tl.load(at_p + R * NP)
                        value, derivative = _wavelet(t, WAVELET, FAST)
                        moved = gradient * derivative
                        d_x += (tl.load(at_p) * inverse) * moved
                        added = (gradient * value, moved, moved * t)
                    else:
                        _, reciprocal, signed, p_slope, q_slope = _rational(
                            x, at_p, R * NP, NUMERATOR, DENOMINATOR, FAST
                        )
                        power = gradient * reciprocal
                        lower = -power * signed
                        d_x += power * p_slope
                        d_x += lower * q_slope
                        for _ in tl.static_range(NUMERATOR):
                            added = added + (power,)
                            power = power * x
                        for _ in tl.static_range(DENOMINATOR):
                            lower = lower * x
                            added = added + (lower,)
                    chosen = tl.where(r[None, :] == p, 1.0, 0.0)
                    grown = ()
                    for j in tl.static_range(EDGES):
                        grown = grown + (_add_row_sums(edge_sums[j], added[j], chosen),)
                    edge_sums = grown
                new = new + edge_sums
            sums = new
            d_k = tl.dot(d_x.to(dtype), q, d_k, input_precision=PRECISION)
        at = ((b * N + keys[:, None]) * H + head) * D + columns[None, :]
        store = inside & (columns[None, :] < D)
        if HAS_KEEP:
            d_k = tl.where(visible[:, None], d_k, 0.0)
            d_v = tl.where(visible[:, None], d_v, 0.0)
        tl.store(d_v_ptr + at, d_v.to(dtype), mask=store)
        tl.store(d_k_ptr + at, (d_k * scaling).to(dtype), mask=store)
    for m in tl.static_range(M + EDGES):
        tl.store(partial_ptr + m * N * RP + edge, sums[m], mask=inside)
    tl.store(partial_ptr + (M + EDGES) * N * RP + edge, d_w, mask=inside)


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    packed_ptr,
    edges_ptr,
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
    TAIL_CHUNK,
    TILES,
    NP: tl.constexpr,
    R: tl.constexpr,
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
    TAIL: tl.constexpr,
    KEPT: tl.constexpr,
):
    """dk and dv of BN keys in a chunk of images, and the chunk's sums for the coefficients and W of these keys."""
    pid = tl.program_id(0)
    chunks = tl.cdiv(B, CHUNK)
    programs = H * chunks * TILES
    if pid < programs:
        head = pid // (chunks * TILES)
        chunk = (pid // TILES) % chunks
        first = (pid % TILES) * BN
        _backward_keys_tile(
            q_ptr,
            k_ptr,
            v_ptr,
            packed_ptr,
            edges_ptr,
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
            head,
            chunk,
            first,
            NP,
            R,
            FAMILY,
            K,
            M,
            ORDER,
            LOW,
            WAVELET,
            NUMERATOR,
            DENOMINATOR,
            EDGES,
            SLOPE,
            BASE,
            FAST,
            PRECISION,
            HAS_KEEP,
            RP,
            D,
            DP,
            BM,
            BN,
            KEPT,
        )
    elif TAIL < BN:
        # The last tile of keys is smaller, and takes more images for that.
        chunks = tl.cdiv(B, TAIL_CHUNK)
        head = (pid - programs) // chunks
        chunk = (pid - programs) % chunks
        first = TILES * BN
        _backward_keys_tile(
            q_ptr,
            k_ptr,
            v_ptr,
            packed_ptr,
            edges_ptr,
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
            TAIL_CHUNK,
            U_TILES,
            head,
            chunk,
            first,
            NP,
            R,
            FAMILY,
            K,
            M,
            ORDER,
            LOW,
            WAVELET,
            NUMERATOR,
            DENOMINATOR,
            EDGES,
            SLOPE,
            BASE,
            FAST,
            PRECISION,
            HAS_KEEP,
            RP,
            D,
            DP,
            BM,
            TAIL,
            KEPT,
        )


@triton.jit
def _total(
    partial_ptr,
    m,
    head,
    at,
    chunks,
    SLOTS,
    H,
    N,
    COUNT: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum m of COUNT over the chunks, of which each entry of `at` has its own number, `chunks`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SLOTS, ROWS):
        chunk = start + tl.arange(0, ROWS)
        begin = ((chunk * H + head).to(tl.int64) * COUNT + m) * N * RP
        mask = chunk[:, None] < chunks[None, :]
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
    SLOTS,
    CHUNKS,
    TAIL_CHUNKS,
    TAIL_FIRST,
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
    blocks = tl.cdiv(N * RP, BLOCK)
    head = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = at // RP
    r = at % RP
    inside = (n < N) & (r < R)
    chunks = tl.where(inside, tl.where(n < TAIL_FIRST, CHUNKS, TAIL_CHUNKS), 0)
    edge = r * N + n
    size = R * N
    scale = tl.load(scale_ptr + head * size + edge, mask=inside, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    for m in tl.static_range(M):
        total = _total(partial_ptr, m, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
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
        total = window * _total(partial_ptr, M, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
        amplitude = tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_first_ptr + own, total * scale, mask=inside)
        d_scale += total * amplitude
        # x~ = (x - tau) / s moves with tau as -1/s, and with s as -x~/s; the sums are in units of `_unit`.
        inner = -scale * amplitude * window / tl.load(third_ptr + own, mask=inside, other=1.0).to(tl.float32)
        total = _total(partial_ptr, M + 1, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
        tl.store(d_second_ptr + own, total * inner * _unit(WAVELET), mask=inside)
        total = _total(partial_ptr, M + 2, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
        tl.store(d_third_ptr + own, total * inner, mask=inside)
    elif FAMILY == 3:
        for j in tl.static_range(NUMERATOR):
            total = _total(partial_ptr, M + j, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
            own = (head * NUMERATOR + j) * size + edge
            d_scale += total * tl.load(first_ptr + own, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_first_ptr + own, total * scale, mask=inside)
        for j in tl.static_range(DENOMINATOR):
            total = _total(partial_ptr, M + NUMERATOR + j, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
            # The scale is in these sums already.
            tl.store(d_second_ptr + (head * DENOMINATOR + j) * size + edge, total, mask=inside)
    if M == K:
        # There is no base function, and its scale may be trainable all the same.
        tl.store(d_base_ptr + head * size + edge, tl.zeros_like(scale), mask=inside)
    total = _total(partial_ptr, COUNT - 1, head, at, chunks, SLOTS, H, N, COUNT, RP, BLOCK, ROWS)
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


def _tiles(form: Form, tokens: int) -> dict[str, dict]:
    """
    What measured best on an H100 at 197 tokens and heads of 64: mostly one warp per 16 rows.

    In the backward pass of many features the last tile of 64 rows is as small as the rest of the tokens allows. With
    few of them, and in the forward pass, where the warps would repeat each other's features, that does not pay.
    """
    if form.family >= FAMILIES["wavelet"]:
        forward, queries, keys = (32, 16, 1, 2), (32, 32, 2, 2), (32, 16, 1, 2)
    elif form.features <= 2:
        forward, queries, keys = (64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)
    elif form.family == FAMILIES["fourier"]:
        forward, queries, keys = (64, 16, 4, 3), (64, 16, 4, 3), (32, 64, 4, 3)
    else:
        forward, queries, keys = (64, 16, 4, 3), (64, 16, 4, 3), (16, 64, 4, 2)
    tiles = {"_forward": forward, "_backward_queries": queries, "_backward_keys": keys}
    tiles = {name: dict(zip(("BM", "BN", "num_warps", "num_stages"), tile)) for name, tile in tiles.items()}
    rest = max(16, triton.next_power_of_2((tokens - 1) % 64 + 1))
    for name, side in (("_backward_queries", "BM"), ("_backward_keys", "BN")):
        tiles[name]["TAIL"] = rest if form.features > 2 and tiles[name][side] == 64 else tiles[name][side]
    tiles["_backward_queries"]["TAIL_BN"] = 64
    return tiles


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
        self.tiles = _tiles(form, tokens)
        self._fit(dtype.itemsize, _loadable(device))
        own = self.tiles | {"_prepare": {"BLOCK": _PADDING}, "_reduce": {"BLOCK": 64, "ROWS": 16}}
        self.options = {}
        for kernel in (_prepare, _forward, _backward_queries, _backward_keys, _reduce):
            name = kernel.fn.__name__
            known = {key: value for key, value in constants.items() if key in kernel.arg_names}
            self.options[name] = known | own[name]

    def _fit(self, itemsize: int, room: int) -> None:
        """Fewer stages, and no smaller last tile of queries, where what is loaded would take more than `room` bytes."""
        rows, columns = self.features * self.rank_padded, self.head_size_padded
        queries, keys = self.tiles["_backward_queries"], self.tiles["_backward_keys"]
        for tile in (self.tiles["_forward"], queries):
            while tile["num_stages"] > 1 and tile["num_stages"] * tile["BN"] * (rows + columns) * itemsize > room:
                tile["num_stages"] -= 1
        if queries["num_stages"] * queries["TAIL_BN"] * (rows + columns) * itemsize > room:
            queries["TAIL"] = queries["BM"]
        kept = keys["BN"] * rows * itemsize
        keys["KEPT"] = kept <= room
        moved = keys["BM"] * (self.rank_padded + columns) * itemsize + (0 if keys["KEPT"] else kept)
        while keys["num_stages"] > 1 and keys["num_stages"] * moved > room:
            keys["num_stages"] -= 1


def _kind(tensors, *sizes):
    """What Triton compiles anew for, beyond the plan: strides, sizes, and which tensors are aligned."""
    return (*sizes, *(x.stride() for x in tensors), *(x.data_ptr() % 16 == 0 for x in tensors))


_compiled = {}


def _launch(kernel, programs: int, plan: _Plan, kind: tuple, *arguments) -> None:
    """
    Launch a kernel on the current device. All that it gets follows from its plan and `kind`.

    Triton binds and hashes some forty arguments at each launch, which takes longer than the kernels of a small batch
    run. Here a compiled kernel is kept for each kind of arguments, and launched directly.
    """
    name = kernel.__name__
    grid = (programs, 1, 1)
    if INTERPRET:
        kernel[grid](*arguments, **plan.options[name])
        return
    key = (name, plan, kind)
    found = _compiled.get(key)
    if found is None:
        options = plan.options[name]
        compiled = kernel[grid](*arguments, **options)
        _compiled[key] = compiled, [options[constant] for constant in kernel.arg_names[len(arguments) :]]
    else:
        compiled, constants = found
        compiled[grid](*arguments, *constants)


# Warps of the programs that sum coefficients: eight for each multiprocessor of an H100 or H200, which is what their
# registers allow. More would only add partial sums to reduce; a number of the machine itself would make the rounding
# depend on the machine.
_WARPS = 1056


@cache
def _loadable(device: torch.device) -> int:
    """Bytes of shared memory for what a kernel loads again and again: a little less than half of all."""
    if device.type != "cuda":
        return 100 * 2**10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin * 100 // 227


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _shares(images: int, heads: int, tokens: int, BN: int, TAIL: int, num_warps: int, **_) -> tuple[int, int, int]:
    """
    How the work on keys is shared out: full tiles, and images for a program of a full tile and of a smaller last one, 0
    where there is none.
    """
    programs = max(1, _WARPS // num_warps)
    if TAIL == BN:
        tiles = _cdiv(tokens, BN)
        return tiles, min(images, _cdiv(images * heads * tiles, programs)), 0
    # A tail takes about twice its share of a tile.
    cost = 2 * TAIL / BN
    tiles = tokens // BN
    images_per_unit = images * heads * (tiles + cost) / programs
    tail_chunk = max(1, min(images, int(images_per_unit / cost)))
    return tiles, min(images, math.ceil(images_per_unit)) if tiles else 0, tail_chunk


# Tokens are padded to a multiple of the largest tile of keys, so that nothing masks what `_prepare` wrote.
_PADDING = 64


def _padded(tokens: int) -> int:
    return _cdiv(tokens, _PADDING) * _PADDING


def _on_its_device(launch):
    """Triton launches on the current device: make that the one of the first tensor."""

    @wraps(launch)
    def wrapper(tensor, *args):
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return launch(tensor, *args)
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args)

    return wrapper


@_on_its_device
def _run_forward(q, k, v, parameters, keep, scaling: float, form: Form, save: bool):
    """
    Output (B, N, h, d), and what the backward pass wants: the packed parameters, H and U, H empty unless `save`.

    `parameters` are three of the basis (absent ones empty), scale_basis, scale_base, and the projector.
    """
    images, heads, tokens, head_size = q.shape
    padded = _padded(tokens)
    plan = _Plan(form, parameters[5].shape[-1], head_size, q.dtype, keep is not None, save, tokens, q.device)
    rp = plan.rank_padded
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    packed = q.new_empty(heads, 2 * plan.features + 1, padded, rp)
    edges = q.new_empty(heads, plan.edges, plan.rank, padded, dtype=torch.float32) if plan.edges else packed
    visible = q if keep is None else keep
    kind = _kind((q, k, v, visible, *parameters), q.shape, q.device)
    sizes = (images, heads, tokens)
    u = q.new_empty(images, heads, rp, plan.head_size_padded)
    programs = heads * (images + (plan.features + 1 + plan.edges) * (padded // _PADDING))
    tensors = (*parameters, v, visible, packed, edges, u)
    _launch(_prepare, programs, plan, kind, *tensors, *v.stride()[:3], *sizes)
    out = q.new_empty(images, tokens, heads, head_size)
    hidden = q.new_empty(images, heads, tokens, rp) if save else out
    programs = heads * images * _cdiv(tokens, plan.tiles["_forward"]["BM"])
    tensors = (q, k, packed, edges, visible, u, out, hidden)
    _launch(_forward, programs, plan, kind, *tensors, *q.stride()[:3], *k.stride()[:3], *sizes, scaling)
    return out, packed, edges, hidden, u


@_on_its_device
def _run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling: float, form: Form):
    """Gradients of q, k and v, (B, N, h, d), and of the parameters; those of absent parameters are empty."""
    images, heads, tokens, head_size = q.shape
    plan = _Plan(form, parameters[5].shape[-1], head_size, q.dtype, keep is not None, True, tokens, q.device)
    rp, dp = plan.rank_padded, plan.head_size_padded
    q, k, v, d_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_out))
    visible = q if keep is None else keep
    kind = _kind((q, k, v, d_out, visible, *parameters), q.shape, q.device)
    sizes = (images, heads, tokens)
    q_strides, k_strides = q.stride()[:3], k.stride()[:3]
    d_q, d_k, d_v = (q.new_empty(images, tokens, heads, head_size) for _ in range(3))
    d_hidden = torch.empty_like(hidden)
    batch_stride, row_stride, head_stride, _ = d_out.stride()
    tiles = _cdiv(tokens, plan.tiles["_backward_queries"]["BM"])
    d_u = q.new_empty(images, heads, tiles, rp, dp, dtype=torch.float32)
    tensors = (q, k, packed, edges, visible, d_out, hidden, u, d_q, d_hidden, d_u)
    strides = (*q_strides, *k_strides, batch_stride, head_stride, row_stride)
    _launch(_backward_queries, heads * images * tiles, plan, kind, *tensors, *strides, *sizes, scaling)
    key_tiles, chunk, tail_chunk = _shares(images, heads, tokens, **plan.tiles["_backward_keys"])
    chunks, tail_chunks = (_cdiv(images, x) if x else 0 for x in (chunk, tail_chunk))
    slots = max(chunks, tail_chunks)
    partial = q.new_empty(slots, heads, plan.features + plan.edges + 1, tokens, rp, dtype=torch.float32)
    tensors = (q, k, v, packed, edges, visible, d_hidden, d_u, d_k, d_v, partial)
    strides = (*q_strides, *k_strides, *v.stride()[:3])
    numbers = (*strides, *sizes, scaling, max(chunk, 1), tiles, max(tail_chunk, 1), key_tiles)
    _launch(_backward_keys, heads * (chunks * key_tiles + tail_chunks), plan, kind, *tensors, *numbers)
    # Parameters that a family lacks are empty, and their own gradient.
    gradients = [torch.empty_like(x) if x.numel() else x for x in parameters]
    programs = heads * _cdiv(tokens * rp, 64)
    tail_first = key_tiles * plan.tiles["_backward_keys"]["BN"] if tail_chunk else tokens
    tensors = (partial, *parameters[:4], *gradients)
    _launch(_reduce, programs, plan, kind, *tensors, slots, chunks, tail_chunks, tail_first, heads, tokens)
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
    """The form of a step of the operator (`EdgeFunctions`)."""
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        out, packed, edges, hidden, u = _run_forward(q, k, v, parameters, keep, scaling, Form.from_list(form), save)
        # An operator returns no tensor twice.
        edges = q.new_empty(0) if edges is packed else edges
        return out, packed, edges, hidden if save else q.new_empty(0), u

    @attention.register_fake
    def _(q, k, v, parameters, keep, scaling, form, save):
        images, heads, tokens, head_size = q.shape
        padded = _padded(tokens)
        plan = _Plan(
            Form.from_list(form), parameters[5].shape[-1], head_size, q.dtype, keep is not None, save, tokens, q.device
        )
        rp = plan.rank_padded
        edges = (heads, plan.edges, plan.rank, padded)
        return (
            q.new_empty(images, tokens, heads, head_size),
            q.new_empty(heads, 2 * plan.features + 1, padded, rp),
            q.new_empty(edges, dtype=torch.float32) if plan.edges else q.new_empty(0),
            q.new_empty((images, heads, tokens, rp) if save else 0),
            q.new_empty(images, heads, rp, plan.head_size_padded),
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
        edges: torch.Tensor,
        hidden: torch.Tensor,
        u: torch.Tensor,
        scaling: float,
        form: list[float],
    ) -> list[torch.Tensor]:
        form = Form.from_list(form)
        gradients = _run_backward(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form)
        # An operator returns none of its arguments.
        return [x if x.numel() else torch.empty_like(x) for x in gradients]

    @attention_backward.register_fake
    def _(d_out, q, k, v, parameters, keep, packed, edges, hidden, u, scaling, form):
        images, heads, tokens, head_size = q.shape
        d_qkv = [q.new_empty(images, tokens, heads, head_size) for _ in range(3)]
        return d_qkv + [torch.empty_like(x) for x in parameters]

    def setup_context(ctx, inputs, output):
        q, k, v, parameters, keep, scaling, form, _ = inputs
        _, packed, edges, hidden, u = output
        ctx.save_for_backward(q, k, v, keep, packed, edges, hidden, u, *parameters)
        ctx.scaling, ctx.form = scaling, form

    def backward(ctx, d_out, *_):
        q, k, v, keep, packed, edges, hidden, u, *parameters = ctx.saved_tensors
        gradients = torch.ops.karat_vit.attention_backward_v1(
            d_out, q, k, v, parameters, keep, packed, edges, hidden, u, ctx.scaling, ctx.form
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
        keep: boolean (B or 1, N), or `None`: keys that are False contribute nothing.
        scaling: factor of the scores.
        form: of the step, from `form_of`.

    Returns:
        (B, h, N, d), laid out as (B, N, h, d), in the dtype of `q`.
    """
    parameters = [parameter.contiguous() for parameter in parameters]
    keep = keep if keep is None else keep.expand(q.shape[0], -1).contiguous()
    if torch.compiler.is_compiling():
        out = _attention(q, k, v, parameters, keep, scaling, form.to_list(), torch.is_grad_enabled())[0]
    elif not torch.is_grad_enabled():
        # An autograd function cannot tell, and would save H.
        out = _run_forward(q, k, v, parameters, keep, scaling, form, False)[0]
    else:
        out = _FusedAttention.apply(form, scaling, keep, q, k, v, *parameters)
    return out.transpose(1, 2)
