# SPDX-License-Identifier: Apache-2.0
"""Backbones from Transformers' ViT and DeiT, and from timm."""

import json

import pytest
import timm
import torch
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification, KArAtViTModel, convert_timm_state_dict


OURS = (KArAtViTModel, KArAtViTForImageClassification)
KARAT = {"karat_rank": 3}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}


def body(model) -> dict[str, torch.Tensor]:
    """The state without a prefix for the encoder."""
    return {name.removeprefix("vit.").removeprefix("deit."): tensor for name, tensor in model.state_dict().items()}


def randomise(model):
    """No parameter is left at a value that another one has too."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def load(cls, folder, **options):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **KARAT, **options)
    assert not info["mismatched_keys"]
    return model, info


@pytest.mark.parametrize("original_format", [True, False], ids=["old_names", "new_names"])
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", [ViTModel, ViTForImageClassification])
def test_vit_checkpoints(sizes, tmp_path, source, target, original_format, sharing):
    vit = randomise(source(ViTConfig(**sizes)))
    vit.save_pretrained(tmp_path, save_original_format=original_format)
    model, info = load(target, tmp_path, sharing=sharing)
    # The heads are reported as Transformers reports them between its own ViT classes; beside them only KArAt is new.
    own_head = POOLER if target is KArAtViTModel else CLASSIFIER
    other_head = CLASSIFIER if target is KArAtViTModel else POOLER
    same_kind = (source is ViTModel) == (target is KArAtViTModel)
    assert info["missing_keys"] == model.karat_parameter_names() | (set() if same_kind else own_head)
    assert info["unexpected_keys"] == (set() if same_kind else other_head)
    ours, theirs = body(model), body(vit)
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= len(theirs) - 2
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert (model.config.model_type, model.config.num_labels, model.config.karat_rank) == ("karat_vit", 5, 3)


def test_a_sharded_vit_checkpoint(sizes, tmp_path):
    vit = randomise(ViTForImageClassification(ViTConfig(**sizes)))
    vit.save_pretrained(tmp_path, max_shard_size="4KB")
    model, info = load(KArAtViTForImageClassification, tmp_path)
    assert info["missing_keys"] == model.karat_parameter_names()
    assert all(torch.equal(body(model)[name], tensor) for name, tensor in body(vit).items())


def test_the_softmax_blocks_of_a_loaded_vit_compute_what_vit_computes(sizes, tmp_path, pixels):
    vit = randomise(ViTForImageClassification(ViTConfig(**sizes)))
    vit.save_pretrained(tmp_path)
    model, _ = load(KArAtViTForImageClassification, tmp_path, karat_layers=[1])
    expected = vit(pixels, output_hidden_states=True).hidden_states
    actual = model(pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(actual[1], expected[1], atol=1e-5)
    assert not torch.allclose(actual[2], expected[2], atol=1e-2)


def test_new_parameters_start_as_in_a_new_model(sizes, tmp_path):
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    model, _ = load(KArAtViTModel, tmp_path, grid_size=2)
    for layer in model.layers:
        operator = layer.attention.operator
        assert operator.projector[..., 0].mean().item() == pytest.approx(1 / 7, abs=0.03)
        assert (operator.edges[0].scale_basis == 1).all()
        assert not operator.edges[0].scale_base.requires_grad


DEITS = [DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher]


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", DEITS)
def test_distilled_deit_raises_unless_its_token_is_dropped(sizes, tmp_path, source, target):
    source(DeiTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="drop_distillation_token=True"):
        target.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="drop_distillation_token=True"):
        target.from_pretrained(tmp_path, config=KArAtViTConfig(**sizes))


@pytest.mark.parametrize("original_format", [True, False], ids=["old_names", "new_names"])
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", DEITS)
def test_deit_checkpoints(sizes, tmp_path, source, target, original_format):
    deit = randomise(source(DeiTConfig(**sizes)))
    deit.save_pretrained(tmp_path, save_original_format=original_format)
    model, info = load(target, tmp_path, drop_distillation_token=True)
    own_head = POOLER if target is KArAtViTModel else CLASSIFIER
    same_kind = (source is DeiTModel) == (target is KArAtViTModel)
    assert info["missing_keys"] == model.karat_parameter_names() | (set() if same_kind else own_head)
    ours, theirs = body(model), body(deit)
    assert ours["embeddings.position_embeddings"].shape == (1, 7, 16)
    kept = [0, *range(2, 8)]
    assert torch.equal(ours["embeddings.position_embeddings"], theirs["embeddings.position_embeddings"][:, kept])
    assert torch.equal(ours["embeddings.cls_token"], theirs["embeddings.cls_token"])
    if target is KArAtViTForImageClassification and source is not DeiTModel:
        head = "cls_classifier" if source is DeiTForImageClassificationWithTeacher else "classifier"
        assert torch.equal(ours["classifier.weight"], theirs[f"{head}.weight"])
    blocks = [name for name in theirs if name.startswith("layers.") or name.startswith("layernorm")]
    assert len(blocks) == 2 * 16 + 2
    assert all(torch.equal(ours[name], theirs[name]) for name in blocks)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}, {"num_labels": 5}])
def test_deit_takes_the_arguments_of_from_pretrained(sizes, tmp_path, pixels, options):
    DeiTForImageClassification(DeiTConfig(**sizes)).save_pretrained(tmp_path)
    model, _ = load(KArAtViTForImageClassification, tmp_path, drop_distillation_token=True, **options)
    assert model.dtype == options.get("dtype", torch.float32)
    assert model.config._attn_implementation == options.get("attn_implementation", "karat_portable")
    assert model(pixels).logits.shape == (4, 5)


def test_deit_with_a_configuration_and_with_another_head(sizes, tmp_path, pixels):
    DeiTForImageClassification(DeiTConfig(**sizes)).save_pretrained(tmp_path)
    config = KArAtViTConfig(**sizes, basis_type="spline")
    model = KArAtViTForImageClassification.from_pretrained(tmp_path, config=config, drop_distillation_token=True)
    assert model.config.basis_type == "spline"
    model = KArAtViTForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, drop_distillation_token=True
    )
    assert model(pixels).logits.shape == (4, 3)


def test_dropping_a_distillation_token_that_is_not_there_is_harmless(sizes, tmp_path):
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    model, info = load(KArAtViTModel, tmp_path, drop_distillation_token=True)
    assert info["missing_keys"] == model.karat_parameter_names()


def test_extra_keys_of_a_foreign_configuration_are_dropped_and_named_once(sizes, tmp_path, messages):
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fancy_key": 1}))
    for _ in range(2):
        model, _ = load(KArAtViTModel, tmp_path)
    assert not hasattr(model.config, "fancy_key")
    assert len([message for message in messages() if "fancy_key" in message]) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", 32), ("num_hidden_layers", 3), ("image_size", 16), ("intermediate_size", 8)]
)
def test_another_backbone_than_the_stored_one_raises(sizes, tmp_path, name, value):
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path)
    for choice in ({name: value}, {"config": KArAtViTConfig(**{**sizes, name: value})}):
        with pytest.raises(ValueError) as error:
            KArAtViTForImageClassification.from_pretrained(tmp_path, **choice)
        assert f"`{name}={sizes[name]!r}`" in str(error.value) and f"`{name}={value!r}`" in str(error.value)


def test_any_operator_may_be_asked_for_on_a_foreign_backbone(sizes, tmp_path, form):
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    model, info = load(KArAtViTModel, tmp_path, **form)
    assert info["missing_keys"] == model.karat_parameter_names()


def test_another_model_type_raises(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert'.*'karat_vit'"):
        KArAtViTForImageClassification.from_pretrained(tmp_path)


def test_a_vit_checkpoint_stays_a_vit_for_the_auto_class(sizes, tmp_path):
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is ViTForImageClassification


# ------------------------------------------------------------------------------------------------------------- timm


def timm_model(**changes):
    options = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomise(timm.models.vision_transformer.VisionTransformer(**{**options, "mlp_ratio": 1.5, **changes}))


TIMM = {
    "plain": ({}, {}),
    "no_qkv_bias": ({"qkv_bias": False}, {}),
    "square": ({"img_size": 16}, {"image_size": None}),
    "oblong_patches": ({"patch_size": (2, 4)}, {}),
    "one_channel": ({"in_chans": 1}, {}),
    "standard_heads": ({"embed_dim": 128}, {"num_attention_heads": None}),
}


@pytest.mark.parametrize(("changes", "arguments"), TIMM.values(), ids=TIMM.keys())
def test_timm_state_dictionaries(changes, arguments):
    source = timm_model(**changes)
    config, state = convert_timm_state_dict(
        source.state_dict(), **{"num_attention_heads": 2, "image_size": (8, 12), **arguments}
    )
    height, width = source.patch_embed.img_size
    pixels = torch.randn(3, config.num_channels, height, width)
    vit = ViTForImageClassification(config).eval()
    vit.load_state_dict(state)
    assert torch.allclose(vit(pixels).logits, source(pixels), atol=1e-4, rtol=1e-4)
    # As the docstring says.
    model, info = KArAtViTForImageClassification.from_pretrained(
        None, config=KArAtViTConfig.from_dict(config.to_dict(), **KARAT), state_dict=state, output_loading_info=True
    )
    assert info["missing_keys"] == model.karat_parameter_names() and not info["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_timm_models_by_name():
    source = randomise(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4))
    config, state = convert_timm_state_dict(source.state_dict())
    assert (config.hidden_size, config.num_attention_heads, config.image_size) == (192, 3, 32)
    assert state["classifier.weight"].shape == (4, 192)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="dist"):
        convert_timm_state_dict(distilled.state_dict())


def test_the_converted_state_shares_no_memory_with_the_original():
    state = timm_model().state_dict()
    _, converted = convert_timm_state_dict(state, num_attention_heads=2, image_size=(8, 12))
    before = {name: tensor.clone() for name, tensor in converted.items()}
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(converted[name], before[name]) for name in before)


BAD_TIMM = {
    "image_size": (timm_model, {"image_size": (16, 16)}, "16x16.*6 patches"),
    "no_image_size": (timm_model, {"image_size": None}, "no square.*image_size"),
    "no_heads": (timm_model, {"num_attention_heads": None}, "no multiple of 64.*num_attention_heads"),
    "heads_do_not_divide": (timm_model, {"num_attention_heads": 3}, "num_attention_heads"),
    "registers": (lambda: timm_model(reg_tokens=2), {}, "reg_token.*register"),
    "layer_scale": (lambda: timm_model(init_values=0.1), {}, "ls1.*layer scale"),
    "query_norm": (lambda: timm_model(qk_norm=True), {}, "q_norm.*query norms"),
    "average_pooling": (lambda: timm_model(global_pool="avg"), {}, "fc_norm"),
    "no_cls_token": (lambda: timm_model(class_token=False, global_pool="avg"), {}, "no cls_token"),
    "no_classifier": (lambda: timm_model(num_classes=0), {}, "no head.weight"),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD_TIMM.values(), ids=BAD_TIMM.keys())
def test_what_is_no_plain_vit_raises(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_timm_state_dict(make().state_dict(), **{"num_attention_heads": 2, "image_size": (8, 12), **arguments})


WRONG_FOR_THE_ORIGINAL = {
    "heads": ({}, {"num_attention_heads": 4}),
    "epsilon": ({}, {"layer_norm_eps": 1e-2}),
    "activation": ({"act_layer": torch.nn.ReLU}, {}),
}


@pytest.mark.parametrize(("changes", "arguments"), WRONG_FOR_THE_ORIGINAL.values(), ids=WRONG_FOR_THE_ORIGINAL.keys())
def test_other_logits_than_the_originals_raise(changes, arguments):
    source = timm_model(**changes)
    with pytest.raises(ValueError, match=r"logits.*num_attention_heads=.*layer_norm_eps="):
        convert_timm_state_dict(
            source.state_dict(), **{"num_attention_heads": 2, "image_size": (8, 12), **arguments}, original=source
        )
    assert next(source.parameters()).dtype == torch.float32, "the original was changed"
    right = timm_model()
    convert_timm_state_dict(right.state_dict(), 2, (8, 12), original=right)


def test_a_state_dictionary_of_transformers_is_not_timms(sizes):
    with pytest.raises(ValueError, match="timm VisionTransformer"):
        convert_timm_state_dict(ViTForImageClassification(ViTConfig(**sizes)).state_dict())
