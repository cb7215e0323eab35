# SPDX-License-Identifier: Apache-2.0
"""From model arguments to models: presets, overrides, starting from other weights."""

import itertools

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from image_classification.errors import InputError
from image_classification.models.building import build_config, build_model, load_config, load_trained, presets
from image_classification.settings.arguments import ModelArguments
from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16, "image_size": 32}
LABELS = ["cat", "dog", "owl"]


def small(model="vit_tiny_patch16_224_karat", **settings):
    sizes = {**SMALL, "image_size": [32]}
    return ModelArguments(model=model, **{**sizes, **settings})


def test_preset_and_overrides():
    config = build_config(ModelArguments(model="vit_tiny_patch16_224_karat"))
    assert (config.hidden_size, config.grid_size, config.modular_mode) == (192, 3, "phi1_w2")
    config = build_config(small(grid_size=5, sharing="universal", modular_mode="none", karat_depth=3), LABELS)
    assert (config.hidden_size, config.grid_size, config.sharing) == (24, 5, "universal")
    assert (config.modular_mode, config.karat_depth, config.image_size) == (None, 3, 32)
    assert config.id2label == dict(enumerate(LABELS)) and config.num_labels == 3


def test_model_has_the_operator_asked_for():
    model = build_model(small(basis_type="rational", project_l1=True, train_basis=False), LABELS)
    assert "rational" in model.config.describe_operator() and "basis frozen" in model.config.describe_operator()
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)


def test_softmax_baseline():
    model = build_model(small("vit_tiny_patch16_224", hidden_dropout_prob=0.1), LABELS)
    assert type(model) is ViTForImageClassification and model.config.hidden_dropout_prob == 0.1
    with pytest.raises(InputError, match="`grid_size` is a setting of KArAt"):
        build_model(small("vit_tiny_patch16_224", grid_size=3), LABELS)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_tiny_patch16_224_karat"])
def test_initializer_range(model):
    """Of ViT's own weights; KArAt's functions and projectors begin as they do."""
    built = [build_model(small(model, initializer_range=value), LABELS) for value in (None, 0.5)]
    assert [model.config.initializer_range for model in built] == [0.02, 0.5]
    for part in ("vit.layers.0.mlp.fc1.weight", "vit.layers.1.attention.q_proj.weight", "classifier.weight"):
        # Truncated at two standard deviations in newer Transformers, so a little less.
        narrow, wide = (model.get_parameter(part).std().item() for model in built)
        assert 0.015 < narrow < 0.025 and 0.375 < wide < 0.625, part
    karat = built[0].karat_parameter_names() if "karat" in model else []
    for name in karat:
        stds = [model.get_parameter(name).float().std(correction=0).item() for model in built]
        assert stds[0] == pytest.approx(stds[1], rel=0.5), name


def test_softmax_baseline_with_stochastic_depth(tmp_path):
    """As KArAt-ViT has it; configuration, parameters and checkpoints are those of Transformers' ViT."""
    settings = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 24}
    torch.manual_seed(0)
    plain = build_model(small("vit_tiny_patch16_224", **settings), LABELS).train()
    torch.manual_seed(0)
    dropped = build_model(small("vit_tiny_patch16_224", drop_path_rate=0.6, **settings), LABELS).train()
    assert type(dropped) is ViTForImageClassification
    assert list(dropped.state_dict()) == list(plain.state_dict()) and dropped.config.to_dict() == plain.config.to_dict()
    pixels = torch.randn(64, 3, 32, 32)

    def branches(model, index: int) -> list[torch.Tensor]:
        """What a block's attention and MLP add to the residual stream, by image."""
        layer, seen = model.vit.layers[index], []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            layer.layernorm_after.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            layer.register_forward_hook(lambda _, args, output: seen.append(output)),
        ]
        model(pixels)
        for hook in hooks:
            hook.remove()
        return [(after - before).detach() for before, after in itertools.pairwise(seen)]

    for index, rate in enumerate((0.0, 0.3, 0.6)):
        for branch in branches(dropped, index):
            out = (branch.abs().amax((1, 2)) < 1e-6).float().mean().item()
            assert out == pytest.approx(rate, abs=0.2), index
    # The first block has rate 0, and what enters the second is the same: those kept are scaled up.
    for ours, theirs in zip(branches(dropped, 1)[:1], branches(plain, 1)[:1], strict=True):
        kept = ours.abs().amax((1, 2)) > 1e-6
        assert torch.allclose(ours[kept], theirs[kept] / 0.7, atol=1e-5)
    assert torch.equal(dropped.eval()(pixels).logits, plain.eval()(pixels).logits)
    dropped.save_pretrained(tmp_path)
    again = load_trained(str(tmp_path), small("vit_tiny_patch16_224", drop_path_rate=0.6, **settings), LABELS)
    assert torch.equal(again.train()(pixels).logits, plain.eval()(pixels).logits)
    started = build_model(ModelArguments(finetune=str(tmp_path), drop_path_rate=0.6), LABELS).train()
    assert not torch.equal(started(pixels).logits, started(pixels).logits)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_stochastic_depth_out_of_range(rate):
    for model in ("vit_tiny_patch16_224", "vit_tiny_patch16_224_karat"):
        with pytest.raises(InputError, match="`drop_path_rate` is"):
            build_model(small(model, drop_path_rate=rate), LABELS)


@pytest.mark.parametrize("heads, karat", [(3, 1), (6, 3), (12, 6)])
def test_paper_number_of_karat_heads(heads, karat):
    assert build_config(small(num_attention_heads=heads, num_karat_heads=0)).num_karat_heads == karat


def test_no_paper_number_for_other_models():
    with pytest.raises(InputError, match="--num_attention"):
        build_config(small(num_attention_heads=4, num_karat_heads=0))


# What else its configuration refuses is in test_configuration.py.
@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"basis_type": "furier"}, ("basis_type", "furier", "fourier")),
        ({"patch_size": [64]}, ("patch_size", "image_size")),
        ({"attn_implementation": "karat_magic"}, ("karat_magic", "karat_portable")),
    ],
)
def test_impossible_models_say_why(settings, parts):
    with pytest.raises(InputError) as raised:
        build_model(small(**settings), LABELS)
    assert all(part in str(raised.value) for part in parts)


def test_unknown_models_list_the_presets(tmp_path):
    with pytest.raises(InputError, match="did you mean `vit_tiny_patch16_224_karat`"):
        build_config(ModelArguments(model="vit_tiny_patch16_224_kara"))
    with pytest.raises(InputError, match=r"No model is named.*karat_digits"):
        build_config(ModelArguments())
    with pytest.raises(InputError, match=r"holds no config\.json"):
        build_config(ModelArguments(finetune=str(tmp_path)))
    with pytest.raises(InputError, match="no such folder"):
        build_config(ModelArguments(finetune="./nowhere"))
    assert "vit_base_patch16_224" in presets()


def test_only_rgb(tmp_path):
    KArAtViTConfig(num_channels=1, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="num_channels"):
        build_config(ModelArguments(model=str(tmp_path)))


@pytest.fixture
def karat_checkpoint(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "karat"
    config = KArAtViTConfig(**SMALL, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})
    KArAtViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def softmax_checkpoint(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "softmax"
    ViTForImageClassification(ViTConfig(**SMALL, num_labels=5)).save_pretrained(folder)
    return str(folder)


def test_finetune_the_same_model(karat_checkpoint):
    source = KArAtViTForImageClassification.from_pretrained(karat_checkpoint).state_dict()
    same = build_model(ModelArguments(finetune=karat_checkpoint), LABELS).state_dict()
    assert all(torch.equal(source[name], same[name]) for name in source)
    other = build_model(ModelArguments(finetune=karat_checkpoint), ["a", "b"])
    assert other.config.id2label == {0: "a", 1: "b"} and other.classifier.out_features == 2
    assert torch.equal(other.vit.layernorm.weight, source["vit.layernorm.weight"])


def test_finetune_at_another_size_resamples(karat_checkpoint, softmax_checkpoint):
    for folder in (karat_checkpoint, softmax_checkpoint):
        # Two classes where the checkpoints have three and five.
        model = build_model(ModelArguments(finetune=folder, image_size=[48]), ["left", "right"])
        assert model.config.image_size == 48 and model.config.id2label == {0: "left", 1: "right"}
        assert model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 2)
        assert model.vit.embeddings.position_embeddings.shape[1] == 10


def test_softmax_resampling_is_transformers_interpolation(softmax_checkpoint):
    source = ViTForImageClassification.from_pretrained(softmax_checkpoint).eval()
    model = build_model(ModelArguments(finetune=softmax_checkpoint, image_size=[48]), [*"abcde"]).eval()
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model(pixels).logits, source(pixels, interpolate_pos_encoding=True).logits)


def test_karat_takes_over_a_softmax_backbone(softmax_checkpoint):
    source = ViTForImageClassification.from_pretrained(softmax_checkpoint).state_dict()
    model = build_model(small(finetune=softmax_checkpoint), LABELS)
    state, karat = model.state_dict(), model.karat_parameter_names()
    assert all(
        torch.equal(source[name], state[name]) for name in state if name not in karat and "classifier" not in name
    )


def test_karat_takes_over_a_distilled_deit(tmp_path):
    DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="drop_distillation_token"):
        build_model(small(finetune=str(tmp_path)), LABELS)
    model = build_model(small(finetune=str(tmp_path), drop_distillation_token=True, image_size=[48]), LABELS)
    source = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    assert torch.equal(model.vit.layernorm.weight, source.deit.layernorm.weight)
    assert model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)
    with pytest.raises(InputError, match="starts from 'vit' checkpoints"):
        build_model(small("vit_tiny_patch16_224", finetune=str(tmp_path)), LABELS)


@pytest.mark.parametrize("settings", [{"grid_size": 5}, {"hidden_size": 48}, {"basis_type": "spline"}])
def test_weights_of_another_model_are_refused(karat_checkpoint, settings):
    for named in (small(finetune=karat_checkpoint, **settings), ModelArguments(finetune=karat_checkpoint, **settings)):
        with pytest.raises(InputError, match=next(iter(settings))):
            build_model(named, LABELS)


def test_backbone_of_another_width_is_refused(softmax_checkpoint):
    with pytest.raises(InputError, match=r"hidden_size|do not fit"):
        build_model(small(finetune=softmax_checkpoint, hidden_size=48), LABELS)


def test_trained_checkpoint_must_be_what_was_asked_for(karat_checkpoint):
    assert load_trained(karat_checkpoint, ModelArguments(), LABELS).config.grid_size == 3
    assert load_trained(karat_checkpoint, ModelArguments(grid_size=3), LABELS).config.grid_size == 3
    with pytest.raises(InputError, match="`grid_size` 3, not 5"):
        load_trained(karat_checkpoint, ModelArguments(grid_size=5), LABELS)
    with pytest.raises(InputError, match=r"3 classes .*cat, dog, owl.*--finetune"):
        load_trained(karat_checkpoint, ModelArguments(), ["cat", "dog", "emu"])


def test_official_weight_files_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "best_checkpoint.pth"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="convert_timm_state_dict"):
        build_model(ModelArguments(finetune=str(path)), LABELS)


def test_a_damaged_configuration_is_called_that(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "karat_vit"', encoding="utf-8")
    with pytest.raises(InputError, match=r"`finetune` .*config\.json cannot be read"):
        load_config(str(tmp_path), "finetune")
