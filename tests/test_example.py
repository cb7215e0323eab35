# SPDX-License-Identifier: Apache-2.0
"""The example of a finished run: half precision, the run's answers, its row of the table."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.images import find_images
from analysis.models import load_checkpoint
from image_classification.errors import InputError
from image_classification.paths import EXAMPLE
from results import example
from tests.images import make_image_folder, own_library_settings  # noqa: F401
from tests.models import make_model, save_checkpoint, with_scores


pytestmark = pytest.mark.usefixtures("own_library_settings")


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run of a hybrid, with its data and its row in a table: the arguments of `make`."""
    images = make_image_folder(tmp_path / "images")
    model = with_scores(make_model(labels=["blue", "green", "red"], num_karat_heads=1, karat_layers=[-1]))
    folder = tmp_path / "moved"
    save_checkpoint(model, folder)
    settings = {"seed": 2, "data_set": None, "data_path": str(images), "dataset_name": None}
    settings |= {"output_dir": "elsewhere/outputs/strong_5/hybrid-2", "num_train_epochs": 5}
    finished = {"metrics": {"eval_accuracy": 0.91}, "eval_images": 12, "weights": "ema"}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "finished": finished, "id": None}))
    row = {"screen": "strong_5", "arm": "hybrid", "seed": "2", "recipe": "r.yaml", "epochs": "5.0"}
    row |= {"judged_on": "test images", "last": "90.12", "average_last": "91.34"}
    table = tmp_path / "runs.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row | {"seed": "1", "average_last": "89.99"}, row])
    return {"run": str(folder), "data": None, "target": tmp_path / "example", "table": table}


def test_the_example_is_the_run_in_half_precision_with_its_row(run):
    run["target"].mkdir()
    (run["target"] / "old.png").touch()
    example.make(**run)
    files = {path.name for path in run["target"].iterdir()}
    images = {"blue.png", "green.png", "red.png"}
    assert files == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", *images}
    half = load_file(run["target"] / "model.safetensors")
    whole = load_file(f"{run['run']}/model.safetensors")
    assert half.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name].half()) for name, tensor in half.items())
    loaded = load_checkpoint(str(run["target"]))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32} and loaded.processor
    card = (run["target"] / "README.md").read_text()
    assert "91.34 % of 12" in card and "`hybrid`" in card and "seed 2" in card and "89.99" not in card


def test_what_is_no_example_is_refused_and_nothing_is_written(run, monkeypatch):
    def refusal() -> str:
        with pytest.raises(InputError) as refused:
            example.make(**run)
        assert not run["target"].exists()
        return str(refused.value)

    monkeypatch.setattr(example, "LIMIT", 1000)
    assert "at most" in refusal()
    # Weights that half precision flushes to zero.
    path = f"{run['run']}/model.safetensors"
    weights = load_file(path)
    saved = {name: 1e-8 * x if name == "classifier.weight" else x for name, x in weights.items()}
    save_file(saved, path, metadata={"format": "pt"})
    assert "another model" in refusal()
    run["table"].write_text(run["table"].read_text().replace("hybrid", "softmax"))
    assert "no row of strong_5/hybrid-2" in refusal()


def test_a_run_that_is_not_finished_is_refused(run, tmp_path, capsys):
    record = tmp_path / "moved" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": None}))
    assert example.main([run["run"], "--output", str(run["target"]), "--table", str(run["table"])]) == 2
    assert "no folder of a finished run" in capsys.readouterr().err and not run["target"].exists()


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="The project has no example yet: python -m results.example RUN")
def test_the_projects_example_fits_and_knows_its_images():
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) <= example.LIMIT
    checkpoint = load_checkpoint(str(EXAMPLE))
    found = find_images([checkpoint], [str(EXAMPLE)], example.SHOWN)
    guesses = [checkpoint.labels[index] for index in example.logits_of(checkpoint, found).argmax(-1)]
    right = sum(f"{guess}.png" == name for guess, (_, name, _) in zip(guesses, found))
    assert right >= 0.7 * len(found) > 0
