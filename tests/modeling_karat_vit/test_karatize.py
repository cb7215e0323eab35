# SPDX-License-Identifier: Apache-2.0
"""KArAt heads in other vision models."""

import copy

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from modeling_karat_vit import karatize
from modeling_karat_vit.karat_heads import KArAtHeads, OperatorConfig, biased_karat_attention
from modeling_karat_vit.karat_operator import KArAtOperator
from tests.backbones import MAKERS, OPERATOR, UNSUPPORTED, attentions_of, features, images_for, make, save_as_timm


@pytest.fixture(params=MAKERS)
def source(request):
    return make(request.param)


@pytest.fixture(params=[name for name in MAKERS if not name.endswith("_classifier")])
def family(request):
    """As `source`, without the classifiers, whose blocks are the same."""
    return make(request.param)


def heads_of(model) -> list[KArAtHeads]:
    return [module for module in model.modules() if isinstance(module, KArAtHeads)]


def set_gamma(model, value: float):
    with torch.no_grad():
        for heads in heads_of(model):
            heads.gamma.fill_(value)
    return model


def set_attention(model, implementation: str):
    # VitDet knows no other than its own.
    if model._supports_sdpa:
        model.set_attn_implementation(implementation)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_residual_start_computes_what_the_model_did(source, implementation):
    set_attention(source, implementation)
    images = images_for(source)
    expected = features(source, images)
    model = karatize(source, **OPERATOR)
    assert len(heads_of(model)) == 2
    assert torch.equal(features(model, images), expected)
    # Both are computed: another gamma is another result.
    assert not torch.allclose(features(set_gamma(model, 1.0), images), expected)
    assert torch.equal(features(source, images), expected)


def test_gradients_reach_what_is_new(source):
    model = set_gamma(karatize(source, **OPERATOR), 0.1).train()
    features(model, images_for(model)).square().sum().backward()
    for name in model.karat_parameter_names():
        parameter = model.get_parameter(name)
        # The base function is zero.
        assert (parameter.grad is None) == name.endswith("scale_base"), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_gamma_learns_from_the_start(source):
    model = karatize(source, **OPERATOR)
    features(model, images_for(model)).square().sum().backward()
    assert all(heads.gamma.grad.abs().min() > 0 for heads in heads_of(model))


@pytest.mark.parametrize("original_format", [False, True])
def test_round_trip(source, tmp_path, original_format):
    model = set_gamma(karatize(source, heads=1, **OPERATOR), 0.5)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type.startswith("karat_") and config.karat == model.config.karat
    autos = {auto.__name__: auto for auto in (AutoModel, AutoModelForImageClassification)}
    # Transformers' AutoBackbone asks the Hub, even for a folder, and of two classifiers it makes the first.
    auto = type(model) if "WithTeacher" in type(model).__name__ else autos.get(model.auto_name, type(model))
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values())
    images = images_for(model)
    assert torch.equal(features(loaded.eval(), images), features(model, images))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert not [name for name in frozen & trained if "position_embeddings" not in name]
    assert all(name in frozen for name in model.karat_parameter_names() if name.endswith("scale_base"))


def test_replaced_heads_are_fitted_to_softmax(family):
    images = images_for(family, 4)
    expected = features(family, images)
    settings = {"start": "replace", "layers": [-1], "images": images, "grid_size": 2, "karat_rank": 4}
    unfitted = karatize(family, **settings, calibration_steps=0)
    fitted = karatize(family, **settings, calibration_steps=60)
    distance = [float((features(model, images) - expected).detach().norm()) for model in (unfitted, fitted)]
    assert distance[1] < 0.6 * distance[0], distance


def test_some_heads_and_maps_of_the_reference(family):
    """With KArAt heads in front, the others stay what they were, in output and maps."""
    set_attention(family, "eager")
    images = images_for(family)
    last = karatize(family, layers=[-1], heads=1, start="replace", images=images, calibration_steps=0, **OPERATOR)
    maps = [attentions_of(model, images)[-1] for model in (family, last)]
    if "MAE" not in type(family).__name__:  # shuffled there
        torch.testing.assert_close(maps[1][:, 1:], maps[0][:, 1:])
    assert (maps[1][:, :1] - maps[0][:, :1]).abs().max() > 1e-3
    residual = set_gamma(karatize(family, layers=[-1], heads=1, **OPERATOR), 1.0)
    heads_of(residual)[0].load_state_dict(heads_of(last)[0].state_dict(), strict=False)
    both = attentions_of(residual, images)[-1]
    if "MAE" not in type(family).__name__:
        torch.testing.assert_close(both[:, :1], maps[0][:, :1] + maps[1][:, :1])


@pytest.mark.parametrize("implementation", ["karat_portable", "sdpa"])
def test_ways_agree(family, implementation):
    model = set_gamma(karatize(family, **OPERATOR), 1.0)
    images = images_for(model)
    set_attention(model, "eager")
    expected = features(model, images)
    set_attention(model, implementation)
    torch.testing.assert_close(features(model, images), expected, rtol=1e-4, atol=1e-5)


def operator(tokens: int, heads: int, **settings) -> KArAtOperator:
    torch.manual_seed(3)
    made = KArAtOperator(OperatorConfig.of(heads, None, 4, 0, (1, tokens), settings))
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return made.double()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"basis_type": "spline", "base_fn": "silu"},
        {"modular_mode": None},
        {"modular_mode": None, "karat_depth": 1},
        {"basis_type": "rational", "modular_mode": "w1_phi2"},
    ],
    ids=["fourier", "spline", "phi2_phi1", "full_rank", "rational_w1_phi2"],
)
@pytest.mark.parametrize("with_maps", [False, True])
def test_bias_and_masked_pairs_against_a_loop(settings, with_maps):
    """One query and one window at a time, the masked keys set to zero scores, phi left out of their sum."""
    windows, heads, tokens, scaling = 3, 2, 5, 0.5
    made = operator(tokens, heads, karat_rank=3, **settings)
    query, key, value = torch.randn(3, windows, heads, tokens, 4, dtype=torch.float64)
    bias = torch.randn(1, heads, tokens, tokens, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(windows, 1, tokens, tokens) > 0.4
    keep |= torch.eye(tokens, dtype=torch.bool)
    output, _ = biased_karat_attention(made, query, key, value, scaling, bias, keep, with_maps=with_maps)
    tensors = made.tensors(torch.float64)
    for window in range(windows):
        for token in range(tokens):
            seen = keep[window, 0, token]
            scores = torch.stack([query[window, h, token] @ key[window, h].T for h in range(heads)]) * scaling
            row = torch.where(seen, scores + bias[0, :, token], 0.0)[None, :, None]
            row = made.activate(row, tensors, seen[None, None, None])[0, :, 0]
            assert (row[:, ~seen] == 0).all()
            expected = torch.stack([row[h, seen] @ value[window, h, seen] for h in range(heads)])
            torch.testing.assert_close(output[window, :, token], expected)
    (found,) = torch.autograd.grad(output.sum(), bias)
    assert found.abs().sum() > 0


def test_chunks_change_nothing(monkeypatch):
    made = operator(4, 2)
    query, key, value = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    bias, keep = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.rand(5, 1, 4, 4) > 0.3
    results = []
    for chunk in (1, 2**24):
        monkeypatch.setattr("modeling_karat_vit.karat_heads._CHUNK", chunk)
        output, _ = biased_karat_attention(made, query, key, value, 0.5, bias, keep)
        gradients = torch.autograd.grad(output.square().sum(), [*made.edges.parameters()][1:2])
        results.append((output, *gradients))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_swin_windows_do_not_see_each_other():
    """In a shifted window, values of tokens behind the mask change nothing before it; each stage has its own heads."""
    model = set_gamma(karatize(make("swin"), layers=[1, 2], **OPERATOR), 1.0)
    assert [heads.heads for heads in heads_of(model)] == [2, 4]
    shifted = model.encoder.layers[0].blocks[1]
    mask = shifted.get_attn_mask(8, 8, torch.float32, torch.device("cpu"))
    hidden = torch.randn(4, 16, 8)
    changed = hidden.clone()
    changed[3, 0] += 1.0  # Window 3 has four regions of 2x2.
    region = mask[3, 0] == 0
    assert 0 < region.sum() < 16
    before, after = (shifted.attention(x, mask)[0][3] for x in (hidden, changed))
    assert torch.equal(before[~region], after[~region])
    assert not torch.allclose(before[region], after[region])


@pytest.mark.parametrize("start", ["residual", "replace"])
def test_gates_and_positions_stay(start):
    """In ConViT's gated blocks KArAt is in the place of one of two softmaxes, or beside it; other heads are timm's."""
    source = make("convit_classifier")
    images, gated = images_for(source), source.timm_model.blocks[0].attn
    tokens = []
    gated.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    source(images)
    settings = {} if start == "residual" else {"images": images, "calibration_steps": 0}
    model = karatize(source, layers=[0], heads=1, start=start, **settings, **OPERATOR)
    if start == "residual":
        set_gamma(model, 0.7)
    (heads,) = heads_of(model)
    assert heads.operator.config.num_tokens == 4  # No class token yet.
    maps = model(images, output_attentions=True).attentions
    assert [tuple(found.shape) for found in maps] == [(2, 2, 4, 4), (2, 2, 5, 5)]
    expected = gated.get_attention(tokens[0])
    query, key = gated.qk(tokens[0]).unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = (query @ key.mT * gated.scale)[:, :1]
    karat = heads.operator.activate(scores, heads.operator.tensors(torch.float32), None)
    gate = gated.gating_param[0].sigmoid()
    own = expected[:, :1] - (1 - gate) * scores.softmax(-1) if start == "replace" else expected[:, :1]
    torch.testing.assert_close(maps[0][:, :1], own + (1 - gate) * karat * (0.7 if start == "residual" else 1.0))
    torch.testing.assert_close(maps[0][:, 1:], expected[:, 1:])
    values = gated.v(tokens[0]).unflatten(2, (2, -1)).permute(0, 2, 1, 3)
    block = model.timm_model.blocks[0].attn
    torch.testing.assert_close(block(tokens[0]), gated.proj((maps[0] @ values).transpose(1, 2).flatten(2)))
    assert block.maps is None and model(images).attentions is None
    torch.testing.assert_close(model(images, output_attentions=True, return_dict=False)[1], maps, rtol=0, atol=0)


def test_a_checkpoint_of_timm(tmp_path):
    """With timm's own configuration and names of weights, and an image processor that comes along."""
    source = make("convit_classifier")
    save_as_timm(source, tmp_path / "timm")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "timm").eval()
    images = images_for(source)
    expected = source(images).logits
    assert torch.equal(loaded(images).logits, expected)
    loaded.config.id2label = {0: "dog", 1: "eel", 2: "fox"}
    karatize(loaded, **OPERATOR).save_pretrained(tmp_path / "karat")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "karat").eval()
    assert torch.equal(again(images).logits, expected) and again.config.id2label[1] == "eel"
    processors = [AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("timm", "karat")]
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    own, karat = (processor(image)["pixel_values"] for processor in processors)
    assert torch.equal(own, karat) and abs(float(karat[0, 0, 0, 0]) - (200 / 255 - 0.1) / 0.5) < 1e-5


def test_convit_of_the_paper():
    """The last two blocks are the plain ones, with a class token; those before have 196 tokens."""
    config = TimmWrapperConfig(architecture="convit_tiny", num_labels=10)
    model = karatize(TimmWrapperForImageClassification(config), layers=[0, -2, -1], heads=1)
    assert [heads.operator.config.num_tokens for heads in heads_of(model)] == [196, 197, 197]
    assert [type(block.attn).__name__ for block in model.timm_model.blocks] == ["KArAtGPSA"] * 10 + ["KArAtMHSA"] * 2
    with pytest.raises(ValueError, match="img_size"):  # timm does not resize its positions.
        karatize(make("convit"), image_size=12)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit", [5, 5]),
        ("deit", [6, 6]),
        ("dinov2", [5, 5]),
        ("registers", [9, 9]),
        ("vit_mae", [5, 5]),
        ("beit", [5, 5]),
        ("clip", [5, 5]),
        ("siglip", [4, 4]),
        ("swin", [16, 16, 16]),
        ("vitdet", [4, 9]),  # A window, and all patches.
        ("convit", [4, 5]),
    ],
)
def test_tokens_of_each_block(name, tokens):
    """Each has an operator for its own tokens: special ones and patches, or a window."""
    model = karatize(make(name), layers=range(len(tokens)), **OPERATOR)
    assert [heads.operator.config.num_tokens for heads in heads_of(model)] == tokens


def test_mask_of_keys():
    """Keys that may not be seen leave no trace."""
    model = set_gamma(karatize(make("vit"), **OPERATOR), 1.0)
    images = images_for(model)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    blind = images.clone()
    blind[0, :, 4:, 4:] += 3.0
    for implementation in ("sdpa", "eager", "karat_portable"):
        model.set_attn_implementation(implementation)
        seen, unseen = (model(pixel_values=x, attention_mask=mask).last_hidden_state for x in (images, blind))
        torch.testing.assert_close(seen[:, :4], unseen[:, :4])


@pytest.mark.parametrize(("name", "biased"), [("vitdet", False), ("vitdet_backbone", True)])
def test_vitdet_forms_maps_for_its_biases_alone(name, biased, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "modeling_karat_vit.karat_heads.biased_karat_attention",
        lambda *args, **kwargs: calls.append(1) or biased_karat_attention(*args, **kwargs),
    )
    model = karatize(make(name), **OPERATOR)
    features(model, images_for(model))
    assert len(calls) == (2 if biased else 0)


def test_tokens_in_natural_order():
    source = make("vit_mae")
    model = karatize(source, **OPERATOR)
    images = images_for(model)
    assert torch.equal(model(images).last_hidden_state, features(source, images))
    with pytest.raises(ValueError, match="noise"):
        model(images, noise=torch.tensor([[0.0, 2.0, 1.0, 3.0]]).expand(2, -1))


def test_another_image_size():
    source = make("dinov2")
    images = torch.randn(1, 3, 12, 8)
    with pytest.raises(ValueError, match="image_size"):
        karatize(source, **OPERATOR)(images)
    model = karatize(source, image_size=(12, 8), **OPERATOR)
    assert torch.equal(model(images).last_hidden_state, source(images).last_hidden_state)
    assert heads_of(model)[0].operator.config.num_tokens == 7


def test_weights_dtype_and_training_state_are_kept():
    source = make("dinov2").to(torch.bfloat16).train()
    source.embeddings.requires_grad_(False)
    model = karatize(source, **OPERATOR)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.embeddings.cls_token.requires_grad and model.layernorm.weight.requires_grad
    with torch.no_grad():
        source.layernorm.weight.zero_()
    assert model.layernorm.weight.abs().sum() > 0
    images = images_for(source).bfloat16()
    assert features(copy.deepcopy(model), images).dtype == torch.bfloat16


def test_checkpoint_without_a_weight_is_refused(tmp_path):
    model = karatize(make("dinov2"), **OPERATOR)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("gamma")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="gamma"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [case for cases in UNSUPPORTED.values() for case in cases],
    ids=[f"{name} {index}" for name, cases in UNSUPPORTED.items() for index, _ in enumerate(cases)],
)
def test_what_cannot_be_supported(make_model, reason):
    with pytest.raises(ValueError, match=reason):
        karatize(make_model(), layers=[0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": [2]}, "layers"),
        ({"layers": [0, -2]}, "layers"),
        ({"layers": []}, "layers"),
        ({"heads": 3}, "heads"),
        ({"heads": 0}, "heads"),
        ({"start": "zero"}, "start"),
        ({"start": "replace"}, "images"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "images"),
        ({"grid": 3}, "grid"),
        ({"grid_size": 0}, "grid_size"),
        ({"sharing": "universal"}, "sharing"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(ValueError, match=f"`{named}"):
        karatize(make("vit"), **settings)
