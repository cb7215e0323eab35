# SPDX-License-Identifier: Apache-2.0
"""
Fused Triton kernels of phi1_w2 attention, for every basis.

    x = scaling * q k^T,    H = Phi(x),    U = W^T v,    out = H U

Families that are linear in their coefficients have M features F_m (Fourier: cos x, sin x, cos 2x, ...; B-spline: B_0,
B_1, ...), and so has the base function; then H = sum_m F_m(x) C_m^T, on the matrix units. Wavelets and rational
functions are evaluated per score and output. Scores and features live in registers: device memory sees (B, h, N, r) at
most. The backward pass of the former recomputes the scores twice: once per query tile for dq, once per key tile for dk
and the parameters, whose gradients are summed over a chunk of images in registers, written as one partial sum per
chunk, and reduced. That of the latter, where every function of every score counts, evaluates them once: dq grows from
one tile of keys to the next in device memory. No atomics: two runs give equal bits.

Shapes: B images, h heads, N tokens, d head size, r rank; RP is r and DP is d, padded to a power of two of at least 16.
Importing this file needs Triton; `attention.py` goes without it. With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import hashlib
import os
from dataclasses import dataclass, fields
from functools import cache, wraps
from itertools import accumulate
from pathlib import Path

import torch


try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.runtime.driver import driver
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

# Numbers that change from batch to batch are no reason to compile anew, as Triton would for 1 and for multiples of 16.
_COUNTS = (
    "B",
    "H",
    "N",
    "PARTS",
    "CHUNK",
    "FIRST",
    "TILES",
    "END",
    "AREA",
    "CHUNKS",
    "REST_CHUNKS",
    "W_CHUNKS",
    "REST",
    "KEY_PARTS",
    "QUERY_PARTS",
    "SIZE",
)
_kernel = triton.jit(do_not_specialize=_COUNTS)


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
def _flipped(x, sign):
    """x, negated where `sign` is negative."""
    bits = x.to(tl.int32, bitcast=True) ^ (sign.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _signed(x, sign):
    """x times -1, 0 or 1, as `sign` is negative, zero or positive: |sign| has derivative 0 at 0, as in PyTorch."""
    return tl.where(sign == 0.0, 0.0, _flipped(x, sign))


@triton.constexpr_function
def _root(j, order):
    """What the j-th truncated power of a cardinal B-spline is of: its binomial / order!, to the power 1 / order."""
    # Without `math`: inductor, which writes this function into its own code, would not import it there.
    binomial, factorial = 1, 1
    for i in range(j):
        binomial = binomial * (order + 1 - i) // (i + 1)
    for i in range(2, order + 1):
        factorial *= i
    return (binomial / factorial) ** (1 / order)


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
        # How far from the middle of its support, in intervals; positive where it rises.
        z = (i + LOW * SLOPE - (ORDER - 1) / 2) - x * SLOPE
        # Beyond the middle all further terms are zero.
        for j in tl.static_range((ORDER + 2) // 2):
            rest = tl.maximum(_root(j, ORDER) * ((ORDER + 1) / 2 - j) - _root(j, ORDER) * tl.abs(z), 0.0)
            power = _power(rest, ORDER - 1)
            slope = (_root(j, ORDER) * ORDER * SLOPE) * power
            if ORDER == 1:
                # The derivative of a ramp is a step, also where rest^0 is 1.
                slope = tl.where(rest > 0.0, slope, 0.0)
            if j == 0:
                value = power * rest
                derivative = slope
            elif j % 2 == 1:
                value -= power * rest
                derivative -= slope
            else:
                value += power * rest
                derivative += slope
        derivative = _flipped(derivative, z)
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
    that exp(-x~^2 / 2) = 2^(-t^2) takes one instruction after the square; for Meyer's, of sin(pi x~), pi.
    """
    if WAVELET <= 2:
        unit: tl.constexpr = 0.8493218002880191
    elif WAVELET == 3:
        unit: tl.constexpr = 3.141592653589793
    else:
        unit: tl.constexpr = 1.0
    return unit


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
    elif WAVELET == 3:  # meyer: sin(pi |x~|) cos(nu(2 |x~| - 1)), of which nothing is left beyond 1, where nu is pi / 2
        a = tl.abs(t)
        v = tl.minimum(tl.maximum(0.6366197723675814 * a - 1.0, 0.0), 1.0)
        square = v * v
        # The derivative of nu by t is 140 (v (1 - v))^3.
        nu = 1.5707963267948966 * (square * square) * (35.0 + v * (-84.0 + v * (70.0 - 20.0 * v)))
        w = v - square
        sin = _sin(a, FAST)
        cos_nu = _cos(nu, FAST)
        derivative = _cos(a, FAST) * cos_nu - (sin * _sin(nu, FAST)) * (140.0 * w * w * w)
        return sin * cos_nu, _signed(derivative, t)
    else:  # shannon
        y = t * t
        near = y < 0.0625
        # The fast instruction may divide by zero: nobody sees the outcome.
        inverse = _reciprocal(t if FAST else tl.where(near, 1.0, t), FAST)
        value = _sin(t, FAST) * inverse
        derivative = (_cos(t, FAST) - value) * inverse
        series = 1.0 - y * (0.16666666666666666 - y * (0.008333333333333333 - y * 0.0001984126984126984))
        slope = t * (
            -0.3333333333333333 + y * (0.03333333333333333 - y * (0.0011904761904761906 - y * 2.2045855379188714e-05))
        )
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
        slope = value if j == COUNT - 2 else slope * x + value
        value = value * x + tl.load(ptr + j * step)
    return value, slope


@triton.jit
def _powers(x, weight, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """weight * x^FIRST and the next COUNT - 1 powers: by even ones, so that no product waits for all those before."""
    square = x * x
    even = tl.full(x.shape, 1.0, tl.float32)
    odd = weight * x
    powers = ()
    for j in tl.static_range(FIRST + COUNT):
        if j > 0 and j % 2 == 0:
            even = even * square
        if j >= FIRST:
            powers = powers + ((weight if j % 2 == 0 else odd) * even,)
    return powers


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
        return value, reciprocal, _signed(value, q), p_slope, q_slope


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
    """scale * basis(x) for one output of a family that is not linear in its parameters."""
    if FAMILY == 2:
        value, _ = _wavelet(x * tl.load(ptr + 2 * step) + tl.load(ptr + step), WAVELET, FAST)
        return tl.load(ptr) * value
    else:
        value, _, _, _, _ = _rational(x, ptr, step, NUMERATOR, DENOMINATOR, FAST)
        return value


@triton.jit
def _add_row_sums(total, values, chosen):
    """Add the sums of the rows of `values` to one column of `total`, where `chosen`, (1, RP), is 1."""
    return total + tl.sum(values, axis=1)[:, None] * chosen


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


@_kernel
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
    PARTS,
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
    U = W^T v of one image, head and part of the keys, (RP, DP), or, beyond the B x H x PARTS programs for that, the
    parameters as the other kernels read them, zero beyond N and R:

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
        at = (((b * H + head) * PARTS + part) * RP + r[:, None]) * DP + columns[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty))


@_kernel
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
    FIRST,
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
    SAVE: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
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
    d_out_ptr,
    hidden_ptr,
    u_ptr,
    d_hidden_ptr,
    d_u_ptr,
    o_b,
    o_h,
    o_n,
    B,
    H,
    N,
    PARTS,
    NP: tl.constexpr,
    EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    tl.store(d_u_ptr + (own * PARTS + part) * RP * DP + square, d_u.to(d_u_ptr.dtype.element_ty))


@_kernel
def _backward_queries(
    q_ptr,
    k_ptr,
    packed_ptr,
    keep_ptr,
    d_hidden_ptr,
    d_q_ptr,
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
    FIRST,
    TILES,
    NP: tl.constexpr,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
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
    q_ptr,
    k_ptr,
    packed_ptr,
    keep_ptr,
    d_hidden_ptr,
    d_k_ptr,
    partial_ptr,
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
    CHUNK,
    FIRST,
    TILES,
    END,
    AREA,
    NP: tl.constexpr,
    FAMILY: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ORDER: tl.constexpr,
    LOW: tl.constexpr,
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


@triton.jit
def _add_edges(
    x,
    gradient,
    d_x,
    sums,
    edges_ptr,
    chosen,
    step,
    FAMILY: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """Add what output p has for dx, (BN, BM), and for the sums of its parameters, each (BN, RP)."""
    if FAMILY == 2:
        inverse = tl.load(edges_ptr + 2 * step)
        t = x * inverse + tl.load(edges_ptr + step)
        value, derivative = _wavelet(t, WAVELET, FAST)
        moved = gradient * derivative
        d_x += (tl.load(edges_ptr) * inverse) * moved
        added = (gradient * value, moved, moved * t)
    else:
        _, reciprocal, signed, p_slope, q_slope = _rational(x, edges_ptr, step, NUMERATOR, DENOMINATOR, FAST)
        weight = gradient * reciprocal
        lower = -weight * signed
        d_x += weight * p_slope
        d_x += lower * q_slope
        added = _powers(x, weight, 0, NUMERATOR) + _powers(x, lower, 1, DENOMINATOR)
    grown = ()
    for j in tl.static_range(EDGES):
        grown = grown + (_add_row_sums(sums[j], added[j], chosen),)
    return d_x, grown


@_kernel
def _backward_edges(
    q_ptr,
    k_ptr,
    packed_ptr,
    edges_ptr,
    keep_ptr,
    d_hidden_ptr,
    d_q_ptr,
    d_k_ptr,
    partial_ptr,
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
    CHUNK,
    KEY_PARTS,
    QUERY_PARTS,
    NP: tl.constexpr,
    R: tl.constexpr,
    FAMILY: tl.constexpr,
    M: tl.constexpr,
    WAVELET: tl.constexpr,
    NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr,
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
                        x,
                        gradient,
                        d_x,
                        edge_sums,
                        own_edges + p * NP,
                        chosen,
                        R * NP,
                        FAMILY,
                        WAVELET,
                        NUMERATOR,
                        DENOMINATOR,
                        EDGES,
                        FAST,
                    )
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
    v_ptr,
    packed_ptr,
    keep_ptr,
    d_u_ptr,
    d_v_ptr,
    partial_ptr,
    v_b,
    v_h,
    v_n,
    B,
    H,
    N,
    CHUNK,
    NP: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


@triton.jit
def _total(
    partial_ptr,
    first,
    step,
    chunks,
    most,
    inside,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """
    The sum over the chunks of what lies at `first`, `first + step`, ..., for each of a block of entries, which have
    their own steps and numbers of chunks, at most `most`.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, most, ROWS):
        chunk = start + tl.arange(0, ROWS)
        mask = (chunk[:, None] < chunks[None, :]) & inside[None, :]
        at = first[None, :] + chunk[:, None].to(tl.int64) * step[None, :]
        total += tl.sum(tl.load(partial_ptr + at, mask=mask, other=0.0), axis=0)
    return total


@_kernel
def _reduce(
    partial_ptr,
    w_partial_ptr,
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
    REST_CHUNKS,
    W_CHUNKS,
    REST,
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
    tiles = {name: dict(zip(("BM", "BN", "num_warps", "num_stages"), tile)) for name, tile in tiles.items()}
    return tiles | {
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
            names = globals()[name.removesuffix("_rest")].arg_names
            own_constants = {key: value for key, value in constants.items() if key in names}
            # Said, because Triton 3.9 warns of its default, and 3.10 will have another.
            self.options[name] = own_constants | options | {"enable_fp_fusion": True}

    def launches(self, name: str, side: str, tokens: int, whole: bool) -> list[tuple[str, int, int]]:
        """
        How `tokens` are shared out among tiles: (name of the options, first token, tiles) of each launch. Unless
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
                    tile[max(("BN", "BM"), key=tile.get)] //= 2


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
        arguments = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        if self.watched:
            binary[grid](*arguments, *constants)
        else:
            none = None, None, None  # Nothing for hooks, and no hooks.
            binary.run(*grid, self.stream, binary.function, binary.packed_metadata, *none, *arguments, *constants)


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
    """For U or dU, (B, h, RP, DP), in one part or more."""
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
    tensors = (d_out, hidden, u, d_hidden, d_u)
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
        ranges = (size, key_parts, query_parts)
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
    The kernels as operators, for torch.compile and what records through it. Inductor looks into them and launches the
    kernels itself; Triton's interpreter, which has nothing that could be traced, runs them whole.

    They are named after the text of this file, for which they are registered once in a process: it may be loaded a
    second time, or in another version, as remote code; and PyTorch keeps what it compiled by the names of operators.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
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


def fused_attention(q, k, v, parameters, keep, scaling: float, form: Form) -> torch.Tensor:
    """
    KArAt attention of phi1_w2.

    Args:
        q, k, v: (B, h, N, d), of one dtype, fp32, fp16 or bf16; any strides.
        parameters: fp32; three of the basis, absent ones empty, scale_basis, scale_base, (h, r, N) each with what
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
