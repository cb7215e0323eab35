# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np

from analysis import curves, style

from .conftest import rows_of


ROWS = [
    {"epoch": 1.0, "step": 5, "train_loss": 2.0, "eval_loss": 1.5, "eval_accuracy": 0.25},
    {"epoch": 2.0, "step": 10, "train_loss": 1.0, "eval_loss": 0.75, "eval_accuracy": 0.5, "eval_top5_accuracy": 1.0},
]


def known_run(folder):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": {}, "finished": None}))
    (folder / "history.json").write_text(json.dumps(ROWS))
    return folder


def test_curves_of_a_known_history(tmp_path):
    data = curves.read(str(known_run(tmp_path / "known")))
    assert data.name == "known"
    assert data.epochs.tolist() == [1, 2]
    assert data.metrics["train_loss"].tolist() == [2, 1]
    np.testing.assert_array_equal(data.metrics["eval_top5_accuracy"], [np.nan, 1])
    with style.context():
        figure = curves.draw_all([data], style.figure())
    loss, accuracy = figure.axes
    training, held_out = loss.lines
    assert training.get_xydata().tolist() == [[1, 2], [2, 1]]
    assert training.get_linestyle() == "--"
    assert held_out.get_xydata().tolist() == [[1, 1.5], [2, 0.75]]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 25], [2, 50]]
    assert all(tick == round(tick) for axes in figure.axes for tick in axes.get_xticks())
    assert "known (50.0 %)" in [text.get_text() for text in figure.legends[0].texts]


def test_a_run_that_is_not_finished_has_its_last_checkpoints_log(run_folder, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(run_folder, stopped)
    whole = curves.read(str(stopped))
    (stopped / "history.json").unlink()
    np.testing.assert_array_equal(curves.read(str(stopped)).metrics["eval_loss"], whole.metrics["eval_loss"])


def test_the_command_with_several_runs(tmp_path, analyse):
    folders = known_run(tmp_path / "a" / "same"), known_run(tmp_path / "b" / "same")
    out = analyse("curves", "--model", *folders)
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "curves.png", "curves.svg"]
    rows = rows_of(out / "curves.csv")
    assert [row["run"] for row in rows] == ["a/same", "a/same", "b/same", "b/same"]
    assert [row["eval_loss"] for row in rows] == ["1.5", "0.75"] * 2


def test_what_has_no_history_is_refused(karat, tmp_path, refusal):
    assert "no folder of a run" in refusal("curves", "--model", karat)
    folder = known_run(tmp_path / "new")
    (folder / "history.json").unlink()
    assert "no evaluation yet" in refusal("curves", "--model", folder)
    assert "expected 1 different names" in refusal("curves", "--model", folder, "--names", "a", "b")


def test_a_damaged_checkpoint_of_a_run_is_named(run_folder, tmp_path, refusal):
    shutil.copytree(run_folder, tmp_path / "run")
    path = next((tmp_path / "run").glob("checkpoint-*")) / "trainer_state.json"
    path.write_text("{")
    said = refusal("weights", "--model", tmp_path / "run")
    assert str(path) in said and "damaged" in said
