# SPDX-License-Identifier: Apache-2.0
"""
Make the stored checkpoints of `tests/fixtures/`, with their expected logits: `python -m tests.make_fixtures [NAME...]`.

Checkpoints that exist are left alone: every later release has to load them and give the same logits. Add to the list,
and never make one again because a test of it fails.
"""

import json
import sys
from pathlib import Path

import torch

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification


FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": [8, 12],
    "patch_size": 4,
    "num_channels": 1,
    "karat_rank": 2,
    "id2label": {0: "circle", 1: "square", 2: "star"},
    "label2id": {"circle": 0, "square": 1, "star": 2},
}
# One per basis. Together they have every variant of the operator, both ways of sharing, mixed heads and blocks.
CHECKPOINTS = {
    "fourier": {"basis_type": "fourier", "grid_size": 3},
    "spline": {"basis_type": "spline", "grid_size": 4, "sharing": "universal", "base_fn": "silu"},
    "mexican_hat": {"basis_type": "wavelet", "wavelet_type": "mexican_hat", "modular_mode": "w1_phi2"},
    "morlet": {"basis_type": "wavelet", "wavelet_type": "morlet", "modular_mode": None},
    "dog": {"basis_type": "wavelet", "wavelet_type": "dog", "modular_mode": None, "karat_depth": 1},
    "meyer": {"basis_type": "wavelet", "wavelet_type": "meyer", "num_karat_heads": 1, "karat_layers": [1]},
    "shannon": {"basis_type": "wavelet", "wavelet_type": "shannon", "project_l1": True},
    "rational": {"basis_type": "rational", "rational_order": (3, 2), "karat_init": "normal"},
}


def pixels() -> torch.Tensor:
    """Two images, (2, 1, 8, 12), that no random number generator has a part in."""
    return torch.sin(torch.arange(2 * 8 * 12, dtype=torch.float64) * 0.37).view(2, 1, 8, 12)


def make(name: str) -> None:
    torch.manual_seed(sorted(CHECKPOINTS).index(name))
    model = KArAtViTForImageClassification(KArAtViTConfig(**SIZES, **CHECKPOINTS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from zeros and ones, as training would move them, so that each parameter tells in the logits.
            parameter += 0.2 * torch.randn_like(parameter)
    folder = FIXTURES / name
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    model.double().set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(pixels()).logits
    (folder / "expected_logits.json").write_text(json.dumps(logits.tolist(), indent=1) + "\n")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CHECKPOINTS:
        if (FIXTURES / wanted).exists():
            print(f"{wanted} exists")
        else:
            make(wanted)
            print(f"{wanted} made")
