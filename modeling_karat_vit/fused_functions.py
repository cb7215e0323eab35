# SPDX-License-Identifier: Apache-2.0
"""
Device functions of the fused kernels: the basis functions and their derivatives, for tiles of scores in registers.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # Transformers demands of remote code what it imports outside of a `try`.
    raise

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


@triton.jit
def _fast(x, NAME: tl.constexpr):
    # The fast instructions reduce their argument themselves, to an absolute error of about |x| 2^-24: at |x| = 1e3 far
    # below what half precision resolves. Full precision takes the accurate functions.
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sin(x, FAST: tl.constexpr):
    return _fast(x, "sin") if FAST else tl.sin(x)


@triton.jit
def _cos(x, FAST: tl.constexpr):
    return _fast(x, "cos") if FAST else tl.cos(x)


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    return _fast(x, "ex2") if FAST else tl.exp2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    return _fast(x, "rcp") if FAST else 1.0 / x


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
    x, state,
    FAMILY: tl.constexpr, K: tl.constexpr, ORDER: tl.constexpr, LOW: tl.constexpr, SLOPE: tl.constexpr,
    BASE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
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
    x, ptr, step,
    FAMILY: tl.constexpr, WAVELET: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
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
def _add_edges(
    x, gradient, d_x, sums,
    edges_ptr,
    chosen, step,
    FAMILY: tl.constexpr, WAVELET: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr,
    EDGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _total(
    partial_ptr,
    first, step, chunks, most, inside,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
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
