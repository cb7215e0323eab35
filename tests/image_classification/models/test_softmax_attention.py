# SPDX-License-Identifier: Apache-2.0
"""The softmax models of the training script attend as "sdpa" does, without a mask of nothing while traced."""

import pytest
import torch

from image_classification.models.building import build_model, load_trained
from image_classification.models.softmax_attention import UNMASKED
from image_classification.settings.arguments import ModelArguments


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
ARGUMENTS = ModelArguments(model="vit_tiny_patch16_224", image_size=[32], **SMALL)
LABELS = ["cat", "dog", "owl"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(ARGUMENTS, LABELS).eval()


def masks(graph: torch.fx.Graph) -> list:
    """What each attention of a traced model takes as its mask."""
    nodes = [node for node in graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(nodes) == 2
    return [node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask") for node in nodes]


@pytest.mark.system
def test_traced_without_a_mask(model):
    compiled = []

    def backend(module, inputs):
        compiled.extend(masks(module.graph))
        return module.forward

    torch.compile(model, backend=backend, fullgraph=True)(IMAGES)  # Has a mask without it up to Transformers 5.17.
    assert compiled == [None, None]
    assert masks(torch.export.export(model, (IMAGES,)).graph) == [None, None]  # Has one in all of them.


@pytest.mark.parametrize("keys", [None, [True, True, True, True, False]])
def test_the_outputs_of_sdpa_bit_for_bit(model, keys):
    keep = None if keys is None else torch.tensor([keys] * 2)
    assert model.config._attn_implementation == UNMASKED
    ours = model(IMAGES, attention_mask=keep).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model(IMAGES, attention_mask=keep).logits)
    assert torch.equal(ours, model(IMAGES).logits) == (keys is None)


def test_checkpoints_do_not_name_it(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    assert UNMASKED not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert load_trained(str(tmp_path), ModelArguments(), LABELS).config._attn_implementation == UNMASKED
    asked = ModelArguments(attn_implementation="eager")
    assert load_trained(str(tmp_path), asked, LABELS).config._attn_implementation == "eager"
