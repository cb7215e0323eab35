# SPDX-License-Identifier: Apache-2.0
"""Tiny models for the tests of the package: 2x3 patches and [CLS], two blocks of two heads."""

import pytest
import torch
from transformers.utils import logging

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [8, 12],
    "patch_size": 4,
    "num_labels": 5,
}
BASES = {
    "fourier": {"basis_type": "fourier"},
    "spline": {"basis_type": "spline"},
    "rational": {"basis_type": "rational"},
    **{
        name: {"basis_type": "wavelet", "wavelet_type": name}
        for name in ("mexican_hat", "morlet", "dog", "meyer", "shannon")
    },
}
VARIANTS = {
    "phi1_w2": {},
    "w1_phi2": {"modular_mode": "w1_phi2"},
    "phi2_phi1": {"modular_mode": None},
    "depth_3": {"modular_mode": None, "karat_depth": 3},
    "full_rank": {"modular_mode": None, "karat_depth": 1},
    "project_l1": {"project_l1": True},
}
# For what the whole product of the two would only repeat: every basis, and every variant with two of them.
FORMS = BASES | {
    f"{name}-{variant}": BASES[name] | VARIANTS[variant]
    for variant, names in {
        "w1_phi2": ("fourier", "shannon"),
        "phi2_phi1": ("spline", "meyer"),
        "depth_3": ("rational", "mexican_hat"),
        "full_rank": ("shannon", "dog"),
        "project_l1": ("morlet", "fourier"),
    }.items()
    for name in names
}


@pytest.fixture(scope="session")
def sizes() -> dict:
    """The fields that ViT has too."""
    return dict(SIZES)


@pytest.fixture(params=BASES.values(), ids=BASES.keys())
def basis(request) -> dict:
    """The configuration of each basis in turn."""
    return request.param


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request) -> dict:
    """The configuration of each variant of the operator in turn."""
    return request.param


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request) -> dict:
    """A basis in a variant of the operator, in turn: a sample of all."""
    return request.param


SHARED = [form | {"sharing": "universal" if index % 2 else "blockwise"} for index, form in enumerate(FORMS.values())]


@pytest.fixture(params=SHARED, ids=FORMS.keys())
def shared_form(request) -> dict:
    """A form, in turn; in every other one all blocks share one operator."""
    return request.param


@pytest.fixture(params=["blockwise", "universal"])
def sharing(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_config():
    def make(**changes) -> KArAtViTConfig:
        return KArAtViTConfig(**{**SIZES, "karat_rank": 3, **changes})

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """A model in evaluation mode whose KArAt parameters lie away from their special starting values."""

    def make(cls=KArAtViTForImageClassification, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
        torch.manual_seed(seed)
        model = cls(make_config(**changes)).to(dtype).eval()
        names = model.karat_parameter_names()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def pixels() -> torch.Tensor:
    """Four images of the tiny models' size, (4, 3, 8, 12)."""
    return torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def messages(caplog):
    """What we and Transformers logged in this test so far; what is said once counts as not said yet."""
    logging.warning_once.cache_clear()
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        yield lambda: [record.getMessage() for record in caplog.records]
    logging.disable_propagation()
