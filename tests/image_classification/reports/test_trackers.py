# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: off without a name, and one run however often the training is stopped."""

import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from image_classification import main as script
from image_classification.reports import trackers
from image_classification.reports.console import EpochLines
from tests.image_classification.training.test_trainer import command, run_arguments


@pytest.mark.system
@pytest.mark.parametrize("flags, folder", [(["--run_name", "my/first"], "my-first"), (["--run_id", "7"], "7")])
def test_tensorboard_has_every_step_of_a_stopped_run_once(tmp_path, small, monkeypatch, flags, folder):
    words = ["--report_to", "tensorboard", "--logging_strategy", "steps", "--logging_steps", "1"]
    words += flags if "--run_name" in flags else [*flags, "--run_name", "first"]
    words = command(tmp_path / "run", *small, *words)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "on_step_begin", interrupt, raising=False)
        assert script.main(words) == 130
    # Steps 4 and 5 are after the last checkpoint: they are trained, and reported, again.
    assert script.main(words) == 0
    assert [path.name for path in (tmp_path / "run" / "runs").iterdir()] == [folder]
    events = EventAccumulator(str(tmp_path / "run" / "runs" / folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("eval/accuracy")][:3] == [3, 6, 9]


def test_nothing_is_reported_without_a_name(tmp_path, small, capsys):
    words = [*small, "--report_to", "tensorboard", "--run_id", "7"]
    assert script.main(command(tmp_path / "run", *words)) == 0
    assert not (tmp_path / "run" / "runs").exists()
    out = capsys.readouterr().out
    assert "`report_to` has no effect" in out and "`run_id` has no effect" in out


def test_weights_and_biases_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # So that it is put back.
        monkeypatch.delenv(name)
    args = run_arguments(tmp_path)
    trackers.choose_run(args)
    assert "WANDB_RUN_ID" not in os.environ and not list(tmp_path.iterdir())
    args.report_to = ["wandb"]
    trackers.choose_run(args)
    first = os.environ.pop("WANDB_RUN_ID")
    trackers.choose_run(args)
    assert len(first) == 12 and (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == (first, "allow")
    args.run_id = "chosen"
    trackers.choose_run(args)
    args.run_id = None
    trackers.choose_run(args)
    assert os.environ["WANDB_RUN_ID"] == "chosen"
