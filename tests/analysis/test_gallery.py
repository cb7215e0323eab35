# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from analysis import gallery
from image_classification.main import main as train
from image_classification.settings.parser import parse_settings
from tests.images import make_image_folder


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
    kept = [picture for picture in gallery.PICTURES if picture.name in ("functions", "spectrum", "weights")]
    monkeypatch.setattr(gallery, "PICTURES", kept)
    out = analyse("gallery", "--model", karat, "--compare", softmax, "--images", photos, "--work", tmp_path / "work")
    assert {path.name for path in out.iterdir()} == {"functions.png", "spectrum.png", "README.md"}
    text = (out / "README.md").read_text()
    assert "weights" not in text and "before" not in text.split("![spectrum]")[0]


def test_runs_of_another_machine_that_kept_no_checkpoints(run_folder, tmp_path, analyse, monkeypatch, capsys):
    """As finals are: where their data lies is said, and what their start or checkpoints are needed for is left out."""
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    record = json.loads((moved / "run.json").read_text())
    record["settings"] |= {"data_set": "CIFAR10", "data_path": "/not/here"}
    (moved / "run.json").write_text(json.dumps(record | {"start": 0.5}))
    has = gallery.at_hand(str(moved), run_folder)
    assert has == {"", "run"} and "cannot be rebuilt" in capsys.readouterr().out
    pictures = {picture.name: picture for picture in gallery.pictures_of("cifar10", has)}
    assert pictures.keys() == {picture.name for picture in gallery.PICTURES} - {"weights"}
    assert "random directions" in pictures["landscape"].caption and "--before" not in pictures["functions"].command
    monkeypatch.setattr(gallery, "PICTURES", [picture for picture in gallery.PICTURES if picture.name == "functions"])
    data = ["--data-set", "CIFAR10", "--data-path", make_image_folder(tmp_path / "data")]
    out = analyse("gallery", "--model", moved, "--compare", moved, *data, "--work", tmp_path / "work")
    assert (out / "functions.png").exists()


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
    pictures = gallery.pictures_of(name, {picture.needs for picture in gallery.PICTURES if picture.caption in text})
    assert text == gallery.page(pictures, described, note and note[1])
    assert {"functions", "attention"} <= {picture.name for picture in pictures}
    assert {path.stem for path in (GALLERY / name).glob("*.png")} == {picture.name for picture in pictures}
    for path in (GALLERY / name).glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
