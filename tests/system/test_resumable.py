# SPDX-License-Identifier: Apache-2.0
"""
Runs that survive: killed at any moment and started again, they end with the same bits as if never stopped.

Killed is meant: a fork of the test process sends itself SIGKILL, in the middle of what it was doing.
"""

import contextlib
import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, PreTrainedModel

from image_classification import main as script
from image_classification.runs import checkpoints, signals
from image_classification.training.checkpointing import Checkpointer
from image_classification.training.trainer import ImageClassificationTrainer
from tests.image_classification.conftest import SMALL


MODELS = {
    "softmax": ["--model", "vit_tiny_patch16_224"],
    # With everything of the recipe that draws random numbers or has a state.
    "blockwise": (
        "--model karat_digits --drop_path_rate 0.2 --model_ema --model_ema_decay 0.9 --mixup 0.8 --cutmix 1.0 "
        "--repeated_aug --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --smoothing 0.1"
    ).split(),
    "universal": ["--model", "karat_digits", "--sharing", "universal"],
}
# Three steps an epoch, nine in all, of two batches each but for the last of an epoch; checkpoints at 2, 4, 6, 8 and 9.
LENGTH = (
    "--data_set digits --max_train_samples 76 --max_eval_samples 20 --num_train_epochs 3 --seed 3 "
    "--gradient_accumulation_steps 2 --save_strategy steps --save_steps 2 "
    "--image_size 8 --patch_size 4 --eval_crop_ratio 1 --learning_rate 1e-3 --hidden_dropout_prob 0.1"
).split()


def words_of(folder, kind="blockwise", *more):
    """The words of a small run."""
    pairs = zip(LENGTH[::2], LENGTH[1::2], strict=True)
    length = [word for flag, value in pairs if flag not in more for word in (flag, value)]
    return [*SMALL, *MODELS[kind], *length, *more, "--output_dir", str(folder)]


@pytest.fixture
def command(tmp_path):
    """`command(name, kind, *more)`: the words of a small run whose output folder is `name`."""
    return lambda name, *more: words_of(tmp_path / name, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(kind)`: the folder of a small run that was never stopped."""

    @functools.cache
    def folder(kind="blockwise"):
        path = tmp_path_factory.mktemp(kind) / "run"
        assert script.main(words_of(path, kind)) == 0
        return path

    return folder


def content(path):
    """What is in a file of a run, without what is different in every run: times, and its identity."""

    def timeless(value):
        if isinstance(value, dict):
            kept = {
                k: timeless(v) for k, v in value.items() if not any(t in k for t in ("runtime", "second", "memory"))
            }
            return {k: v for k, v in kept.items() if k not in ("output_dir", "id", "run")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    return path.read_bytes()


def assert_same(first, second, where=""):
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{where}/{index}")
    elif torch.is_tensor(first):
        assert torch.equal(first, second), where
    elif hasattr(first, "tobytes"):
        assert first.tobytes() == second.tobytes(), where
    else:
        assert first == second or first != first, where


def assert_same_runs(first, second, checkpoints_on_the_way=True):
    """Weights, optimiser, schedule, random numbers, logs, metrics, curves: all of it, bit for bit."""
    names = ["model.safetensors", "history.json", "all_results.json", "config.json", "run.json"]
    last = {folder: list(checkpoints.checkpoints(folder).values()) for folder in (first, second)}
    if not checkpoints_on_the_way:
        last = {folder: paths[-1:] for folder, paths in last.items()}
    assert [path.name for path in last[first]] == [path.name for path in last[second]]
    for name in names:
        assert_same(content(first / name), content(second / name), name)
    for one, other in zip(last[first], last[second]):
        files = {path.name for path in one.iterdir()} - {checkpoints.SUMS}
        assert files == {path.name for path in other.iterdir()} - {checkpoints.SUMS}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json"} <= files
        for name in files:
            assert_same(content(one / name), content(other / name), f"{one.name}/{name}")
    assert not list(second.glob(".*"))


def start_fork(words, prepare=lambda: None):
    """Run the script in a fork of this process, after `prepare`; its number."""
    process = os.fork()
    if process == 0:
        status = 99
        try:
            prepare()
            status = script.main(words)
        finally:
            os._exit(status)
    return process


def in_fork(words, prepare=lambda: None):
    """As `start_fork`, and wait for it; the exit status, negative for a signal."""
    return status_of(start_fork(words, prepare))


def status_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# What may be going on when the process is killed. Each is called many times in a run.
MOMENTS = [
    (ImageClassificationTrainer, "training_step"),
    (ImageClassificationTrainer, "prediction_step"),
    (ImageClassificationTrainer, "log"),
    (PreTrainedModel, "save_pretrained"),
    (torch, "save"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "write_text"),
    (shutil, "rmtree"),
    (os, "replace"),
]


def act_at(moment, action, moments=MOMENTS):
    """Call `action` when a number of `moments` have begun (what `torch.save` writes is then written by half)."""
    seen = 0

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == moment:
                if original is torch_save:
                    original(*args, **kwargs)
                    with open(args[1], "r+b") as file:
                        file.truncate(100)
                action()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    torch_save = torch.save
    for owner, name in moments:
        wrap(owner, name)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("kind, kills", [("blockwise", 7), ("softmax", 3)])
def test_killed_run_ends_as_if_never_stopped(command, whole, kind, kills, tmp_path):
    chance = random.Random(kind)
    moments = [chance.randint(1, 60) for _ in range(kills)]
    for moment in moments:
        status = in_fork(
            command("killed", kind), functools.partial(act_at, moment, functools.partial(send, signal.SIGKILL))
        )
        assert status in (-signal.SIGKILL, 0), f"{status} after {moments}"
    assert script.main(command("killed", kind)) == 0
    assert_same_runs(whole(kind), tmp_path / "killed")


def test_killed_from_outside_with_data_workers(command, whole, tmp_path):
    """A process of its own and its data worker, killed once it has a checkpoint; then it goes on without a worker."""
    words = command("killed")
    words[words.index("--dataloader_num_workers") + 1] = "1"
    process = start_fork(words)
    try:
        while not list((tmp_path / "killed").glob("checkpoint-*")):
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert status_of(process) == -signal.SIGKILL
    assert script.main(command("killed")) == 0
    assert_same_runs(whole(), tmp_path / "killed")


def test_data_workers_outlive_a_signal_to_all(command, tmp_path, capfd):
    """Ctrl-C in a terminal, or a scheduler: the workers get the signal too, and the step is still done and saved."""

    def to_all():
        everyone = [*psutil.Process().children(), psutil.Process()]
        assert len(everyone) > 1
        # By another process: what ends the workers is a SIGTERM of the one that started them.
        subprocess.run(["kill", "-TERM", *(str(process.pid) for process in everyone)], check=True)

    words = command("stopped")
    words[words.index("--dataloader_num_workers") + 1] = "1"
    moments = [(ImageClassificationTrainer, "training_step")]
    assert in_fork(words, functools.partial(act_at, 6, to_all, moments)) == 143, capfd.readouterr().err
    assert script.main(command("stopped")) == 0


def test_signal_saves_a_checkpoint_and_says_how_to_go_on(command, whole, tmp_path, capfd):
    """In the middle of an epoch; as the evaluation at its end becomes due; and during that evaluation."""
    for moment, step, where in ((7, 4, "training_step"), (3, 6, "training_step"), (2, 6, "prediction_step")):
        moments = [(ImageClassificationTrainer, where)]
        capfd.readouterr()
        status = in_fork(
            command("stopped"), functools.partial(act_at, moment, functools.partial(send, signal.SIGTERM), moments)
        )
        err = capfd.readouterr().err
        assert status == 128 + signal.SIGTERM
        folder = tmp_path / "stopped"
        saved = max(checkpoints.checkpoints(folder))
        assert saved == step
        assert f"{signals.NAMES[signal.SIGTERM]}: a checkpoint is saved" in err
        assert f"goes on from {folder / f'checkpoint-{saved}'}" in err
    assert script.main(command("stopped")) == 0
    # Not the one that was saved before its step was evaluated.
    assert_same_runs(whole(), tmp_path / "stopped", checkpoints_on_the_way=False)


def test_second_signal_stops_at_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_SAME", 0.0)

    def twice():
        send(signal.SIGTERM)
        send(signal.SIGTERM)

    moments = [(ImageClassificationTrainer, "training_step")]
    assert in_fork(command("stopped"), functools.partial(act_at, 5, twice, moments)) == -signal.SIGTERM
    assert script.main(command("stopped")) == 0


def test_same_signal_from_terminal_and_launcher_is_one(command, tmp_path):
    def twice():
        send(signal.SIGINT)
        send(signal.SIGINT)

    moments = [(ImageClassificationTrainer, "training_step")]
    assert in_fork(command("stopped"), functools.partial(act_at, 5, twice, moments)) == 130
    assert checkpoints.checkpoints(tmp_path / "stopped")


# A full disk


@contextmanager
def small_files(limit):
    """No file may grow beyond `limit` bytes, as on a disk that has no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [4_000, 40_000])
def test_full_disk_leaves_the_last_checkpoint_and_says_so(command, whole, limit, tmp_path, monkeypatch, capfd):
    """While the weights are written (19 kB), or the optimiser's state, which is larger."""
    write = Checkpointer.write

    def disk_is_full(self, *args):
        if self.trainer.state.global_step < 6:
            return write(self, *args)
        with small_files(limit):
            return write(self, *args)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "write", disk_is_full)
        assert script.main(command("full")) == 2
    folder, err = tmp_path / "full", capfd.readouterr().err
    assert f"checkpoint-6 could not be written to {folder} (" in err and "GB are free" in err
    assert "goes on from checkpoint-4, which is whole" in err and "Traceback" not in err
    assert not list(folder.glob(".checkpoint*")) and checkpoints.newest(folder) == (folder / "checkpoint-4", {})
    assert script.main(command("full")) == 0
    assert_same_runs(whole(), folder)


def test_disk_that_is_full_at_the_end(command, tmp_path, monkeypatch, capfd):
    def disk_is_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, what in (("save_model", "The trained model"), ("write_reports", "The reports")):
        owner = ImageClassificationTrainer if name == "save_model" else script
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, disk_is_full)
            assert script.main(command("full")) == 2
        err = capfd.readouterr().err
        assert f"{what} could not be written to" in err and "(No space left on device; " in err
    assert script.main(command("full")) == 0
    assert (tmp_path / "full" / "README.md").is_file()


# Damaged checkpoints


@pytest.fixture
def stopped(command, tmp_path, capfd):
    """The folder of a run that was stopped in its last epoch, with two checkpoints."""
    words = command("stopped", "blockwise", "--save_total_limit", "0")
    moments = [(ImageClassificationTrainer, "training_step")]
    assert (
        in_fork(words, functools.partial(act_at, 15, functools.partial(send, signal.SIGKILL), moments))
        == -signal.SIGKILL
    )
    capfd.readouterr()
    return tmp_path / "stopped"


@pytest.mark.parametrize("name", ["optimizer.pt", checkpoints.SUMS])
def test_torn_checkpoint_is_left_out_and_said(command, stopped, name, tmp_path, capfd):
    last = stopped / "checkpoint-8"
    data = (last / name).read_bytes()
    (last / name).write_bytes(data[: len(data) // 2])
    explicit = command("stopped", "blockwise", "--resume", str(last))
    assert script.main(explicit) == 2
    assert f"{last}, which is damaged: {name}" in capfd.readouterr().err
    assert script.main(command("stopped")) == 0
    out = capfd.readouterr().out
    assert "goes on from checkpoint-6" in out and f"checkpoint-8 ({name}" in out
    assert (stopped / "checkpoint-8.damaged" / name).read_bytes() == data[: len(data) // 2]


def test_without_a_whole_checkpoint_nothing_is_thrown_away(command, stopped, capfd):
    for folder in checkpoints.checkpoints(stopped).values():
        (folder / "optimizer.pt").unlink()
    before = sorted(path.name for path in stopped.iterdir() if path.name != ".lock")
    assert script.main(command("stopped")) == 2
    err = capfd.readouterr().err
    assert "Every checkpoint" in err and "checkpoint-8 (optimizer.pt is missing)" in err
    assert sorted(path.name for path in stopped.iterdir()) == before


# Loading weights


@pytest.mark.parametrize("kind", ["softmax", "universal"])
def test_resuming_loads_every_weight(command, kind, tmp_path, capfd):
    """The model that ends a run is the one of its last checkpoint, whichever files that is in; another is refused."""
    folder = tmp_path / "run"
    assert script.main(command("run", kind)) == 0
    trained = load_file(folder / "model.safetensors")
    last = folder / "checkpoint-9"
    (last / checkpoints.SUMS).unlink()  # The files are changed on purpose.
    record = json.loads((folder / "run.json").read_text())

    def finish_again():
        (folder / "run.json").write_text(json.dumps({**record, "finished": None}))
        (folder / "model.safetensors").unlink(missing_ok=True)
        return script.main(command("run", kind))

    assert finish_again() == 0
    assert_same(load_file(folder / "model.safetensors"), trained)
    assert any(name.startswith("vit.layers.0.attention") for name in trained)
    # In several files.
    model = AutoModelForImageClassification.from_pretrained(last)
    (last / "model.safetensors").unlink()
    model.save_pretrained(last, max_shard_size="8KB", save_original_format=False)
    assert len(list(last.glob("model-*.safetensors"))) > 1
    assert finish_again() == 0
    assert_same(load_file(folder / "model.safetensors"), trained)
    # One weight too few, too many, under another name, and of another shape.
    for path in last.glob("model*safetensors*"):
        path.unlink()
    name = "vit.layers.0.mlp.fc1.weight"
    others = {key: value for key, value in trained.items() if key != name}
    for weights, message in (
        (others, f"lacks weights that the model has: {name}"),
        (
            {**trained, "vit.layers.7.mlp.fc1.weight": trained[name].clone()},
            "does not have: vit.layers.7.mlp.fc1.weight",
        ),
        ({**others, "vit.encoder.layer.0.intermediate.dense.weight": trained[name]}, "lacks weights"),
        ({**trained, name: trained[name][:1].clone()}, "do not fit the model"),
    ):
        save_file(weights, last / "model.safetensors", metadata={"format": "pt"})
        assert finish_again() == 2
        assert message in capfd.readouterr().err


def test_best_model_at_the_end_is_that_of_its_checkpoint(command, tmp_path):
    flags = "--load_best_model_at_end --eval_strategy steps --eval_steps 2 --greater_is_better false".split()
    assert script.main(command("run", "universal", *flags, "--metric_for_best_model", "accuracy")) == 0
    folder = tmp_path / "run"
    states = [json.loads((path / "trainer_state.json").read_text()) for path in folder.glob("checkpoint-*")]
    best = max(states, key=lambda state: state["global_step"])["best_global_step"]
    final = load_file(folder / "model.safetensors")
    assert_same(final, load_file(folder / f"checkpoint-{best}" / "model.safetensors"))
    assert best < 9 and not torch.equal(final["classifier.weight"], load_last(folder)["classifier.weight"])


def load_last(folder):
    return load_file(folder / "checkpoint-9" / "model.safetensors")


# Keeping the best


def fake_checkpoints(folder, *steps):
    for step in steps:
        path = checkpoints.checkpoint_folder(folder, step)
        path.mkdir(parents=True)
        for name in ("trainer_state.json", "model.safetensors"):
            (path / name).touch()
    return [checkpoints.checkpoint_folder(folder, step) for step in steps]


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 10, 20]), (1, [2, 20]), (2, [2, 20]), (3, [2, 10, 20])])
def test_rotation_keeps_the_best_and_the_last(tmp_path, limit, kept):
    *_, last = fake_checkpoints(tmp_path, 1, 2, 10, 20)
    (tmp_path / "checkpoint-notes").mkdir()
    log = [{"step": 1, "eval_accuracy": 0.5}, {"step": 2, "eval_accuracy": 0.8}, {"step": 3, "eval_accuracy": 0.9}]
    log += [{"step": 10, "eval_accuracy": 0.8}, {"step": 20, "loss": 1.0}]
    best = checkpoints.best(tmp_path, log, "eval_accuracy", True)
    assert best.name == "checkpoint-2"
    checkpoints.rotate(tmp_path, limit, last, best)
    assert list(checkpoints.checkpoints(tmp_path)) == kept and (tmp_path / "checkpoint-notes").is_dir()
    assert not list(tmp_path.glob(".*"))


def test_best_without_evaluations_and_by_a_loss(tmp_path):
    fake_checkpoints(tmp_path, 1, 2)
    assert checkpoints.best(tmp_path, [], "eval_accuracy", True) is None
    log = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.0}]
    assert checkpoints.best(tmp_path, log, "eval_loss", False).name == "checkpoint-2"


def test_run_keeps_its_best_checkpoint(command, tmp_path):
    flags = ["--save_total_limit", "1", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    assert script.main(command("run", "softmax", *flags, "--save_strategy", "epoch")) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best < 9 and list(checkpoints.checkpoints(tmp_path / "run")) == [best, 9]
