# SPDX-License-Identifier: Apache-2.0
"""The presets in `configuration/`: they load offline, and have the paper's parameter counts, to the last parameter."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

from modeling_karat_vit import KArAtViTConfig


CONFIGURATION = Path(__file__).parents[1] / "configuration"
BASELINES = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")]
BLOCKWISE = [f"{name}_karat" for name in BASELINES]
UNIVERSAL = [f"{name}_universal" for name in BLOCKWISE]
HYBRID = {f"{name}_hybrid": heads for name, heads in zip(BLOCKWISE, (1, 2, 3))}

# The paper's tables: preset, classes, total parameters. Frozen ones count.
PARAMETERS = [
    ("vit_tiny_patch16_224", 10, 5_526_346),
    ("vit_tiny_patch16_224_karat", 10, 6_292_282),
    ("vit_tiny_patch16_224_karat_universal", 10, 5_590_174),
    ("vit_small_patch16_224", 1000, 22_050_664),
    ("vit_small_patch16_224_karat", 1000, 23_582_536),
    ("vit_small_patch16_224_karat_universal", 1000, 22_178_320),
    ("vit_base_patch16_224", 10, 85_806_346),
    ("vit_base_patch16_224_karat", 10, 87_508_426),
    ("vit_base_patch16_224_karat_universal", 10, 85_948_186),
]


def preset(name: str, **changes):
    return AutoConfig.from_pretrained(CONFIGURATION / name, **changes)


def count_parameters(config) -> int:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "classes", "parameters"), PARAMETERS)
def test_parameters_equal_the_papers_tables(name, classes, parameters):
    assert count_parameters(preset(name, num_labels=classes)) == parameters


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_are_transformers_own_vit(name):
    assert type(preset(name)) is ViTConfig


@pytest.mark.parametrize("name", [*BLOCKWISE, *UNIVERSAL, *HYBRID])
def test_the_karat_presets_have_the_papers_operator(name):
    config = preset(name)
    assert type(config) is KArAtViTConfig
    assert config.sharing == ("universal" if name in UNIVERSAL else "blockwise")
    assert config.grid_size == (1 if "base" in name else 3)
    assert (config.basis_type, config.modular_mode, config.karat_rank, config.karat_depth, config.base_fn) == (
        "fourier",
        "phi1_w2",
        12,
        2,
        "zero",
    )
    assert config.num_tokens == 197
    placed = (HYBRID[name], [6, 7, 8, 9, 10, 11]) if name in HYBRID else (None, None)
    assert (config.num_karat_heads, config.karat_layers) == placed


@pytest.mark.parametrize("name", [*BASELINES, *BLOCKWISE, *UNIVERSAL, *HYBRID])
def test_the_backbone_follows_deit(name):
    config = preset(name)
    assert config.hidden_size == 64 * config.num_attention_heads
    assert config.intermediate_size == 4 * config.hidden_size
    assert (config.num_hidden_layers, config.image_size, config.patch_size) == (12, 224, 16)
    assert (config.layer_norm_eps, config.qkv_bias, config.num_labels) == (1e-6, True, 1000)


def test_presets_are_named_after_what_they_hold_and_set_nothing_else():
    paths = {path.parent.name: path for path in CONFIGURATION.glob("*/config.json")}
    assert paths.keys() == {*BASELINES, *BLOCKWISE, *UNIVERSAL, *HYBRID, "karat_digits"}
    for name, path in paths.items():
        default = type(preset(name))()
        assert not [key for key in json.loads(path.read_text()) if not hasattr(default, key)], name
