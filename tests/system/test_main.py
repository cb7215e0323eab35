# SPDX-License-Identifier: Apache-2.0
"""Whole runs: the embedded default, its checkpoint folder, evaluation, and errors before work is lost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from image_classification import main as script
from image_classification.data.images import decode
from image_classification.data.sources import load_data
from image_classification.data.transforms import EvalTransform
from image_classification.settings.arguments import DataArguments
from modeling_karat_vit.modeling_karat_vit import AUTO_CLASSES


PROJECT = Path(__file__).parents[2]
# Of the default's twenty epochs: after these it gets 95 % right, where guesses are 10 %.
EPOCHS = 5


def default_flags(folder) -> list[str]:
    return ["--output_dir", str(folder), "--use_cpu", "--num_train_epochs", str(EPOCHS)]


# Goes as far as all imports, and looks around.
START = """
import gc
import sys
import run_image_classification
from image_classification import main

frozen = []
main.main = lambda: frozen.append(gc.get_freeze_count()) or 0
assert run_image_classification.main() == 0 and frozen[0] > 100_000, frozen
assert gc.isenabled() and gc.get_freeze_count() == 0
assert not {"evaluate", "matplotlib", "tensorboard"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """What `make train` runs, shorter and in another folder: the output folder, and what the console showed."""
    folder = tmp_path_factory.mktemp("default") / "digits"
    command = [sys.executable, "run_image_classification.py", *default_flags(folder)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, result.stderr


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_a_start_waits_for_nothing_that_it_does_not_need():
    """Neither for the collector to look through what stays, nor for packages of evaluations and reports."""
    result = subprocess.run([sys.executable, "-c", START], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_default_learns_the_digits(default_run):
    assert results(default_run[0])["eval_accuracy"] >= 0.9


def test_console_is_for_people(default_run):
    folder, out, err = default_run
    lines = [line.strip() for line in out.splitlines()]
    assert len([line for line in lines if line.startswith("epoch")]) == EPOCHS
    assert re.search(
        rf"epoch {EPOCHS}/{EPOCHS}   train loss [\d.]+   held-out loss [\d.]+   accuracy 9\d\.\d\d %   top-5", out
    )
    assert "KArAt phi1_w2, r=12, Fourier (G=3)" in out and str(23 * EPOCHS) in err
    assert f"predict.py {folder}/sample.png --model {folder}" in lines[-1]
    for noise in ("Warning", "warning", "{'", "[transformers]", "leak"):
        assert noise not in out + err, noise


def test_checkpoint_folder_is_complete(default_run):
    folder = default_run[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["7"] == "7" and config["label2id"]["7"] == 7
    assert set(config["auto_map"]) == set(AUTO_CLASSES)
    for module in {entry.split(".")[0] for entry in config["auto_map"].values()}:
        assert (folder / f"{module}.py").is_file()
    assert (folder / "model.safetensors").is_file() and not list(folder.rglob("training_args.bin"))
    with Image.open(folder / "training_curves.png") as curves:
        assert curves.width > 600
    history = json.loads((folder / "history.json").read_text())
    assert len(history) == EPOCHS and {"train_loss", "eval_loss", "eval_accuracy", "learning_rate"} <= set(history[-1])
    assert history[-1]["eval_accuracy"] == results(folder)["eval_accuracy"]


def test_pipeline_gives_the_logged_accuracy_sample_by_sample(default_run):
    folder = default_run[0]
    data = load_data(DataArguments(data_set="digits"), seed=0)
    images = [decode(row["image"], "image") for row in data.validation]
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    said = [answer[0]["label"] for answer in classify(images)]
    # As the Trainer evaluates: by batches, through the saved processor.
    processor, model = (
        AutoImageProcessor.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
    )
    with torch.no_grad():
        logits = model(torch.stack([EvalTransform(processor)(image) for image in images])).logits
    assert said == [data.labels[index] for index in logits.argmax(-1).tolist()]
    right = sum(label == data.labels[row["label"]] for label, row in zip(said, data.validation))
    assert right / len(said) == results(folder)["eval_accuracy"]


def test_model_card(default_run):
    folder = default_run[0]
    card = ModelCard.load(folder / "README.md")
    (result, _, _) = card.data.eval_results
    assert result.metric_value == pytest.approx(results(folder)["eval_accuracy"], abs=1e-6)
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-classification", "transformers")
    for word in ("trust_remote_code=True", "1,437", "360", "KArAt phi1_w2", "scikit-learn", "0.002"):
        assert word in card.text
    assert str(folder.parent) not in card.text


def test_the_cards_snippet_runs(default_run, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (default_run[0] / "README.md").read_text(), re.S)
    # From the folder above, with the image by its path.
    monkeypatch.chdir(default_run[0].parent)
    exec(code.replace('"sample.png"', '"digits/sample.png"'))


def test_last_line_of_the_summary_is_a_command_that_works(default_run):
    command = default_run[1].strip().splitlines()[-1]
    result = subprocess.run(command, shell=True, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" %") == 5 and not result.stderr.strip()


def test_second_time_says_that_it_is_done(default_run, capsys):
    folder = default_run[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert script.main(default_flags(folder)) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "predict.py" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_image_folder_with_resize_and_crop(image_folder, tmp_path, small):
    """The pipeline from the checkpoint scores real files as the evaluation did, where they are resized and cropped."""
    folder = tmp_path / "run"
    flags = ["--model", "vit_tiny_patch16_224_karat", *small, "--image_size", "16", "--patch_size", "4"]
    flags += ["--data_path", str(image_folder), "--num_train_epochs", "2", "--learning_rate", "1e-3"]
    assert script.main([*flags, "--output_dir", str(folder)]) == 0
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    files = sorted((image_folder / "validation").rglob("*.jpg"))
    right = [classify(str(file))[0]["label"] == file.parent.name for file in files]
    assert sum(right) / len(right) == pytest.approx(results(folder)["eval_accuracy"])
    assert "top5" not in " ".join(results(folder))


# Errors come before work is lost, with exit status 2, one message and no traceback


def fails(capsys, *words):
    assert script.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("run_image_classification.py: error: ") and "Traceback" not in captured.err
    return captured.err


def test_no_output_folder(image_folder, capsys, small):
    words = ["--model", "vit_tiny_patch16_224_karat", *small, "--data_path", str(image_folder)]
    assert "--output_dir" in fails(capsys, *words)


def test_misspelt_model_is_found_before_the_data_is_read(tmp_path, capsys):
    message = fails(
        capsys, "--model", "vit_tinny", "--data_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "o")
    )
    assert "vit_tinny" in message
    assert not (tmp_path / "o").exists()


def test_evaluation_without_or_with_a_wrong_checkpoint(tmp_path, capsys):
    assert "--resume" in fails(capsys, "--eval", "--data_set", "digits")
    assert "no such folder" in fails(capsys, "--eval", "--resume", str(tmp_path / "no"), "--data_set", "digits")


def test_broken_image_leaves_no_output_folder(image_folder, tmp_path, small, capsys):
    (image_folder / "train" / "red" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["--model", "vit_tiny_patch16_224_karat", *small, "--data_path", str(image_folder)]
    assert "red/0.jpg" in fails(capsys, *words, "--output_dir", str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_broken_image_of_a_set_too_large_to_check_is_named_by_the_worker(image_folder, tmp_path, small, capsys):
    (image_folder / "train" / "red" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["--model", "vit_tiny_patch16_224_karat", *small[:-1], "1", "--data_path", str(image_folder)]
    message = fails(capsys, *words, "--image_size", "16", "--check_images", "none", "--output_dir", str(tmp_path / "o"))
    assert "red/0.jpg cannot be read" in message and len(message.splitlines()) == 1


def test_evaluation_overwrites_no_other(default_run, tmp_path, capsys):
    words = f"--eval --resume {default_run[0]} --data_set digits --device cpu --max_eval_samples 9".split()
    assert script.main([*words, "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "eval_results.json").read_text())["checkpoint"] == str(default_run[0])
    assert "eval_results.json holds the figures of another" in fails(capsys, *words, "--output_dir", str(tmp_path))
