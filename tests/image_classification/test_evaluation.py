# SPDX-License-Identifier: Apache-2.0
"""`--eval` as a whole command: on a part of a model's classes, without images to train on, and of adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from image_classification import main as script
from image_classification.data.images import read_image
from image_classification.models.loading import load_image_processor, load_model
from tests.backbones import make, save_as_timm
from tests.images import make_image_folder
from tests.models import make_model, save_checkpoint


LABELS = ["red", "yellow", "blue", "green"]  # In no order of the alphabet.


def evaluate(source: str, images: Path, folder: Path) -> dict:
    """What the command writes."""
    words = ["--eval", "--resume", source, "--data_path", str(images), "--use_cpu", "--disable_tqdm"]
    assert script.main([*words, "--output_dir", str(folder)]) == 0
    return json.loads((folder / "eval_results.json").read_text())


@torch.no_grad()
def by_hand(model, processor, images: Path) -> dict:
    """The figures, image by image."""
    found = sorted(images.rglob("*.jpg"))
    logits = torch.cat([model.eval()(**processor(read_image(path), return_tensors="pt")).logits for path in found])
    names = [path.stem.partition("-")[0] if "-" in path.stem else path.parent.name for path in found]
    labels = torch.tensor([model.config.label2id[name] for name in names])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return {"eval_loss": pytest.approx(loss, rel=1e-4), "eval_accuracy": pytest.approx(accuracy)}


@pytest.fixture
def source(tmp_path):
    return save_checkpoint(make_model(labels=LABELS, seed=1), tmp_path / "model")


def flatten(folder: Path) -> None:
    """Put the images of class folders side by side, and their classes into a metadata.csv."""
    lines = ["file_name,label"]
    for path in sorted(folder.glob("*/*.jpg")):
        name = f"{path.parent.name}-{path.name}"
        path.rename(folder / name)
        lines.append(f"{name},{path.parent.name}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("layout", ["validation", ".", "metadata"])
def test_a_part_of_the_classes_without_images_to_train_on(layout, source, tmp_path):
    """The data's classes have the model's labels, by their names."""
    split = "." if layout == "." else "validation"
    images = make_image_folder(tmp_path / "images", splits=((split, 8),), classes=("blue", "green", "red"))
    if layout == "metadata":
        flatten(images / split)
    figures = evaluate(source, images, tmp_path / "figures")
    expected = by_hand(load_model(source, "--model")[0], load_image_processor(source, "--model"), images)
    assert {name: figures[name] for name in expected} == expected


def test_a_class_that_the_model_does_not_know(source, tmp_path, capsys):
    images = make_image_folder(tmp_path / "images", splits=(("validation", 2),), classes=("blue", "violet"))
    assert script.main(["--eval", "--resume", source, "--data_path", str(images), "--use_cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert "violet" in message and len(message.splitlines()) == 1


def test_classes_of_one_name_are_told_apart_by_nothing(tmp_path, capsys):
    """As the two cranes of timm's ImageNet."""
    save_as_timm(make("convit_classifier"), tmp_path / "model", label_names=["red", "red", "blue"])
    images = make_image_folder(tmp_path / "images", splits=(("validation", 2),), classes=("blue", "red"))
    assert script.main(["--eval", "--resume", str(tmp_path / "model"), "--data_path", str(images), "--use_cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert "knows 3 classes (red, red, blue)" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("on_hub", [True, False])
def test_an_adapter(on_hub, source, hub, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier", "operator"])
    adapted, folder = get_peft_model(load_model(source, "--model")[0], lora), tmp_path / "adapter"
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    adapter = str(folder)
    if on_hub:
        hub.add("me/adapter", {path.name: path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(folder)
        adapter = "me/adapter"
    images = make_image_folder(tmp_path / "images", splits=(("validation", 8),))
    figures = evaluate(adapter, images, tmp_path / "figures")
    expected = by_hand(adapted, load_image_processor(source, "--model"), images)
    assert {name: figures[name] for name in expected} == expected
    assert figures["checkpoint"] == adapter
