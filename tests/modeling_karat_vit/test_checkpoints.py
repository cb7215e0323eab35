# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: stored checkpoints, round trips, shards, devices, offloading, other heads, other structures."""

import json
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, set_seed

from modeling_karat_vit import (
    KArAtViTBackbone,
    KArAtViTConfig,
    KArAtViTForImageClassification,
    KArAtViTForMaskedImageModeling,
    KArAtViTModel,
)
from modeling_karat_vit.karat_operator import KArAtOperator
from modeling_karat_vit.modeling_karat_vit import AttentionMasks


FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = sorted(path.name for path in FIXTURES.iterdir())
MIXED = {"num_karat_heads": 1, "karat_layers": [1]}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------- stored checkpoints


def test_one_checkpoint_is_stored_per_basis():
    stored = [json.loads((FIXTURES / name / "config.json").read_text()) for name in STORED]
    kinds = {c["wavelet_type"] if c["basis_type"] == "wavelet" else c["basis_type"] for c in stored}
    assert kinds == set(STORED)
    assert kinds == {"fourier", "spline", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon"}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("backend", ["eager", "karat_portable"])
def test_stored_checkpoints_keep_loading(name, backend):
    model, info = KArAtViTForImageClassification.from_pretrained(
        FIXTURES / name, output_loading_info=True, attn_implementation=backend
    )
    assert not any(info.values())
    assert model.config.id2label == {0: "circle", 1: "square", 2: "star"}
    expected = torch.tensor(json.loads((FIXTURES / name / "expected_logits.json").read_text()), dtype=torch.float64)
    pixels = torch.sin(torch.arange(2 * 8 * 12, dtype=torch.float64) * 0.37).view(2, 1, 8, 12)
    with torch.no_grad():
        assert torch.allclose(model.double()(pixels).logits, expected, rtol=0, atol=1e-9)
        assert torch.allclose(model.float()(pixels.float()).logits, expected.float(), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ round trips


def test_saved_models_load_bit_by_bit(make_model, pixels, tmp_path, shared_form):
    model = make_model(**shared_form, base_fn="silu")
    model.save_pretrained(tmp_path)
    loaded, info = KArAtViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert not loaded.training


@pytest.mark.parametrize("original_format", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_names_and_dtypes(make_model, tmp_path, original_format, dtype):
    model = make_model(dtype=dtype, **MIXED)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    # Trainer resumes by the present names; the old ones are for those who ask.
    assert (names == set(model.state_dict())) != original_format
    assert any(name.startswith("vit.encoder.layer.") for name in names) == original_format
    loaded, info = KArAtViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_weights_are_safetensors_alone_and_code_lies_beside(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    code = {path.name for path in Path(__file__).parents[2].joinpath("modeling_karat_vit").glob("*.py")}
    assert {"config.json", "model.safetensors", "modeling_karat_vit.py", "configuration_karat_vit.py"} <= names
    assert names - {"config.json", "model.safetensors"} <= code


@pytest.mark.parametrize(
    "cls", [KArAtViTModel, KArAtViTForImageClassification, KArAtViTForMaskedImageModeling, KArAtViTBackbone]
)
def test_all_auto_classes_are_named_whichever_class_saved(make_model, tmp_path, cls):
    make_model(cls).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_karat_vit.KArAtViTConfig",
        "AutoModel": "modeling_karat_vit.KArAtViTModel",
        "AutoModelForImageClassification": "modeling_karat_vit.KArAtViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_karat_vit.KArAtViTForMaskedImageModeling",
        "AutoBackbone": "modeling_karat_vit.KArAtViTBackbone",
    }
    assert config["format_version"] == 1 and config["architectures"] == [cls.__name__]
    assert type(AutoConfig.from_pretrained(tmp_path)) is KArAtViTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is KArAtViTModel
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is KArAtViTForImageClassification


def test_shards(make_model, pixels, tmp_path, sharing):
    model = make_model(sharing=sharing)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    assert not list(tmp_path.glob("*.bin"))
    loaded, info = KArAtViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_base_and_head_load_from_each_other(make_model, tmp_path):
    head = make_model()
    head.save_pretrained(tmp_path / "head")
    base, info = KArAtViTModel.from_pretrained(tmp_path / "head", output_loading_info=True, add_pooling_layer=False)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    assert_same_state(base.state_dict(), head.vit.state_dict())
    base.save_pretrained(tmp_path / "base")
    again, info = KArAtViTForImageClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert_same_state(again.vit.state_dict(), head.vit.state_dict())


# -------------------------------------------------------------------------------------------------- initialisation


def test_nothing_is_initialised_from_what_memory_held(make_config, shared_form):
    """Loading makes a model on the meta device: everything that is missing has to get its starting value afterwards."""
    config = make_config(**shared_form)
    with torch.device("meta"):
        built = KArAtViTForImageClassification(config)
    assert {tensor.device.type for tensor in built.state_dict().values()} == {"meta"}
    built.to_empty(device="cpu")
    for module in built.modules():
        module._is_hf_initialized = False
    for parameter in built.parameters():
        nn.init.constant_(parameter, torch.nan)
        parameter._is_hf_initialized = False
    set_seed(0)
    built.initialize_weights()
    assert all(torch.isfinite(tensor).all() for tensor in built.state_dict().values())
    set_seed(0)
    loaded, info = KArAtViTForImageClassification.from_pretrained(
        None, config=config, state_dict={}, output_loading_info=True
    )
    assert info["missing_keys"] == set(built.state_dict())
    assert_same_state(loaded.state_dict(), built.state_dict())


def test_loaded_parameters_are_left_alone_when_others_are_initialised(make_model, make_config):
    model = make_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "cos_coef" not in name}
    loaded, info = KArAtViTForImageClassification.from_pretrained(
        None, config=make_config(), state_dict=dict(state), output_loading_info=True
    )
    assert info["missing_keys"] == set(model.state_dict()) - set(state)
    for name, tensor in loaded.state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name])
        else:
            assert torch.isfinite(tensor).all() and not torch.equal(tensor, model.state_dict()[name])


# --------------------------------------------------------------------------------------------- other heads and sizes


def test_the_head_can_be_replaced(make_model, pixels, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        KArAtViTForImageClassification.from_pretrained(tmp_path, num_labels=9)
    loaded, info = KArAtViTForImageClassification.from_pretrained(
        tmp_path, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded(pixels).logits.shape == (4, 9) and len(loaded.config.id2label) == 9
    assert_same_state(loaded.vit.state_dict(), model.vit.state_dict())
    assert loaded.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


OTHER_STRUCTURES = {
    "basis_type": "spline",
    "grid_size": 5,
    "karat_rank": 4,
    "modular_mode": None,
    "sharing": "universal",
    "num_karat_heads": 1,
    "karat_layers": [0],
    "base_fn": "silu",
    "project_l1": True,
    "image_size": 16,
    "patch_size": 2,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_channels": 1,
}


@pytest.mark.parametrize(("name", "value"), OTHER_STRUCTURES.items())
def test_another_structure_than_the_stored_one_raises(make_config, make_model, tmp_path, name, value):
    make_model().save_pretrained(tmp_path / "checkpoint")
    make_config(**{name: value}).save_pretrained(tmp_path / "other")
    stored = json.loads((tmp_path / "checkpoint" / "config.json").read_text())[name]
    for choice in ({name: value}, {"config": make_config(**{name: value})}, {"config": str(tmp_path / "other")}):
        for cls in (KArAtViTForImageClassification, AutoModelForImageClassification):
            if cls is AutoModelForImageClassification and isinstance(choice.get("config"), str):
                continue  # takes no path
            with pytest.raises(ValueError) as error:
                cls.from_pretrained(tmp_path / "checkpoint", **choice)
            assert f"`{name}={stored!r}`" in str(error.value) and f"`{name}={value!r}`" in str(error.value)
    if name == "image_size":
        assert "model.resize" in str(error.value)


def test_the_same_structure_in_other_words_loads(make_model, make_config, tmp_path):
    model = make_model(image_size=8)
    model.save_pretrained(tmp_path)
    for choice in (
        {"image_size": [8, 8], "patch_size": (4, 4), "karat_rank": 3.0, "grid_range": [-4, 4]},
        {"config": make_config(image_size=8)},
        {"config": str(tmp_path)},
        {"drop_path_rate": 0.2, "hidden_dropout_prob": 0.1, "train_basis": False},
    ):
        loaded = KArAtViTForImageClassification.from_pretrained(tmp_path, **choice)
        assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.config.drop_path_rate == 0.2 and loaded.vit.layers[1].drop_path_rate == 0.2
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "cos_coef" in n)


def test_a_misspelt_keyword_raises_with_a_suggestion(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`karat_rnk` .did you mean `karat_rank`"):
        KArAtViTForImageClassification.from_pretrained(tmp_path, karat_rnk=3)


def test_a_newer_format_raises(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    edit_config(tmp_path, format_version=2)
    with pytest.raises(ValueError, match="newer release"):
        KArAtViTForImageClassification.from_pretrained(tmp_path)


def test_weights_of_another_structure_than_their_configuration_raise(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    edit_config(tmp_path, karat_rank=4)
    with pytest.raises(RuntimeError, match="mismatch"):
        KArAtViTForImageClassification.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------- devices


SPREADS = {
    "blockwise": {},
    "universal": {"sharing": "universal"},
    "full_rank": {"modular_mode": None, "karat_depth": 1},
}
SPREADS["universal_mixed"] = SPREADS["universal"] | MIXED
spreads = pytest.mark.parametrize("changes", SPREADS.values(), ids=SPREADS.keys())


@spreads
@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", {"": "cpu"}, {"": "disk"}, "some_on_disk"])
def test_device_maps(make_model, pixels, tmp_path, changes, device_map):
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    if device_map == "some_on_disk":
        device_map = {"vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layers.1": "disk"}
        device_map |= {"vit.operator": "disk"} if "sharing" in changes else {}
        device_map |= {"vit.layernorm": "cpu", "classifier": "disk"}
    loaded = KArAtViTForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    mask = torch.ones(4, 7)
    mask[:, 2] = 0
    for backend in ("karat_portable", "eager"):
        loaded.set_attn_implementation(backend)
        model.set_attn_implementation(backend)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(
                    loaded(pixels, attention_mask=mask).logits, model(pixels, attention_mask=mask).logits
                )


@spreads
@pytest.mark.parametrize("to_disk", [False, True])
def test_accelerate_offloads_every_weight(make_model, pixels, tmp_path, changes, to_disk):
    model = make_model(**changes)
    with torch.no_grad():
        expected = model(pixels).logits
    if to_disk:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, expected)


def test_blocks_are_not_split_over_devices(make_model):
    model = make_model(sharing="universal")
    sizes = accelerate.utils.compute_module_sizes(model)
    room = {0: sizes["vit.layers.0"] + sizes["vit.embeddings"] + sizes["vit.operator"] + 100, "cpu": 10**9}
    device_map = accelerate.infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    whole = {"vit.embeddings", "vit.operator", "vit.layers.0", "vit.layers.1"}
    assert len(set(device_map.values())) > 1
    for name in device_map:
        assert not any(name.startswith(f"{part}.") for part in whole), name


def test_what_blocks_are_handed_goes_to_their_device_but_not_the_operator(make_model):
    """The universal operator has a device of its own, and must not be dragged along by the hooks of the blocks."""
    model = make_model(sharing="universal")
    skip = model._skip_keys_device_placement
    masks = AttentionMasks(torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 1, 7, 7))
    moved = send_to_device({"operator": model.vit.operator, "masks": masks}, "meta", skip_keys=list(skip))
    assert isinstance(moved["operator"], KArAtOperator)
    assert {parameter.device.type for parameter in moved["operator"].parameters()} == {"cpu"}
    assert (moved["masks"].keep.device.type, moved["masks"].softmax.device.type) == ("meta", "meta")
    assert masks.keep.device.type == "cpu"
