# SPDX-License-Identifier: Apache-2.0
"""One attention alone, forward and backward, beside PyTorch's fused softmax attention."""

from typing import Any

import torch
from torch.nn import functional as F

from modeling_karat_vit import KArAtViTConfig
from modeling_karat_vit.karat_operator import KArAtOperator, eager_karat_attention

from .common import Table, measure, relative_error


BASES: dict[str, dict[str, Any]] = {
    "fourier G=1": {"basis_type": "fourier", "grid_size": 1},
    "fourier G=3": {"basis_type": "fourier", "grid_size": 3},
    "spline": {"basis_type": "spline"},
    **{name: {"basis_type": "wavelet", "wavelet_type": name} for name in ("mexican_hat", "morlet", "dog", "meyer")},
    "shannon": {"basis_type": "wavelet", "wavelet_type": "shannon"},
    "rational": {"basis_type": "rational"},
}
# Relative RMS error of output and gradients that an implementation must stay below to be timed.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def inputs(batch, heads, tokens, head_size, dtype, device):
    qkv = torch.randn(batch, tokens, 3, heads, head_size, device=device, dtype=dtype)
    return [x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2)]


def gradients(output, leaves):
    return torch.autograd.grad(output, leaves, torch.ones_like(output), materialize_grads=True)


def error(operator, tensors, provider) -> float:
    """Compute the largest relative RMS error of output and gradients against the fp64 reference, on a few images."""
    tensors = [x[:2].detach().requires_grad_() for x in tensors]
    parameters = {name: p for name, p in operator.named_parameters() if not name.endswith("scale_base")}
    scaling = tensors[0].shape[-1] ** -0.5
    output = operator(*tensors, scaling, provider)[0]
    found = [output, *gradients(output, [*tensors, *parameters.values()])]
    double = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    query, key, value = leaves = [x.detach().double().requires_grad_() for x in tensors]
    full = {**double, "edges.0.scale_base": operator.edges[0].scale_base.detach().double()}
    expected, _, _ = eager_karat_attention(operator, query, key, value, scaling, full)
    expected = [expected, *gradients(expected, [*leaves, *double.values()])]
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def run(device: str, table: Table, batch: int, tokens_side: int, repeats: int, providers, bases=BASES) -> None:
    heads, head_size = 3, 64
    tokens = tokens_side**2 + 1
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    row = {"benchmark": "attention", "model": f"{heads}x{head_size}", "mode": "eager", "batch": batch, "tokens": tokens}
    row |= {"dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    tensors = inputs(batch, heads, tokens, head_size, dtype, device)

    def time(attend, leaves, **name):
        def forward():
            with torch.no_grad():
                attend()

        def both():
            output = attend()
            torch.autograd.grad(output, leaves, output)

        for what, step in (("forward", forward), ("forward+backward", both)):
            table.add(**row, **name, what=what, **measure(step, device, repeats))

    time(lambda: F.scaled_dot_product_attention(*tensors), tensors, provider="softmax")
    for basis, options in bases.items():
        config = KArAtViTConfig(
            hidden_size=heads * head_size, num_attention_heads=heads, image_size=tokens_side, patch_size=1, **options
        )
        operator = KArAtOperator(config)
        modules: list[Any] = [module for module in operator.modules() if hasattr(module, "reset_parameters")]
        for module in modules:
            module.reset_parameters()
        operator = operator.to(device)
        leaves = [*tensors, *(p for name, p in operator.named_parameters() if not name.endswith("scale_base"))]
        for provider in providers:
            wrong = error(operator, tensors, provider)
            if not wrong < LIMIT[dtype]:
                refused = f"wrong by {wrong:.1e}, not timed"
                table.add(**row, provider=provider, basis=basis, what="forward+backward", error=refused)
                continue

            def attend(operator=operator, provider=provider):
                return operator(*tensors, head_size**-0.5, provider)[0]

            time(attend, leaves, provider=provider, basis=basis, error=f"{wrong:.1e}")
