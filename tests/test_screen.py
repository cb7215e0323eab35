# SPDX-License-Identifier: Apache-2.0
"""What the screen of variants makes of its runs."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from image_classification.settings.parser import parse_settings
from results import page, screen
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
    rows = [common | {"arm": "softmax", "seed": seed, "last": last} for seed, last in (("1", "60"), ("2", "62"))]
    rows += [common | {"arm": "karat", "seed": "1", "last": "70", "images_per_second": "80"}]
    for row in rows:
        accuracies = [float(row["last"]) - 10, float(row["last"])]
        history = [{"epoch": float(epoch), "eval_accuracy": x / 100} for epoch, x in enumerate(accuracies, 1)]
        (tmp_path / f"s-{row['arm']}-{row['seed']}.json").write_text(json.dumps(history))
    made = figures(rows, tmp_path, "test images")
    curves, cost = ([line.get_xydata().tolist() for line in f.axes[0].lines] for f in made.values())
    assert curves == [[[1, 51], [2, 61]], [[1, 60], [2, 70]]]
    assert cost == [[[1, 60], [1, 62]], [[1.25, 70]]]
    assert figures([row | {"judged_on": "held out"} for row in rows[:2]], tmp_path, "test images") == {}


def test_the_table_of_finals_says_how_far_an_arm_is_over_softmax():
    common = {"judged_on": "test images", "recipe": "configuration/strong/vit_tiny_patch16_224.yaml", "epochs": "100"}
    common |= {"average_last": "", "images_per_second": "1000", "minutes": "3"}

    def rows(screen: str, arm: str, *accuracies: float) -> list[dict]:
        return [common | {"screen": screen, "arm": arm, "best": "99", "last": str(last)} for last in accuracies]

    seeds = [*rows("s", "softmax", 60, 61, 62), *rows("s", "hybrid", 63, 64, 65)]
    lines = page.finals([*seeds, *rows("one", "softmax", 60), *rows("one", "hybrid", 59.5), *rows("fidelity", "x", 70)])
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    # Student's t of 4 degrees of freedom at 95 %, 2.132, times the deviation of the difference, (1/3 + 1/3)^1/2.
    assert [row[9] for row in cells] == ["", "+3.00 (+1.26 to +4.74)", "", "-0.50", ""]
    assert [(row[6], row[7]) for row in cells[1:]] == [
        ("", "64.00 ± 1.69"),
        ("", "60.00"),
        ("", "59.50"),
        ("99.00", "70.00"),
    ]


def test_the_table_of_a_screen_says_in_what_its_arms_differ():
    common = {"judged_on": "held out", "screen": "tiny_strong_20", "seed": "42", "epochs": "20", "average_last": ""}
    common |= {"images_per_second": "1000"}
    flags = {"softmax": "--bf16 --lr 1", "hybrid": "--bf16 --lr 1 --model 'of mine'"}
    rows = [common | {"arm": arm, "flags": words, "last": "60"} for arm, words in flags.items()]
    text = "\n".join(page.screens(rows))
    assert "`tiny_strong_20`: ViT-Tiny on CIFAR-10" in text and "SPDX" not in text
    assert "| `softmax` |  | 42 |" in text and "| `hybrid` | `--model 'of mine'` | 42 |" in text
