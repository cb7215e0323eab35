# SPDX-License-Identifier: Apache-2.0
"""The commands of the official README, with only the script's name changed, on a small ImageNet-style folder."""

import contextlib
import io
import json
import shlex

import pytest
from transformers import AutoModelForImageClassification

from image_classification import main as script
from tests.documents import commands
from tests.images import make_image_folder, own_library_settings  # noqa: F401


pytestmark = pytest.mark.usefixtures("own_library_settings")

# Contradictory values are errors, so what a test needs smaller is replaced, not repeated.
FASTER = {"--epochs 100": "--epochs 1", "--num_workers 8": "--num_workers 0"}
EXTRA = "--input-size 32 --num_hidden_layers 2 --warmup-epochs 0 --device cpu"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("imagenet"), classes=("n01440764", "n01443537", "n01484850"))


def official(name, imagenet, output):
    (command,) = [command for command in commands("official") if name in command]
    for old, new in {**FASTER, "path/to/imagenet": str(imagenet), "./output": str(output)}.items():
        assert old in command
        command = command.replace(old, new)
    return shlex.split(command)[2:] + shlex.split(EXTRA)


@pytest.fixture(scope="module")
def trained(imagenet, tmp_path_factory):
    """The blockwise command: its output folder, and what it printed."""
    output = tmp_path_factory.mktemp("output")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert script.main(official("G3B", imagenet, output)) == 0
    return output / "vit_tiny_patch16_224_FourierKArAt_G3B", printed.getvalue()


def test_blockwise_command(trained):
    folder, out = trained
    assert "KArAt phi1_w2, r=12, Fourier (G=3), base zero" in out and "blockwise" in out
    assert "0.000125 (base_lr 0.0005 x batch 128 / 512)" in out
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert (config.sharing, config.train_base, config.hidden_size) == ("blockwise", False, 192)
    assert "eval_accuracy" in json.loads((folder / "all_results.json").read_text())


def test_universal_command(imagenet, tmp_path, capsys):
    words = official("G3U", imagenet, tmp_path)
    assert script.main(words) == 0
    assert "universal" in capsys.readouterr().out
    folder = tmp_path / "vit_tiny_patch16_224_FourierKArAt_G3U"
    assert AutoModelForImageClassification.from_pretrained(folder).config.sharing == "universal"


def test_evaluation(trained, imagenet, capsys):
    folder, _ = trained
    words = f"--eval --resume {folder} --data-path {imagenet} --data-set IMNET --device cpu --input-size 32"
    shape = "--model vit_tiny_patch16_224_karat --num_hidden_layers 2 --base_not_trainable"
    assert script.main(shlex.split(f"{words} {shape}")) == 0
    accuracy = json.loads((folder / "all_results.json").read_text())["eval_accuracy"]
    assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out


def test_finetuning_at_another_size_on_other_classes(trained, tmp_path, capsys):
    data = make_image_folder(tmp_path / "data", classes=("left", "right"))
    words = f"--finetune {trained[0]} --data-path {data} --output_dir {tmp_path / 'out'} --input-size 48 --epochs 1 "
    words += (
        "--lr 1e-3 --opt sgd --sched constant --drop 0.1 --attn_lr 1e-4 --num_workers 0 --device cpu --run_name first "
        "--report_to none"
    )
    assert script.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "new: the classifier" in out and "Resampled from 32x32 to 48x48" in out and "KArAt parameters" in out
    assert "`run_name` has no effect: `report_to` is none" in out
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert (config.image_size, config.num_labels, config.hidden_dropout_prob) == (48, 2, 0.1)
