# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling, the backbone, and the losses: what ViT and Dinov2 give, where KArAt heads add nothing."""

import pytest
import torch
from transformers import AutoBackbone, AutoModelForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling, ViTModel

from modeling_karat_vit import (
    KArAtViTBackbone,
    KArAtViTConfig,
    KArAtViTForImageClassification,
    KArAtViTForMaskedImageModeling,
    KArAtViTModel,
)


SQUARE = {"image_size": 12, "patch_size": 4, "encoder_stride": 4}


@torch.no_grad()
def softmax_limit(cls, karat_cls, make_config, sizes, **changes):
    """
    A ViT and a KArAt model of mixed heads that are the same function: the same weights, and nothing of the KArAt head
    gets through the output projection.
    """
    torch.manual_seed(0)
    vit = cls(ViTConfig(**{**sizes, **SQUARE})).eval()
    karat = karat_cls(make_config(**SQUARE, num_karat_heads=1, **changes)).eval()
    head = vit.config.hidden_size // vit.config.num_attention_heads
    for name, parameter in vit.named_parameters():
        parameter.normal_(std=0.3)
        if name.endswith("o_proj.weight"):
            parameter[:, :head] = 0
    missing, unexpected = karat.load_state_dict(vit.state_dict(), strict=False)
    assert set(missing) == karat.karat_parameter_names()
    assert {name.split(".")[0] for name in unexpected} <= {"pooler"}
    return vit, karat


@pytest.fixture
def square_pixels():
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_masked_image_modelling_is_vits_in_the_softmax_limit(make_config, sizes, square_pixels):
    vit, karat = softmax_limit(ViTForMaskedImageModeling, KArAtViTForMaskedImageModeling, make_config, sizes)
    masked = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    expected, got = vit(square_pixels, bool_masked_pos=masked), karat(square_pixels, bool_masked_pos=masked)
    torch.testing.assert_close(got.reconstruction, expected.reconstruction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss)
    assert karat(square_pixels).loss is None


def test_masked_image_modelling_of_oblong_images(make_config, pixels):
    model = KArAtViTForMaskedImageModeling(make_config(encoder_stride=4)).eval()
    with torch.no_grad():
        output = model(pixels, bool_masked_pos=torch.tensor([[True, False, False, False, False, True]] * 4))
    assert output.reconstruction.shape == pixels.shape
    errors = (output.reconstruction - pixels).abs()  # The first and the last of 2 x 3 patches are masked.
    parts = torch.cat([errors[:, :, :4, :4], errors[:, :, 4:, 8:]], dim=-1)
    torch.testing.assert_close(output.loss, parts.mean())
    larger = torch.randn(1, 3, 16, 12)
    assert model(larger, interpolate_pos_encoding=True).reconstruction.shape == larger.shape


def test_masked_patches_need_a_stride_of_a_patch(make_config, pixels):
    model = KArAtViTForMaskedImageModeling(make_config(encoder_stride=2))
    with pytest.raises(ValueError, match=r"encoder_stride.*patch_size.*2 and 4"):
        model(pixels, bool_masked_pos=torch.zeros(4, 6))


def test_masked_image_modelling_trains_and_fine_tunes(make_config, pixels, tmp_path):
    model = KArAtViTForMaskedImageModeling(make_config(encoder_stride=4))
    model(pixels, bool_masked_pos=torch.ones(4, 6)).loss.backward()
    assert model.vit.embeddings.mask_token.grad is not None
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedImageModeling.from_pretrained(tmp_path)
    assert type(again) is KArAtViTForMaskedImageModeling
    classifier, info = KArAtViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    for name, parameter in classifier.vit.state_dict().items():
        assert torch.equal(parameter, model.vit.state_dict()[name]), name


def test_feature_maps_are_vits_hidden_states_in_the_softmax_limit(make_config, sizes, square_pixels):
    stages = ["stem", "stage1", "stage2"]
    vit, karat = softmax_limit(ViTModel, KArAtViTBackbone, make_config, sizes, out_features=stages)
    expected = vit(square_pixels, output_hidden_states=True).hidden_states
    output = karat(square_pixels, output_hidden_states=True)
    assert len(output.feature_maps) == len(expected) == 3
    for states, features, hidden in zip(expected, output.feature_maps, output.hidden_states):
        torch.testing.assert_close(hidden, states, atol=1e-5, rtol=1e-5)
        maps = vit.layernorm(states)[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        torch.testing.assert_close(features, maps, atol=1e-5, rtol=1e-5)
    assert karat(square_pixels).hidden_states is None
    assert karat.channels == [16, 16, 16]


def test_feature_maps_as_they_are(make_model, pixels):
    raw = {"apply_layernorm": False, "reshape_hidden_states": False}
    backbone = make_model(KArAtViTBackbone, out_indices=[0, 2], **raw)
    assert backbone.out_features == ["stem", "stage2"]
    output = backbone(pixels, output_hidden_states=True)
    for features, index in zip(output.feature_maps, (0, 2)):
        assert torch.equal(features, output.hidden_states[index])


def test_a_backbone_takes_images_of_any_size(make_model, pixels):
    backbone = make_model(KArAtViTBackbone)
    model = KArAtViTModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict(), strict=False)
    larger = torch.randn(2, 3, 17, 26)
    states = model(larger, interpolate_pos_encoding=True).last_hidden_state
    (features,) = backbone(larger).feature_maps
    assert features.shape == (2, 16, 4, 6)
    torch.testing.assert_close(features.flatten(2).mT, states[:, 1:])


def test_a_backbone_loads_from_a_classifier(make_model, pixels, tmp_path):
    classifier = make_model()
    classifier.save_pretrained(tmp_path)
    backbone = KArAtViTBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage2"]).eval()
    expected = classifier.vit(pixels).last_hidden_state
    torch.testing.assert_close(backbone(pixels).feature_maps[-1].flatten(2).mT, expected[:, 1:])
    backbone.save_pretrained(tmp_path / "backbone")
    again = KArAtViTBackbone.from_pretrained(tmp_path / "backbone")
    assert again.out_indices == [1, 2]
    assert KArAtViTBackbone.from_pretrained(tmp_path / "backbone", out_indices=[0]).out_features == ["stem"]
    assert type(AutoBackbone.from_config(again.config)) is KArAtViTBackbone


def test_unknown_stages_raise():
    with pytest.raises(ValueError, match="stage13"):
        KArAtViTConfig(out_features=["stage13"])


def test_the_default_stage_follows_the_number_of_blocks(tmp_path):
    KArAtViTConfig().save_pretrained(tmp_path)
    assert KArAtViTConfig.from_pretrained(tmp_path, num_hidden_layers=2).out_features == ["stage2"]


def test_soft_targets_of_a_single_label_are_a_cross_entropy(make_model, pixels, messages):
    model = make_model(problem_type="single_label_classification")
    soft = torch.randn(4, 5).softmax(-1)
    output = model(pixels, labels=soft)
    torch.testing.assert_close(output.loss, -(soft * output.logits.log_softmax(-1)).sum(-1).mean())
    hard = torch.tensor([0, 4, 2, 1])
    one_hot = torch.nn.functional.one_hot(hard, 5).float()
    torch.testing.assert_close(model(pixels, labels=one_hot).loss, model(pixels, labels=hard).loss)
    with pytest.raises(ValueError, match=r"floats of shape \(4,\).*\(4, 5\)"):
        model(pixels, labels=hard.float())
    assert not messages()


def test_soft_targets_without_a_problem_type_are_named(make_model, pixels, messages):
    model = make_model()
    for _ in range(2):
        model(pixels, labels=torch.rand(4, 5))
    assert model.config.problem_type == "multi_label_classification"
    assert len([message for message in messages() if "single_label_classification" in message]) == 1


def test_unknown_keywords_of_forward_are_named_once(make_model, pixels, messages):
    model = make_model()
    for _ in range(2):
        model(pixels, output_atentions=True, num_items_in_batch=4, return_dict=True, output_attention_scores=False)
    said = [message for message in messages() if "output_atentions" in message]
    assert len(said) == 1 and "num_items" not in said[0]
