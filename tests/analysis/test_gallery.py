# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re
from pathlib import Path

import pytest

from analysis import gallery
from image_classification.main import main as train
from image_classification.settings.parser import parse_settings


SOFTMAX = (
    "--model vit_tiny_patch16_224 --image_size 8 --patch_size 2 --hidden_size 16 --num_hidden_layers 2 "
    "--num_attention_heads 2 --intermediate_size 16 --num_train_epochs 1 --max_train_samples 32 --max_eval_samples 32 "
    "--use_cpu --disable_tqdm"
).split()
GALLERY = Path(__file__).parents[2] / "docs" / "gallery"


@pytest.mark.system
def test_every_picture_of_runs(run_folder, tmp_path, analyse, monkeypatch):
    quick = {
        "landscape": "landscape --model MODEL --compare COMPARE --grid 3 --num-images 8 --workers 1 --no-hessian",
        "faithfulness": "faithfulness --model MODEL --compare COMPARE --num-images 4 --steps 3",
        "compare": "compare --model MODEL COMPARE --names KArAt softmax --batch-size 2",
    }
    pictures = [
        dataclasses.replace(picture, command=quick.get(picture.command.split()[0], picture.command))
        for picture in gallery.PICTURES
    ]
    monkeypatch.setattr(gallery, "PICTURES", pictures)
    softmax = str(tmp_path / "softmax")
    assert train(["configuration/digits.yaml", *SOFTMAX, "--output_dir", softmax]) == 0
    out = analyse("gallery", "--model", run_folder, "--compare", softmax, "--work", tmp_path / "work")
    names = {picture.name for picture in gallery.PICTURES}
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in names} | {"README.md"}
    figures = {path.name for path in (tmp_path / "work" / "figures").iterdir()}
    assert {"spectrum_block1.npz", "weights.csv", "compare.svg", "attention_heads_3.png"} <= figures
    assert (out / "spectrum.png").read_bytes() == (tmp_path / "work" / "figures" / "spectrum_block1.png").read_bytes()


def test_checkpoints_of_no_run_leave_some_out(karat, softmax, photos, tmp_path, analyse, monkeypatch):
    kept = [picture for picture in gallery.PICTURES if picture.name in ("spectrum", "weights")]
    monkeypatch.setattr(gallery, "PICTURES", kept)
    out = analyse("gallery", "--model", karat, "--compare", softmax, "--images", photos, "--work", tmp_path / "work")
    assert {path.name for path in out.iterdir()} == {"spectrum.png", "README.md"}
    assert "weights" not in (out / "README.md").read_text()


def test_nothing_is_begun_where_files_would_be_lost(karat, softmax, tmp_path, refusal):
    assert "go together" in refusal("gallery", "--model", karat)
    (tmp_path / "work" / "figures").mkdir(parents=True)
    assert "is there already" in refusal("gallery", "--model", karat, "--compare", softmax, "--work", tmp_path / "work")


@pytest.mark.parametrize(("data_set", "path"), [("digits", None), ("CIFAR10", "path/to/cifar10")])
def test_models_are_trained_by_the_recipes_of_the_data_set(data_set, path, monkeypatch, tmp_path, refusal):
    calls = []
    monkeypatch.setattr(gallery, "train", lambda words: calls.append(parse_settings([*words, "--use_cpu"])) or 2)
    flags = ["--data-set", data_set, "--work", tmp_path] + (["--data-path", path] if path else [])
    assert f"The training of {tmp_path / 'karat'} failed" in refusal("gallery", *flags)
    monkeypatch.setattr(gallery, "train", lambda words: calls.append(parse_settings([*words, "--use_cpu"])) or 0)
    assert "there is no such folder" in refusal("gallery", *flags)  # since nothing was trained
    for settings, kind in zip(calls[1:], ("karat", "softmax"), strict=True):
        assert (settings.data.data_set, settings.data.data_path) == (data_set, path)
        assert settings.recipe.name == f"{data_set.lower()}_{kind}.yaml"
        assert settings.training.output_dir == str(tmp_path / kind)


@pytest.mark.parametrize("name", sorted(path.name for path in GALLERY.iterdir()))
def test_the_galleries_here_have_every_picture(name):
    text = (GALLERY / name / "README.md").read_text(encoding="utf-8")
    described = re.findall(r"^\* (.*)$", text, re.MULTILINE)
    assert [line.split(":")[0] for line in described] == ["KArAt", "softmax"]
    assert all("held-out images right" in line for line in described)
    note = re.search(r"right\.\n\n(?!For checkpoints)(.*)\n", text)
    assert text == gallery.page(gallery.pictures_of(name), described, note and note[1])
    for picture in re.findall(r"!\[\w+\]\((.*)\)", text):
        assert (GALLERY / name / picture).read_bytes().startswith(b"\x89PNG")
