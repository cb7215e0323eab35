# SPDX-License-Identifier: Apache-2.0
"""
Adapters of PEFT: every command loads their folders, and their repositories on the Hub, as models; and they never get
the base model's weights.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

import predict
from analysis import __main__ as analyses
from analysis.demo.command import load_viewers
from analysis.models import load_checkpoint
from image_classification import main as script
from image_classification.errors import InputError
from image_classification.models.building import build_model
from image_classification.models.loading import ADAPTER_WEIGHTS, load_image_processor, load_model
from image_classification.settings.arguments import ModelArguments, RunArguments
from image_classification.training.trainer import ImageClassificationTrainer
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


# Where it does not matter of what model it is.
karat = pytest.mark.parametrize("adapter", ["karat"], indirect=True)


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


def push(hub, name: str, folder: Path | str) -> str:
    """A repository of the files of a folder, which is gone then."""
    hub.add(name, {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    shutil.rmtree(folder)
    return name


def point(adapter: Path, base: str) -> None:
    """Name another base model."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@torch.no_grad()
@karat
@pytest.mark.parametrize("base_on_hub", [True, False])
def test_an_adapter_on_the_hub_loads_as_its_model(base_on_hub, adapter, hub, tmp_path, capsys):
    folder, base, pixels, expected = adapter
    if base_on_hub:
        point(folder, push(hub, "me/base", base))
    name = push(hub, "me/adapter", folder)
    started = build_model(ModelArguments(finetune=name), ["a", "b"]).eval()
    for model in (load_model(name, "--model")[0].eval(), load_checkpoint(name).model, started):
        torch.testing.assert_close(model(pixels).logits, expected, atol=1e-5, rtol=1e-5)
    image = tmp_path / "image.png"
    Image.new("RGB", (9, 9), "red").save(image)
    assert predict.main([str(image), "--model", name]) == 0
    assert "%" in capsys.readouterr().out
    (viewer,) = load_viewers(name)  # Of the page.
    assert viewer.see(str(image)).maps


@karat
@pytest.mark.parametrize("base", ["outputs/gone", "/outputs/gone", "me/gone"])
@pytest.mark.parametrize("on_hub", [True, False])
def test_a_base_model_that_is_missing_is_one_line(base, on_hub, adapter, hub, capsys):
    folder = adapter[0]
    point(folder, base)
    source = push(hub, "me/adapter", folder) if on_hub else str(folder)
    for command in (
        lambda: predict.main(["image.png", "--model", source]),
        lambda: script.main(["--eval", "--resume", source, "--data_set", "digits", "--use_cpu"]),
        lambda: script.main(
            ["--finetune", source, "--data_set", "digits", "--use_cpu", "--output_dir", f"{folder}-out"]
        ),
        lambda: analyses.main(["functions", "--model", source]),
    ):
        assert command() == 2
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1
        assert source in message and "`base_model_name_or_path`" in message and base in message


@karat
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_hub_that_refuses_an_adapters_file_is_named(file, adapter, hub, capsys):
    name = push(hub, "me/adapter", adapter[0])
    hub.fail(rf"/{re.escape(file)}", 403, 99)
    assert predict.main(["image.png", "--model", name]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and name in message and "told so" in message


@karat
def test_an_adapter_that_names_itself_as_its_base(adapter):
    point(adapter[0], str(adapter[0]))
    with pytest.raises(InputError, match="base_model_name_or_path"):
        load_model(str(adapter[0]), "--model")


@karat
def test_a_space_takes_no_adapter(adapter):
    from analysis.demo.space import files
    from analysis.demo.viewer import Viewer

    with pytest.raises(InputError, match=r"adapter of .*base"):
        files([Viewer(load_checkpoint(str(adapter[0])), "adapter")], [])


def train_and_save(model, lora: LoraConfig, way: str, folder: Path):
    """The model with an adapter that was changed and saved: by PEFT, by Transformers, or by our Trainer."""
    if way == "transformers":
        model.add_adapter(lora)
    else:
        model = get_peft_model(model, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    if way == "trainer":
        args = RunArguments(output_dir=str(folder), use_cpu=True, eval_strategy="no")
        ImageClassificationTrainer(model=model, args=args).save_model()
    else:
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kind, fields, way",
    [
        *(("karat", {}, way) for way in ("peft", "transformers", "trainer")),
        ("karat", {"sharing": "universal"}, "trainer"),
        ("softmax", {}, "transformers"),
    ],
)
@torch.no_grad()
def test_an_adapter_folder_has_no_base_weights_and_comes_back_bit_equal(kind, fields, way, tmp_path):
    base = save_checkpoint(make_model(kind, labels=["a", "b"], **fields), tmp_path / "base")
    saved = ["classifier", "operator"] if kind == "karat" else ["classifier"]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model, folder = load_model(base, "--model")[0], tmp_path / "adapter"
    model = train_and_save(model, lora, way, folder)
    assert [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")] == [ADAPTER_WEIGHTS]
    weights = load_file(folder / ADAPTER_WEIGHTS)
    others = {name for name in weights if not re.search(r"\.lora_[AB]\.weight$", name)}
    assert {part for name in others for part in saved if f".{part}." in name} == set(saved)
    assert all(any(f".{part}." in name for part in saved) for name in others)
    back = PeftModel.from_pretrained(load_model(base, "--model")[0], folder).eval()
    again = get_peft_model_state_dict(back)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(pixels).logits, model(pixels).logits)
    merged = load_model(str(folder), "--model")[0].eval()
    torch.testing.assert_close(merged(pixels).logits, model(pixels).logits)


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
