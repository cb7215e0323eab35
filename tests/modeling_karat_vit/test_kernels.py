# SPDX-License-Identifier: Apache-2.0
"""Which path runs; what the fused kernels compute is in kernel_cases.py."""

import copy
import logging

import pytest
import torch

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification
from modeling_karat_vit.karat_operator import KArAtOperator, why_not_fused


pytest.importorskip("triton")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def model(**options):
    return KArAtViTForImageClassification(
        KArAtViTConfig(**TINY, image_size=4, patch_size=2, num_labels=3, karat_rank=2, **options)
    )


def ways(monkeypatch, model) -> set[str]:
    """The paths that the operators of one call take."""
    seen = set()
    forward = KArAtOperator.forward

    def spy(self, query, key, value, scaling, way, *args, **kwargs):
        seen.add(way)
        return forward(self, query, key, value, scaling, way, *args, **kwargs)

    monkeypatch.setattr(KArAtOperator, "forward", spy)
    model(torch.randn(2, 3, 4, 4))
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default without CUDA")
def test_without_cuda_the_default_is_portable(monkeypatch):
    network = model()
    assert network.config._attn_implementation == "karat_portable"
    assert ways(monkeypatch, network) == {"karat_portable"}


def test_fused_falls_back_to_portable_and_says_so_once(monkeypatch, caplog):
    network = model()
    network.set_attn_implementation("karat_triton")
    logger = logging.getLogger("modeling_karat_vit.modeling_karat_vit")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        if not torch.cuda.is_available():
            assert ways(monkeypatch, network) == {"karat_portable"}
            network(torch.randn(2, 3, 4, 4))
            messages = [record.message for record in caplog.records if "fused kernels" in record.message]
            assert len(messages) <= 1 and all("CUDA" in message for message in messages)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"modular_mode": "w1_phi2"}, "w1_phi2"),
        ({"project_l1": True}, "project_l1"),
        ({"hidden_size": 512}, "head size"),
        ({}, None),
    ],
    ids=str,
)
def test_what_the_kernels_apply_to(monkeypatch, options, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    obstacle = why_not_fused(KArAtViTConfig(**(TINY | options)), "cuda")
    assert obstacle is None if reason is None else reason in obstacle


def test_what_was_found_out_about_the_kernels_holds_for_this_configuration_and_machine(monkeypatch):
    where = "modeling_karat_vit.karat_operator.why_not_fused"
    monkeypatch.setattr(where, lambda config, *_: "project_l1" if config.project_l1 else None)
    network, query = model(), torch.zeros(1, 2, 5, 16)
    operator = next(module for module in network.modules() if isinstance(module, KArAtOperator))
    assert operator.way("sdpa", query) == "karat_triton"
    monkeypatch.setattr(where, lambda *_: "another machine")
    assert operator.way("sdpa", query) == "karat_triton"
    assert copy.deepcopy(operator).way("sdpa", query) == "karat_portable"
    network.config.project_l1 = True
    assert operator.way("sdpa", query) == "karat_portable"


def test_fused_without_triton_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("modeling_karat_vit.modeling_karat_vit.fused_karat_attention", None)
    with pytest.raises(ValueError, match=r"needs Triton.*karat_portable"):
        model().set_attn_implementation("karat_triton")
