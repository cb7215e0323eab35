# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT: every command loads their folders as models, and they never get the base model's weights."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import predict
from analysis.models import load_checkpoint
from image_classification.errors import InputError
from image_classification.models.building import build_model
from image_classification.models.loading import load_image_processor, load_model
from image_classification.settings.arguments import ModelArguments
from modeling_karat_vit import KArAtViTForImageClassification
from tests.models import make_model, save_checkpoint


@pytest.fixture(params=["karat", "softmax"])
def adapter(request, tmp_path):
    """An adapter's folder, its base's, and the logits that it was saved with: new head, and for KArAt new functions."""
    base = save_checkpoint(make_model(request.param, labels=["a", "b"]), tmp_path / "base")
    model, _ = load_model(base, "--model")
    save = ["classifier", "operator"] if request.param == "karat" else ["classifier"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=save))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        return tmp_path / "adapter", tmp_path / "base", pixels, adapted.eval()(pixels).logits


@torch.no_grad()
def test_an_adapter_loads_as_its_model(adapter):
    folder, base, pixels, expected = adapter
    model, new = load_model(str(folder), "--model")
    assert not new
    torch.testing.assert_close(model.eval()(pixels).logits, expected)
    assert not torch.allclose(load_model(str(base), "--model")[0].eval()(pixels).logits, expected)
    assert load_image_processor(str(folder), "--model", 8) is not None
    checkpoint = load_checkpoint(str(folder))
    torch.testing.assert_close(checkpoint.model(pixels).logits, expected)
    assert checkpoint.has_classifier


@torch.no_grad()
def test_training_starts_from_an_adapter(adapter):
    folder, _, pixels, expected = adapter
    model = build_model(ModelArguments(finetune=str(folder)), ["a", "b"])
    torch.testing.assert_close(model.eval()(pixels).logits, expected, atol=1e-5, rtol=1e-5)
    other = build_model(ModelArguments(finetune=str(folder)), ["x", "y", "z"])
    for name, parameter in model.vit.named_parameters():
        assert torch.equal(parameter, other.vit.get_parameter(name)), name
    assert other.classifier.out_features == 3


def test_an_adapter_predicts(adapter, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (9, 9), "red").save(image)
    assert predict.main([str(image), "--model", str(adapter[0])]) == 0
    assert "%" in capsys.readouterr().out


def test_an_adapter_for_other_classes(tmp_path):
    base = save_checkpoint(make_model(labels=["a", "b"]), tmp_path / "base")
    model = KArAtViTForImageClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"), "--model")[0].config.num_labels == 5
    # Their names are those of the configuration beside it.
    model.config.update({"id2label": dict(enumerate("vwxyz")), "label2id": {name: i for i, name in enumerate("vwxyz")}})
    model.config.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"), "--model")[0].config.id2label[4] == "z"


def test_a_space_takes_no_adapter(adapter):
    from analysis.demo.space import files
    from analysis.demo.viewer import Viewer

    with pytest.raises(InputError, match=r"adapter of .*base"):
        files([Viewer(load_checkpoint(str(adapter[0])), "adapter")], [])


def test_an_adapter_folder_never_gets_base_weights(tmp_path):
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    weights = [path.name for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert weights == ["adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4096


@pytest.mark.parametrize("damage", ["base", "rank", "truncated", "no weights", "names"])
def test_what_is_wrong_with_an_adapter_is_named(tmp_path, damage):
    base = save_checkpoint(make_model(labels=["a", "b"]), tmp_path / "base")
    folder = tmp_path / "adapter"
    adapted = get_peft_model(load_model(base, "--model")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    changes = {
        "base": {"base_model_name_or_path": str(tmp_path / "gone")},
        "rank": {"r": 3},
        "names": {"target_modules": ["q_proj", "k_proj"]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes.get(damage, {})))
    weights = folder / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:50])
    if damage == "no weights":
        weights.unlink()
    named = {"base": "gone", "names": "k_proj"}.get(damage, "adapter")
    with pytest.raises(InputError, match=named) as error:
        load_model(str(folder), "--model")
    assert "\n" not in str(error.value)
