# SPDX-License-Identifier: Apache-2.0
"""What the screen of variants makes of its runs."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from image_classification.settings.parser import parse_settings
from results import screen
from results.figures import figures


@pytest.fixture
def runs(monkeypatch):
    """The commands and GPUs of the runs, which leave the figures of one evaluation; those with --eval_strategy none."""
    found = []

    def run(command, env=None, **options):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc")
        found.append((command, env["CUDA_VISIBLE_DEVICES"]))
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        history = [{"epoch": 1.0, "eval_accuracy": 0.5}]
        (folder / "history.json").write_text(json.dumps([] if "--eval_strategy" in command else history))
        (folder / "all_results.json").write_text(json.dumps({"train_runtime": 60.0}))
        return subprocess.CompletedProcess(command, int("--broken" in command))

    monkeypatch.setattr(screen.subprocess, "run", run)
    return found


def test_each_arm_has_a_row_or_is_named(runs, tmp_path, monkeypatch, capsys):
    arms = tmp_path / "few.yaml"
    arms.write_text("recipe: r.yaml\nseeds: [1, 2]\narms: {good: , unjudged: --eval_strategy no, wrong: --broken}\n")
    words = [str(arms), "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--table", str(tmp_path / "t.csv")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert screen.main([*words, "--gpus", "2", "--per-gpu", "1"]) == 4
    said = capsys.readouterr().out
    assert all(f"few/{name}-{seed}: failed" in said for name in ("unjudged", "wrong") for seed in (1, 2))
    assert {gpu for _, gpu in runs} <= {"4", "6"} and len(runs) == 6
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["arm"], row["seed"], row["last"]) for row in rows) == [("good", "1", "50"), ("good", "2", "50")]
    screen.main(words)
    assert len(runs) == 6 + 4  # What has a row is left out.


def test_a_file_of_arms_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        screen.main(["--data", str(tmp_path)])
    assert ended.value.code == 2 and "arms" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((screen.ROOT / "results" / "arms").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_arms_of_this_project_are_commands(path):
    """Before a GPU is asked: recipes exist, and the parser takes their flags."""
    for run in screen.read_arms(path):
        settings = parse_settings([str(screen.ROOT / run["recipe"]), *run["flags"], "--use_cpu", "--bf16", "false"])
        assert settings.training.num_train_epochs >= 12


def test_the_figures_show_what_the_table_says(tmp_path):
    common = {"screen": "s", "judged_on": "test images", "images_per_second": "100"}
    rows = [common | {"arm": "softmax", "seed": seed, "best": best} for seed, best in (("1", "60"), ("2", "62"))]
    rows += [common | {"arm": "karat", "seed": "1", "best": "70", "images_per_second": "80"}]
    for row in rows:
        accuracies = [float(row["best"]) - 10, float(row["best"])]
        history = [{"epoch": float(epoch), "eval_accuracy": x / 100} for epoch, x in enumerate(accuracies, 1)]
        (tmp_path / f"s-{row['arm']}-{row['seed']}.json").write_text(json.dumps(history))
    made = figures(rows, tmp_path, "test images")
    curves, cost = ([line.get_xydata().tolist() for line in f.axes[0].lines] for f in made.values())
    assert curves == [[[1, 51], [2, 61]], [[1, 60], [2, 70]]]
    assert cost == [[[1, 60], [1, 62]], [[1.25, 70]]]
    assert figures([row | {"judged_on": "held out"} for row in rows[:2]], tmp_path, "test images") == {}
