# SPDX-License-Identifier: Apache-2.0
"""Fourier KArAt as the paper's code computes it: einsums over the features of every score, and the whole N x N map."""

from contextlib import contextmanager

import torch

from modeling_karat_vit.karat_operator import KArAtOperator


def naive_forward(self: KArAtOperator, query, key, value, scaling, way, keep=None, grids=None):
    """Attend as `KArAtOperator.forward`, for Fourier phi1_w2 without base function or mask; autocast acts on it."""
    (step,) = self.edges
    scores = (query @ key.mT) * scaling
    harmonics = torch.arange(1, step.grid_size + 1, device=scores.device, dtype=scores.dtype)
    angles = scores.unsqueeze(-1) * harmonics
    scale = step.scale_basis.unsqueeze(1)
    hidden = torch.einsum("bhnqg,hgrq->bhnr", angles.cos(), (scale * step.cos_coef).to(scores.dtype))
    hidden = hidden + torch.einsum("bhnqg,hgrq->bhnr", angles.sin(), (scale * step.sin_coef).to(scores.dtype))
    maps = torch.einsum("bhnr,hmr->bhnm", hidden, self.projector.to(hidden.dtype))
    return maps @ value, None, None


@contextmanager
def naive():
    """Make every operator compute naively within the context."""
    forward, KArAtOperator.forward = KArAtOperator.forward, naive_forward
    try:
        yield
    finally:
        KArAtOperator.forward = forward
