# SPDX-License-Identifier: Apache-2.0
"""What is made of finished runs: the project's example, and the page on hybrid attention."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.images import find_images
from analysis.models import load_checkpoint
from image_classification.errors import InputError
from image_classification.paths import EXAMPLE
from results import example, hybrid, page
from tests.images import COLOURS, make_image_folder, own_library_settings  # noqa: F401
from tests.models import make_model, save_checkpoint, with_scores


pytestmark = pytest.mark.usefixtures("own_library_settings")


@pytest.fixture
def runs(tmp_path):
    """Folders of finished runs, a hybrid and its softmax twin, with their data and rows in a table."""
    images = make_image_folder(tmp_path / "images")
    rows = []
    for arm, kind, fields in (
        ("hybrid", "karat", {"num_karat_heads": 1, "karat_layers": [-1], "karat_rank": 2}),
        ("softmax", "softmax", {}),
    ):
        folder = tmp_path / arm
        save_checkpoint(with_scores(make_model(kind, COLOURS, **fields)), folder)
        settings = {"seed": 2, "data_set": None, "data_path": str(images), "dataset_name": None}
        settings |= {"output_dir": f"elsewhere/outputs/strong_5/{arm}-2", "num_train_epochs": 5}
        finished = {"metrics": {"eval_accuracy": 0.91}, "eval_images": 12, "weights": "ema"}
        (folder / "run.json").write_text(json.dumps({"settings": settings, "finished": finished, "id": None}))
        row = {"screen": "strong_5", "arm": arm, "seed": "2", "recipe": f"{arm}.yaml", "epochs": "5"}
        row |= {"judged_on": "test images", "last": "90.12", "average_last": "91.34"}
        rows += [row | {"seed": "1", "average_last": "89.99"}, row]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


@pytest.fixture
def made(runs):
    """The arguments of `example.make`."""
    return {"run": str(runs / "hybrid"), "data": None, "target": runs / "example", "table": runs / "runs.csv"}


def test_the_example_is_the_run_in_half_precision_with_its_row(made):
    example.make(**made)
    (made["target"] / "old.png").touch()
    example.make(**made)
    files = {path.name for path in made["target"].iterdir()}
    images = {"blue.png", "green.png", "red.png"}
    assert files == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", *images}
    half = load_file(made["target"] / "model.safetensors")
    whole = load_file(f"{made['run']}/model.safetensors")
    assert half.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name].half()) for name, tensor in half.items())
    loaded = load_checkpoint(str(made["target"]))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32} and loaded.processor
    card = (made["target"] / "README.md").read_text()
    assert "91.34 % of 12" in card and "`hybrid`" in card and "seed 2" in card and "89.99" not in card


def test_what_is_no_example_is_refused_and_nothing_is_written(made, monkeypatch):
    def refusal() -> str:
        with pytest.raises(InputError) as refused:
            example.make(**made)
        assert not made["target"].exists()
        return str(refused.value)

    monkeypatch.setattr(example, "LIMIT", 1000)
    assert "at most" in refusal()
    # Weights that half precision flushes to zero.
    path = f"{made['run']}/model.safetensors"
    weights = load_file(path)
    saved = {name: 1e-8 * x if name == "classifier.weight" else x for name, x in weights.items()}
    save_file(saved, path, metadata={"format": "pt"})
    assert "another model" in refusal()
    made["table"].write_text(made["table"].read_text().replace("hybrid", "other"))
    assert "no row of strong_5/hybrid-2" in refusal()


def test_no_other_folder_is_replaced(made):
    made["target"].mkdir()
    (made["target"] / "README.md").write_text("My notes.")
    with pytest.raises(InputError, match="--output"):
        example.make(**made)
    assert (made["target"] / "README.md").read_text() == "My notes."


def test_a_run_that_is_not_finished_is_refused(made, runs, capsys):
    record = runs / "hybrid" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": None}))
    assert example.main([made["run"], "--output", str(made["target"]), "--table", str(made["table"])]) == 2
    assert "no folder of a finished run" in capsys.readouterr().err and not made["target"].exists()


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="The project has no example yet: python -m results.example RUN")
def test_the_projects_example_fits_and_knows_its_images():
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) <= example.LIMIT
    checkpoint = load_checkpoint(str(EXAMPLE))
    found = find_images([checkpoint], [str(EXAMPLE)], example.SHOWN)
    guesses = [checkpoint.labels[index] for index in example.logits_of(checkpoint, found).argmax(-1)]
    right = sum(f"{guess}.png" == name for guess, (_, name, _) in zip(guesses, found))
    assert right >= 0.7 * len(found) > 0


def test_the_measures_of_heads_and_tokens_are_what_they_say():
    one, alike = torch.eye(4), torch.full((4, 4), 0.25)
    # Signs do not count, nor how large a map is, but for the head's share.
    maps = torch.stack([-3 * one, alike])[None]
    scores = torch.stack([torch.zeros(4, 4), torch.tensor([1.0, -1.0]).repeat(8).view(4, 4)])[None]
    found = hybrid.of_heads(scores, maps)
    assert found["entropy"][0].tolist() == pytest.approx([0.0, math.log(4)])
    assert found["share"][0].tolist() == pytest.approx([0.75, 0.25])
    assert found["scores"][0].tolist() == pytest.approx([0.0, (16 / 15) ** 0.5])
    assert hybrid.similarity(torch.ones(1, 5, 3) * torch.arange(1, 6).view(1, 5, 1)).item() == pytest.approx(1.0)
    assert hybrid.similarity(torch.eye(3)[None]).item() == pytest.approx(0.0)


def test_the_measures_of_a_models_blocks(runs):
    checkpoint = load_checkpoint(str(runs / "hybrid"))
    pixels = torch.randn(3, 3, 8, 8)
    before = hybrid.of_blocks(checkpoint, pixels, batch_size=2)
    assert {name: values.shape[:2] for name, values in before.items()} == dict.fromkeys(before, (2, 3))
    # Block 1 has a KArAt head of rank 2, then a softmax head.
    assert before["rank"][1, :, 0].max() <= 2.001 and before["share"].sum(-1) == pytest.approx(np.ones((2, 3)))
    with torch.no_grad():
        projection = checkpoint.model.vit.layers[0].attention.o_proj
        projection.weight.mul_(2), projection.bias.mul_(2)
        checkpoint.model.vit.layers[1].attention.o_proj.weight.zero_()
        checkpoint.model.vit.layers[1].attention.o_proj.bias.zero_()
    after = hybrid.of_blocks(checkpoint, pixels, batch_size=3)
    assert after["residual"][0] == pytest.approx(2 * before["residual"][0])
    assert not after["residual"][1].any()


def test_the_page_is_made_of_what_was_measured(runs, monkeypatch):
    for name, path in (("FIGURES", runs / "h.csv"), ("PAGE", runs / "page.md"), ("SITE", runs / "site.toml")):
        monkeypatch.setattr(hybrid, name, path)
    monkeypatch.setitem(hybrid.TABLES, "models", lambda rows: hybrid.models(rows, runs / "runs.csv"))
    (runs / "site.toml").write_text(f"nav = [\n{hybrid.BEFORE}]\n")
    words = ["--model", str(runs / "hybrid"), "--compare", str(runs / "softmax"), "--num-images", "4"]
    words += ["--device", "cpu", "--table", str(runs / "runs.csv"), "--output", str(runs / "h.csv")]
    assert hybrid.main(words) == hybrid.main(["--output", str(runs / "h.csv")]) == 0
    assert (runs / "site.toml").read_text() == f"nav = [\n{hybrid.BEFORE}{hybrid.ENTRY}]\n"
    rows, text = page.read(runs / "h.csv"), (runs / "page.md").read_text()
    assert {row["run"] for row in rows if row["model"] in hybrid.NAMES} == {"strong_5/hybrid-2", "strong_5/softmax-2"}
    assert set(re.findall(r"<!-- results: (\w+) -->\n\|", text)) == set(hybrid.TABLES)
    (rank,) = (row for row in rows if (row["measure"], row["block"], row["part"]) == ("rank", "1", "karat"))
    assert "| block | hybrid, KArAt heads | hybrid, softmax heads | softmax |" in text
    assert f"\n| 1 | {float(rank['mean']):.2f} | " in text and 1 <= float(rank["low"]) <= float(rank["high"]) <= 2.001
    deletion = [row for row in rows if (row["measure"], row["part"]) == ("deletion", "attention")]
    assert [row["model"] for row in deletion] == ["hybrid", "softmax", "hybrid - softmax"]
    assert f"{float(deletion[0]['mean']):.3f} [" in text and "| `strong_5/hybrid-2` | `hybrid.yaml` | 5 |" in text


def test_what_is_no_pair_is_refused(runs, capsys):
    def refusal(*words) -> str:
        folders = ["--table", str(runs / "runs.csv"), "--output", str(runs / "h.csv"), "--device", "cpu"]
        assert hybrid.main([*map(str, words), *folders]) == 2 and not (runs / "h.csv").exists()
        return capsys.readouterr().err

    assert "go together" in refusal("--model", runs / "hybrid")
    assert "expected a hybrid" in refusal("--model", runs / "softmax", "--compare", runs / "softmax")
    assert "expected a softmax" in refusal("--model", runs / "hybrid", "--compare", runs / "hybrid")


def test_the_projects_page_is_what_was_measured():
    """`python -m results.hybrid` would change nothing; without figures there is no page."""
    made = hybrid.PAGE.read_text(encoding="utf-8") if hybrid.PAGE.exists() else None
    text = hybrid.TEXT.read_text(encoding="utf-8")
    figures = hybrid.FIGURES.is_file()
    assert made == (page.regenerate(text, page.read(hybrid.FIGURES), hybrid.TABLES) if figures else None)
    assert (hybrid.BEFORE + hybrid.ENTRY if figures else hybrid.BEFORE) in hybrid.SITE.read_text(encoding="utf-8")
