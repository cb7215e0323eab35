# SPDX-License-Identifier: Apache-2.0
"""The configuration: normal forms, and clear errors for everything that cannot be built."""

import json

import pytest
from transformers import AutoConfig, BertConfig, DeiTConfig, ViTConfig

from modeling_karat_vit import KArAtViTConfig
from modeling_karat_vit.configuration_karat_vit import BASE_FUNCTIONS, FORMAT_VERSION


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"grid_size": 5.0, "karat_rank": 4.0, "spline_order": 2.0}, {"grid_size": 5, "karat_rank": 4}),
        ({"grid_range": [-2, 3]}, {"grid_range": (-2.0, 3.0)}),
        ({"grid_range": (-2.5, 3)}, {"grid_range": (-2.5, 3.0)}),
        ({"rational_order": [3.0, 2]}, {"rational_order": (3, 2)}),
        ({"rational_order": (3, 0)}, {"rational_order": (3, 0)}),
        ({"modular_mode": None, "karat_depth": 3.0}, {"modular_mode": None, "karat_depth": 3}),
        ({"num_karat_heads": 2.0}, {"num_karat_heads": 2}),
        ({"karat_layers": (-1, 0)}, {"karat_layers": [0, 11]}),
        ({"karat_layers": [3.0]}, {"karat_layers": [3]}),
        ({"drop_path_rate": 0}, {"drop_path_rate": 0.0}),
        ({"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}, {"hidden_dropout_prob": 0}),
        ({"image_size": (64, 32), "patch_size": (8, 4)}, {"image_size": [64, 32], "patch_size": [8, 4]}),
        ({"num_labels": 7}, {"num_labels": 7}),
    ],
)
def test_a_reloaded_configuration_equals_the_saved_one(given, normal, tmp_path):
    config = KArAtViTConfig(**given)
    config.save_pretrained(tmp_path)
    reloaded = KArAtViTConfig.from_pretrained(tmp_path)
    through_auto_class = AutoConfig.from_pretrained(tmp_path)
    for name, value in normal.items():
        assert getattr(config, name) == value
        assert type(getattr(config, name)) is type(value)
    for other in (reloaded, through_auto_class):
        assert type(other) is KArAtViTConfig
        assert other.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        for name, value in normal.items():
            assert getattr(other, name) == value and type(getattr(other, name)) is type(value)


OUT_OF_RANGE = [
    ("basis_type", "chebyshev", "'fourier', 'spline', 'wavelet', 'rational'"),
    ("basis_type", "FourierBasis", "'fourier'"),
    ("wavelet_type", "haar", "'mexican_hat', 'morlet', 'dog', 'meyer', 'shannon'"),
    ("base_fn", "__import__('os')", "'silu'"),
    ("base_fn", "nn.SiLU", "'silu'"),
    ("modular_mode", "w2_phi1", "'phi1_w2', 'w1_phi2', None"),
    ("sharing", "global", "'blockwise', 'universal'"),
    ("karat_init", "zeros", "'scaled', 'normal'"),
    ("grid_size", 0, "1 or more"),
    ("grid_size", 2.5, "integer"),
    ("grid_size", float("nan"), "integer"),
    ("grid_size", float("inf"), "integer"),
    ("spline_order", -1, "0 or more"),
    ("karat_rank", 0, "1 or more"),
    ("karat_rank", 1.5, "integer"),
    ("karat_depth", 0, "1 or more"),
    ("karat_depth", 3, "modular_mode"),
    ("karat_depth", 1, "modular_mode"),
    ("grid_range", (1, -1), "low < high"),
    ("grid_range", (1, 1), "low < high"),
    ("grid_range", (0, float("inf")), "finite"),
    ("grid_range", (0, 1, 2), "pair"),
    ("grid_range", ("a", "b"), "finite number"),
    ("rational_order", (5,), "pair"),
    ("rational_order", (-1, 4), "0 or more"),
    ("rational_order", (5, 1.5), "integer"),
    ("num_karat_heads", 0, "1 or more"),
    ("num_karat_heads", 13, "num_attention_heads"),
    ("karat_layers", [], "each once"),
    ("karat_layers", [12], "0 to 11"),
    ("karat_layers", [-13], "karat_layers"),
    ("karat_layers", [0, -12], "each once"),
    ("karat_layers", [0.5], "integer"),
    ("drop_path_rate", 1.0, "less than 1"),
    ("drop_path_rate", -0.1, "at least 0"),
    ("hidden_dropout_prob", 1.5, "0 to 1"),
    ("attention_probs_dropout_prob", -0.5, "0 to 1"),
    ("hidden_size", 770, "num_attention_heads"),
    ("hidden_size", 0, "1 or more"),
    ("num_hidden_layers", 0, "1 or more"),
    ("num_attention_heads", 0, "1 or more"),
    ("num_channels", 0, "1 or more"),
    ("intermediate_size", 0, "1 or more"),
    ("hidden_act", "geloo", "'gelu'"),
    ("image_size", 0, "1 or more"),
    ("image_size", [224, 224, 3], "pair"),
    ("image_size", [], "pair"),
    ("image_size", 8, "patch_size"),
    ("patch_size", 225, "image_size"),
    ("layer_norm_eps", -1.0, "layer_norm_eps"),
    ("format_version", FORMAT_VERSION + 1, "newer release"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OUT_OF_RANGE)
def test_a_value_out_of_range_raises_and_names_the_field(name, value, expected):
    with pytest.raises(ValueError) as error:
        KArAtViTConfig(**{name: value})
    assert name in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid_size", "3"),
        ("grid_size", True),
        ("grid_range", 4.0),
        ("karat_rank", None),
        ("basis_type", None),
        ("project_l1", "yes"),
        ("train_basis", 2),
        ("karat_layers", 1),
        ("num_karat_heads", "all"),
        ("problem_type", "many"),
    ],
)
def test_a_value_of_another_type_raises_and_names_the_field(name, value):
    with pytest.raises(Exception) as error:
        KArAtViTConfig(**{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize("name", [name for name in BASE_FUNCTIONS if name != "zero"])
def test_base_functions_are_known_to_transformers(name):
    from transformers.activations import ACT2FN

    assert ACT2FN[name] is not None
    assert KArAtViTConfig(base_fn=name).base_fn == name


@pytest.mark.parametrize(
    ("key", "hint"), [("grid_sise", "grid_size"), ("basis_typ", "basis_type"), ("karat_rnk", "karat_rank")]
)
def test_a_misspelt_key_raises_with_a_suggestion(key, hint):
    with pytest.raises(ValueError, match=f"`{key}` .did you mean `{hint}`"):
        KArAtViTConfig(**{key: 3})


def test_what_a_file_has_beyond_the_fields_is_kept_and_named_once(tmp_path, messages):
    KArAtViTConfig(karat_rank=5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 1e-3, "grid_sise": 4}))
    loaded = [
        KArAtViTConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        KArAtViTConfig.from_json_file(path),
        KArAtViTConfig.from_pretrained(tmp_path, return_unused_kwargs=True, device_map="cpu")[0],
    ]
    for config in loaded:
        assert (config.norm_eps, config.grid_sise, config.grid_size, config.karat_rank) == (1e-3, 4, 3, 5)
    said = [message for message in messages() if "norm_eps" in message]
    assert len(said) == 1 and "`grid_sise` (did you mean `grid_size`?)" in said[0]
    loaded[0].save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["norm_eps"] == 1e-3


def test_attributes_set_later_are_kept(make_config, tmp_path, messages):
    from modeling_karat_vit import KArAtViTForImageClassification

    config = make_config()
    config.norm_eps, config.tie_word_embeddings = 1e-3, False
    model = KArAtViTForImageClassification(config).resize((16, 12))
    model.save_pretrained(tmp_path)
    assert not messages()  # Only a file's are named.
    reloaded = KArAtViTForImageClassification.from_pretrained(tmp_path).config
    assert (reloaded.norm_eps, reloaded.tie_word_embeddings, reloaded.image_size) == (1e-3, False, [16, 12])


def test_an_unknown_key_that_resembles_nothing_raises_too():
    with pytest.raises(ValueError, match="`zzzzqqqq`"):
        KArAtViTConfig(zzzzqqqq=1)


def test_what_every_transformers_configuration_takes_is_taken(tmp_path):
    config = KArAtViTConfig(
        output_attentions=True,
        output_hidden_states=True,
        output_attention_scores=True,
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
        problem_type="multi_label_classification",
        attn_implementation="eager",
        dtype="bfloat16",
    )
    assert config.num_labels == 2
    assert config._attn_implementation == "eager"
    config.save_pretrained(tmp_path)
    assert KArAtViTConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b"}


def test_fields_as_keywords_are_checked_with_the_stored_ones(tmp_path):
    KArAtViTConfig(modular_mode="phi1_w2").save_pretrained(tmp_path)
    config = KArAtViTConfig.from_pretrained(tmp_path, modular_mode=None, karat_depth=3)
    assert (config.modular_mode, config.karat_depth) == (None, 3)
    with pytest.raises(ValueError, match="karat_depth"):
        KArAtViTConfig.from_pretrained(tmp_path, karat_depth=3)


def test_a_foreign_configuration_is_adopted_and_its_extra_keys_named_once(tmp_path, messages):
    ViTConfig(hidden_size=192, num_attention_heads=3, image_size=32, num_labels=7).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fancy_key": 1, "other_key": 2}))
    for _ in range(2):
        config = KArAtViTConfig.from_pretrained(tmp_path, karat_rank=5)
    assert (config.model_type, config.hidden_size, config.num_labels, config.karat_rank) == ("karat_vit", 192, 7, 5)
    said = [message for message in messages() if "fancy_key" in message]
    assert len(said) == 1 and "other_key" in said[0]


def test_a_deit_configuration_is_adopted():
    config = KArAtViTConfig.from_dict(DeiTConfig(hidden_size=96, num_attention_heads=2).to_dict())
    assert (config.model_type, config.hidden_size, config.format_version) == ("karat_vit", 96, FORMAT_VERSION)


def test_a_foreign_model_type_raises(tmp_path):
    with pytest.raises(ValueError, match="'bert'"):
        KArAtViTConfig.from_dict(BertConfig().to_dict())
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert'"):
        KArAtViTConfig.from_pretrained(tmp_path)


def test_changes_after_construction_are_checked_when_a_model_is_built(make_config):
    from modeling_karat_vit import KArAtViTModel

    config = make_config()
    config.karat_rank = 0
    with pytest.raises(ValueError, match="karat_rank"):
        KArAtViTModel(config)


def test_the_operator_is_described(make_config, form):
    text = make_config(**form, num_karat_heads=1, karat_layers=[1]).describe_operator()
    assert form.get("wavelet_type", form["basis_type"]).lower() in text.lower().replace("b-spline", "spline")
    assert "1 of 2 heads" in text and "[1]" in text


def test_tokens_are_counted_along_height_and_width():
    config = KArAtViTConfig(image_size=[64, 32], patch_size=[8, 16])
    assert config.patch_grid() == (8, 2) and config.num_tokens == 17
    assert config.patch_grid((16, 64)) == (2, 4)
