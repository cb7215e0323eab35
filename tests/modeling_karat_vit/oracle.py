# SPDX-License-Identifier: Apache-2.0
"""
Kolmogorov-Arnold Attention written once more from the paper's equations, one number at a time, in numpy and loops:
what the tests compare with. Nothing of the package is called here but to build the operators to test.

`tensors` are the operator's parameters by name, as arrays, a head's along the first axis and an edge's (p, q) along the
last two.
"""

import math

import numpy as np
import torch
from scipy.interpolate import BSpline

from modeling_karat_vit import KArAtViTConfig
from modeling_karat_vit.karat_operator import KArAtOperator


BASE_FUNCTIONS = {
    "linear": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def wavelet(kind: str, x: float, q: int, inputs: int) -> float:
    """The mother wavelets; Shannon's window lies along the input index q."""
    if kind == "mexican_hat":
        return 2 / (math.sqrt(3) * math.pi**0.25) * (x**2 - 1) * math.exp(-(x**2) / 2)
    if kind == "morlet":
        return math.cos(5 * x) * math.exp(-(x**2) / 2)
    if kind == "dog":
        return x * math.exp(-(x**2) / 2)
    if kind == "meyer":
        t = abs(x)
        if t <= 1 / 2:
            m = 1.0
        elif t < 1:
            v = 2 * t - 1
            m = math.cos(math.pi / 2 * v**4 * (35 - 84 * v + 70 * v**2 - 20 * v**3))
        else:
            m = 0.0
        return math.sin(math.pi * t) * m
    if kind == "shannon":
        return np.sinc(x / math.pi) * np.hamming(inputs)[q]
    raise ValueError(kind)


def knots(config) -> np.ndarray:
    """Uniform on the range, and k more on either side."""
    low, high = config.grid_range
    k, spacing = config.spline_order, (high - low) / config.grid_size
    return low + spacing * np.arange(-k, config.grid_size + k + 1)


def basis(config, edge: dict, x: float, q: int, inputs: int) -> float:
    """basis_pq(x) of one edge, whose parameters are `edge`."""
    if config.basis_type == "fourier":
        pairs = zip(edge["cos_coef"], edge["sin_coef"])
        return sum(a * math.cos(m * x) + b * math.sin(m * x) for m, (a, b) in enumerate(pairs, 1))
    if config.basis_type == "spline":
        t, k = knots(config), config.spline_order
        assert len(edge["spline_coef"]) == config.grid_size + k
        parts = [BSpline.basis_element(t[i : i + k + 2], extrapolate=False)(x) for i in range(config.grid_size + k)]
        return sum(c * np.nan_to_num(part) for c, part in zip(edge["spline_coef"], parts))
    if config.basis_type == "rational":
        numerator = sum(a * x**j for j, a in enumerate(edge["numerator"]))
        return numerator / (1 + abs(sum(b * x**j for j, b in enumerate(edge.get("denominator", []), 1))))
    x = (x - edge["translation"]) / edge["width"]
    return edge["amplitude"] * wavelet(config.wavelet_type, x, q, inputs)


def phi(config, step: dict, head: int, p: int, q: int, x: float) -> float:
    """phi_pq(x) = scale_base_pq b(x) + scale_basis_pq basis_pq(x)."""
    edge = {name: array[head, ..., p, q] for name, array in step.items()}
    value = edge["scale_basis"] * basis(config, edge, x, q, step["scale_basis"].shape[-1])
    if config.base_fn != "zero":
        value += edge["scale_base"] * BASE_FUNCTIONS[config.base_fn](x)
    return float(value)


def simplex(row: np.ndarray) -> np.ndarray:
    """Projection on the probability simplex: max(y - t, 0), with t found by bisection."""
    low, high = min(row) - 1.0, max(row)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - high, 0)


def activate(config, tensors: dict, head: int, row: np.ndarray, keys: list[int]) -> np.ndarray:
    """One activated row of one head. Only `keys` exist: neither Phi nor W nor the result has the others."""
    count = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("edges.")), default=0)
    steps = [
        {name.split(".")[2]: array for name, array in tensors.items() if name.startswith(f"edges.{index}.")}
        for index in range(count)
    ]
    projector = tensors.get("projector")
    tokens = len(row)
    activated = np.zeros(tokens)
    if config.modular_mode == "w1_phi2":
        x = [sum(projector[head, p, q] * row[q] for q in keys) for p in range(projector.shape[1])]
        inputs = range(len(x))
    else:
        x, inputs = row, keys
    for index, step in enumerate(steps):
        last = index == len(steps) - 1 and config.modular_mode != "phi1_w2"
        outputs = keys if last else range(step["scale_basis"].shape[1])
        values = {p: sum(phi(config, step, head, p, q, x[q]) for q in inputs) for p in outputs}
        x = np.zeros(tokens) if last else np.array(list(values.values()))
        if last:
            x[keys] = list(values.values())
        inputs = range(len(x))
    if config.modular_mode == "phi1_w2":
        for q in keys:
            activated[q] = sum(projector[head, q, p] * x[p] for p in range(len(x)))
    else:
        activated = x
    if config.project_l1 and keys:
        activated[keys] = simplex(activated[keys])
    return activated


def attend(config, tensors: dict, query, key, value, scaling: float, keep=None) -> tuple[np.ndarray, np.ndarray]:
    """
    Attention of arrays (B, h, N, d), with `keep` (B, h, N, N) or `None`.

    Returns:
        Output (B, h, N, d) and maps (B, h, N, N).
    """
    batch, heads, tokens, _ = query.shape
    maps = np.zeros((batch, heads, tokens, tokens))
    for b, h, i in np.ndindex(batch, heads, tokens):
        keys = [j for j in range(tokens) if keep is None or keep[b, h, i, j]]
        row = np.zeros(tokens)
        for j in keys:
            row[j] = sum(query[b, h, i] * key[b, h, j]) * scaling
        maps[b, h, i] = activate(config, tensors, h, row, keys)
    output = np.zeros(value.shape)
    for b, h, i in np.ndindex(batch, heads, tokens):
        for j in range(tokens):
            if maps[b, h, i, j] != 0:
                output[b, h, i] += maps[b, h, i, j] * value[b, h, j]
    return output, maps


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------------------- operators to test


def make_config(tokens: int = 5, heads: int = 2, **changes) -> KArAtViTConfig:
    """A configuration with that many tokens, [CLS] included; the rest of the model is as small as can be."""
    sizes = {
        "hidden_size": 4 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "image_size": [1, tokens - 1],
        "patch_size": 1,
        "karat_rank": 3,
    }
    return KArAtViTConfig(**{**sizes, **changes})


def make_operator(
    dtype: torch.dtype = torch.float64, seed: int = 0, tokens: int = 5, heads: int = 2, **changes
) -> KArAtOperator:
    """An operator none of whose parameters has a special value."""
    operator = KArAtOperator(make_config(tokens, heads, **changes)).to(dtype)
    randomise(operator, seed)
    if operator.config.karat_depth > 2:
        # Steep functions of steep functions amplify all rounding, and overflow fp16.
        with torch.no_grad():
            for step in operator.edges:
                step.scale_base *= 0.3
                step.scale_basis *= 0.3
    operator.freeze()
    return operator


@torch.no_grad()
def randomise(operator: KArAtOperator, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in operator.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("scale_base", "scale_basis")):
            values = 1 + 0.5 * values
        elif name.endswith("width"):
            values = values.sign() * (0.7 + values.abs().clamp(max=1.5))
        else:
            values = 0.5 * values
        parameter.copy_(values)


def make_inputs(
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    batch: int = 2,
    tokens: int = 5,
    heads: int = 2,
    size: int = 4,
    strength: float = 1.0,
) -> list[torch.Tensor]:
    """Leaves query, key and value, (batch, heads, tokens, size)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, size)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (query * strength, key, value)]


def arrays(operator: KArAtOperator) -> dict[str, np.ndarray]:
    """The parameters, as `attend` and `activate` take them."""
    return {name: parameter.detach().double().numpy() for name, parameter in operator.named_parameters()}
