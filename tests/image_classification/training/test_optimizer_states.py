# SPDX-License-Identifier: Apache-2.0
"""Going on under other settings: each parameter keeps its own state, the rates are those of now, or it is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.runs import checkpoints, run_folder
from image_classification.training.trainer import ImageClassificationTrainer
from tests.image_classification.training.test_trainer import make_model, rows_of, run_arguments


def trainer_of(folder, kind="karat", **settings):
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "save_total_limit": 0, **settings}
    return ImageClassificationTrainer(
        model=make_model(kind),
        args=run_arguments(folder, **settings),
        train_dataset=rows_of(8),
        eval_dataset=rows_of(2),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint after four steps of eight, by the optimiser's name; no parameter's state is another one's."""
    folders = {}

    def checkpoint(optim="adamw_torch", **settings):
        key = (optim, *settings.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("saved")
            trainer_of(folders[key], optim=optim, **settings).train()
        return folders[key] / "checkpoint-4"

    return checkpoint


class Loaded(Exception):
    pass


def state_when_resumed(trainer, checkpoint, monkeypatch):
    """The optimiser's state by parameter, and the groups, when the checkpoint is loaded and no step is done."""

    def stop(self):
        raise Loaded

    monkeypatch.setattr(ImageClassificationTrainer, "begin", stop)
    with pytest.raises(Loaded):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    return {names[parameter]: state for parameter, state in optimizer.state.items()}, optimizer.param_groups


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attn_lr": 0.01},
        {"layer_decay": 0.5},
        {"attn_weight_decay": 0.3, "attn_lr": 0.02},
        {"learning_rate": 0.03, "weight_decay": 0.0, "adam_beta1": 0.5},
        {"optim": "adamw_torch_fused"},
        {"sched": "linear"},
        {"sched": None, "lr_scheduler_type": "linear"},
    ],
    ids=str,
)
def test_state_follows_its_parameter_into_other_groups(tmp_path, saved, monkeypatch, settings):
    checkpoint = saved()
    expected, _ = state_when_resumed(trainer_of(tmp_path), checkpoint, monkeypatch)
    # In the file it is by number: of the groups that the run had which was saved.
    before = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    numbers = {
        name: number
        for group in before["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    trainer = trainer_of(tmp_path, **settings)
    found, groups = state_when_resumed(trainer, checkpoint, monkeypatch)
    assert (
        found.keys()
        == expected.keys()
        == set(trainer.model.state_dict())
        - {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    )
    for name, state in found.items():
        assert torch.equal(state["exp_avg"], before["state"][numbers[name]]["exp_avg"]), name
        assert float(state["step"]) == 4
    # Rates, decays and betas are those that a new run under these settings has at this step.
    fresh = trainer_of(tmp_path, **settings)
    fresh.create_optimizer_and_scheduler(8)
    for _ in range(4):
        fresh.optimizer.step()
        fresh.lr_scheduler.step()
    assert len(groups) == len(fresh.optimizer.param_groups)
    for group, other in zip(groups, fresh.optimizer.param_groups, strict=True):
        for key in ("lr", "initial_lr", "weight_decay", "betas", "lr_scale", "param_names"):
            assert group[key] == other[key], key
    assert trainer.lr_scheduler.get_last_lr() == fresh.lr_scheduler.get_last_lr()


@pytest.mark.parametrize(
    "optim, settings",
    [
        ("adamw_torch", {"optim": "sgd"}),
        ("sgd", {"optim": "adamw_torch"}),
        ("adamw_torch", {"optim": "timm_lion"}),
        ("adamw_torch", {"optim": "adafactor"}),
        ("rmsprop", {"optim": "rmsprop", "momentum": 0.0}),
    ],
)
def test_another_optimiser_is_refused(tmp_path, saved, optim, settings):
    with pytest.raises(InputError, match=r"state of another optimiser.*--finetune") as raised:
        trainer_of(tmp_path, **settings).train(resume_from_checkpoint=str(saved(optim)))
    assert "\n" not in str(raised.value)


def changed(checkpoint, place, change):
    """A copy of a checkpoint, without sums, whose optimiser's state is changed."""
    shutil.copytree(checkpoint, place)
    (place / checkpoints.SUMS).unlink()
    state = torch.load(place / "optimizer.pt", weights_only=True)
    torch.save(change(state) or state, place / "optimizer.pt")
    return place


def of_an_earlier_release(state):
    del state["kind"], state["began_with"]
    for group in state["param_groups"]:
        del group["param_names"]


def test_checkpoint_of_an_earlier_release(tmp_path, saved, monkeypatch):
    """Without names: by order, under the same groups only."""
    old = changed(saved(), tmp_path / "checkpoint-4", of_an_earlier_release)
    expected, _ = state_when_resumed(trainer_of(tmp_path), saved(), monkeypatch)
    found, _ = state_when_resumed(trainer_of(tmp_path), old, monkeypatch)
    assert all(torch.equal(found[name]["exp_avg"], expected[name]["exp_avg"]) for name in expected)
    for settings, said in (({"attn_lr": 0.01}, "other groups"), ({"optim": "sgd"}, "another optimiser")):
        with pytest.raises(InputError, match=said):
            trainer_of(tmp_path, **settings).train(resume_from_checkpoint=str(old))


def other_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    "change",
    [
        other_shape,
        lambda state: state["state"].update({0: 5}),
        lambda state: state.pop("state") and None,
        lambda state: state.update(param_groups=3),
        lambda state: [1, 2],
    ],
)
def test_state_that_is_none_is_an_error_before_it_is_loaded(tmp_path, saved, change):
    place = changed(saved(), tmp_path / "checkpoint-4", change)
    with pytest.raises(InputError, match=r"optimizer\.pt"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(place))


def test_schedule_of_another_kind_is_refused(tmp_path, saved):
    settings = {"sched": None, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(InputError, match=r"another kind of schedule.*--finetune"):
        trainer_of(tmp_path, metric_for_best_model="loss", **settings).train(resume_from_checkpoint=str(saved()))


@pytest.mark.system
def test_refused_resume_leaves_the_run_as_it_was(tmp_path, small, capsys):
    """The command that began it is not refused after one with another optimiser was."""
    folder = tmp_path / "run"
    words = [*small, "--model", "karat_digits", "--data_set", "digits", "--max_train_samples", "32"]
    words += ["--max_eval_samples", "8", "--num_train_epochs", "2", "--output_dir", str(folder)]
    assert script.main(words) == 0
    record = run_folder.read_record(folder)
    processor = (folder / "preprocessor_config.json").read_text()
    capsys.readouterr()
    refused = [*words, "--resume", str(folder), "--optim", "sgd", "--image_mean", "0.1", "0.1", "0.1"]
    assert script.main(refused) == 2
    err = capsys.readouterr().err
    assert "another optimiser" in err and "--finetune" in err and len(err.splitlines()) == 1
    assert run_folder.read_record(folder) == record
    assert (folder / "preprocessor_config.json").read_text() == processor
    # What the error of `attn_lr` in the same folder recommends works, and is recorded.
    assert script.main([*words, "--attn_lr", "1e-3"]) == 2
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    resumed = [*words, "--attn_lr", "1e-3", "--resume", str(folder / "checkpoint-2"), "--num_train_epochs", "3"]
    assert script.main(resumed) == 0
    assert run_folder.read_record(folder)["settings"]["attn_lr"] == 1e-3
    history = json.loads((folder / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert load_file(folder / "model.safetensors")
