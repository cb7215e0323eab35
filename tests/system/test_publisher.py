# SPDX-License-Identifier: Apache-2.0
"""
Pushing to the Hub and loading from it, over HTTP, against `tests/hub_server.py`: what arrives there, that nothing of
anybody's is overwritten, and that no failure of a push is one of the run.
"""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, close_session, constants
from safetensors.torch import load, load_file
from transformers import pipeline

from image_classification import main as script
from image_classification import pipeline as input_pipeline
from image_classification.errors import InputError
from image_classification.paths import CONFIGURATION
from image_classification.publishing import publisher
from image_classification.publishing.destination import RECORD, Destination
from image_classification.reports.recipe import recipe
from image_classification.runs import checkpoints, run_folder
from image_classification.runs.signals import without_token
from image_classification.settings.arguments import RunArguments
from image_classification.settings.parser import parse_settings
from image_classification.training import ema
from image_classification.training.checkpointing import Checkpointer
from image_classification.training.trainer import ImageClassificationTrainer
from tests.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN
from tests.system import processes


PROJECT = Path(__file__).parents[2]
# What `karatize` makes has files of its own.
CODE = {*publisher.CODE} - {"karatize.py", "karat_backbones.py", "karat_convit.py", "karat_heads.py"}
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", *CODE}
FINISHED = {*MODEL, "README.md", "recipe.yaml", "all_results.json", "history.json", "training_curves.png", RECORD}
UNFINISHED = FINISHED - {"all_results.json"}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr("image_classification.publishing.publisher.WAITS", (0.05, 0.05))


def words(folder, *more, push=True):
    """A run of two epochs, of two steps and a second; `more` goes over it."""
    flags = "--model karat_digits --image_size 8 --patch_size 4 --eval_crop_ratio 1 --data_set digits --use_cpu "
    flags += "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --karat_rank 2 "
    flags += "--per_device_train_batch_size 16 --warmup_epochs 0 --cpu_threads 1 --disable_tqdm --seed 3 "
    flags += "--dataloader_num_workers 0 --max_train_samples 32 --max_eval_samples 20 --num_train_epochs 2 "
    flags += "--learning_rate 0.01" + " --push_to_hub" * push
    more, found = [*map(str, more)], flags.split()
    for name in (word for word in more if word.startswith("--") and word in found):
        del found[found.index(name) : found.index(name) + 2]
    return [*found, "--output_dir", str(folder), *more]


def train(folder, *more, push=True) -> int:
    return script.main(words(folder, *more, push=push))


def fails(capsys, *argv) -> str:
    assert script.main(list(argv)) == 2
    message = capsys.readouterr().err
    assert message.startswith("run_image_classification.py: error: ") and "Traceback" not in message
    return " ".join(message.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run that was not pushed."""
    folder = tmp_path_factory.mktemp("trained") / "digits"
    assert train(folder, push=False) == 0
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "digits"))


def repository(server, name="me/digits"):
    return server.repositories["model", name]


# What arrives.


def test_from_the_shell_to_a_stranger(hub, tmp_path, monkeypatch, stranger, capsys):
    """The script pushes; somebody without this package loads; somebody with the recipe gets the same model again."""
    folder = tmp_path / "digits"
    command = [sys.executable, "run_image_classification.py", *words(folder, "--hub_private_repo")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stdout + result.stderr and "{'" not in result.stdout
    assert f"Hub     {hub.endpoint}/me/digits, pushed at every save" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == f"Pushed {hub.endpoint}/me/digits."
    there = repository(hub)
    assert there.private and set(there.files()) == FINISHED
    assert there.titles()[1] == "Training in progress: step 2, epoch 1 of 2"
    assert there.titles()[-1] == "Finished training"
    for name in FINISHED - {"README.md", RECORD}:
        assert there.files()[name] == (folder / name).read_bytes(), name
    # The token went to the Hub alone, and no folder of this machine did.
    for path in [*folder.rglob("*")]:
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    for name, content in there.files().items():
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, name

    image = folder / "sample.png"
    _, guesses = stranger("me/digits", image)
    expected = pipeline("image-classification", model=str(folder))(str(image), top_k=10)
    assert guesses == [{**item, "score": pytest.approx(item["score"])} for item in expected]

    hf = Path(sys.executable).with_name("hf")
    download = [hf, "download", "me/digits", "recipe.yaml", "--local-dir", tmp_path / "elsewhere"]
    subprocess.run(download, check=True, capture_output=True)
    again = [str(tmp_path / "elsewhere" / "recipe.yaml"), "--output_dir", str(tmp_path / "again"), "--cpu_threads", "1"]
    assert script.main(again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == there.files()["model.safetensors"]


def test_card_as_hub_metadata(hub, finished):
    assert train(finished) == 0
    metrics = json.loads((finished / "all_results.json").read_text())
    info = HfApi().model_info("me/digits")
    assert (info.pipeline_tag, info.library_name) == ("image-classification", "transformers")
    assert {"vision", "karat-vit"} <= set(info.tags)
    results = {result.metric_name: result for result in info.card_data.eval_results}
    for name, key in (("Top-1 accuracy", "accuracy"), ("Top-5 accuracy", "top5_accuracy"), ("Loss", "loss")):
        assert results[name].metric_value == pytest.approx(metrics[f"eval_{key}"], abs=1e-6)
        assert results[name].dataset_type == "handwritten digits (scikit-learn)"
    card = ModelCard.load("me/digits").text
    assert 'model="me/digits", trust_remote_code=True' in card and "hf download me/digits recipe.yaml" in card
    assert "sample.png" not in card and "this folder" not in card


def test_the_run_of_a_hub_data_set_names_it(hub, image_folder, small, tmp_path, monkeypatch):
    """The Hub's metadata have the data set's id, its split, and the model that was fine-tuned."""
    original = input_pipeline.load_data

    def as_on_the_hub(*args):
        found = original(*args)
        found.name = found.hub_name = "uoft-cs/cifar10"
        found.split = "test"
        return found

    monkeypatch.setattr(input_pipeline, "load_data", as_on_the_hub)
    flags = ["--model", "vit_tiny_patch16_224", *small, "--image_size", "16", "--patch_size", "4"]
    flags += ["--data_path", str(image_folder), "--num_train_epochs", "1", "--push_to_hub", "--hub_strategy", "end"]
    assert script.main([*flags, "--output_dir", str(tmp_path / "softmax")]) == 0
    card = HfApi().model_info("me/softmax").card_data
    assert card.datasets == ["uoft-cs/cifar10"]
    assert {(r.dataset_type, r.dataset_split) for r in card.eval_results} == {("uoft-cs/cifar10", "test")}
    recipe = repository(hub, "me/softmax").files()["recipe.yaml"].decode()
    assert "# Add --data_path: it was the folder images, elsewhere." in recipe and str(tmp_path) not in recipe
    # Softmax ViT is Transformers' own: no code of ours goes with it.
    assert not [name for name in repository(hub, "me/softmax").files() if name.endswith(".py")]


def test_averaged_weights_if_they_are_better(hub, tmp_path, monkeypatch):
    """In training as at the end, and the card says so."""
    judge = ema.better

    def prefer_the_average(metrics):
        if "eval_ema_accuracy" in metrics:
            metrics = {**metrics, "eval_ema_accuracy": 1.0}
        return judge(metrics)

    monkeypatch.setattr(ema, "better", prefer_the_average)
    folder = tmp_path / "digits"
    words = ["--model_ema", "--model_ema_decay", "0.5", "--hub_always_push", "--hub_strategy", "checkpoint"]
    assert train(folder, *words) == 0
    last = repository(hub).branches["main"]
    first = next(commit for commit in history(last) if commit.title.endswith("epoch 1 of 2"))
    for commit in (first, last):
        files = {path: file.data for path, file in commit.files.items()}
        weights, average = load(files["model.safetensors"]), load(files["last-checkpoint/ema.safetensors"])
        assert all(weights[name].equal(tensor) for name, tensor in average.items())
        plain = load(files["last-checkpoint/model.safetensors"])
        assert weights.keys() == plain.keys() and any(not weights[name].equal(plain[name]) for name in average)
        assert "Written are the averaged weights" in files["README.md"].decode()
    assert "Training goes on: this is the model after step 2, epoch 1 of 2" in first.files["README.md"].data.decode()


def history(commit):
    while commit is not None:
        yield commit
        commit = commit.parent


def test_what_the_hub_has_is_taken_by_its_name(hub, finished, tmp_path, capsys):
    assert train(finished) == 0
    metrics = json.loads((finished / "all_results.json").read_text())
    assert script.main("--eval --resume me/digits --data-set digits --device cpu --max_eval_samples 20".split()) == 0
    assert f"accuracy {100 * metrics['eval_accuracy']:.2f} %" in capsys.readouterr().out
    words = "--finetune me/digits --data_set digits --use_cpu --disable_tqdm --num_train_epochs 1".split()
    words += "--max_train_samples 16 --warmup_epochs 0 --push_to_hub --dataloader_num_workers 0".split()
    assert script.main([*words, "--output_dir", str(tmp_path / "tuned")]) == 0
    assert "Weights of me/digits; new: nothing" in capsys.readouterr().out
    assert HfApi().model_info("me/tuned").card_data.base_model == "me/digits"
    assert script.main(["--resume", "me/digits", *words[2:], "--output_dir", str(tmp_path / "o")]) == 2
    assert "holds no checkpoint, only the model" in capsys.readouterr().err


# Strategies.


def test_another_machine_goes_on_from_the_last_checkpoint(hub, trained, tmp_path, capsys):
    """To the same bits as a run that was never stopped, and pushes to the same repository."""
    first, second = tmp_path / "first" / "digits", tmp_path / "second" / "digits"
    words = ("--hub_strategy", "checkpoint", "--hub_always_push")
    assert train(first, *words) == 0
    # As if it had been stopped after the first epoch, with its folder lost.
    there = repository(hub)
    there.branches["main"] = next(c for c in history(there.branches["main"]) if c.title.endswith("epoch 1 of 2"))
    assert {path for path in there.files() if "/" not in path} == UNFINISHED
    assert train(second, *words, "--resume_from_checkpoint", "me/digits") == 0
    files = there.files()
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4
    last = second / "checkpoint-4"
    assert {path.name for path in last.iterdir()} == {
        path.removeprefix("last-checkpoint/") for path in files if path.startswith("last-checkpoint/")
    }


def test_another_machine_ends_with_the_best_checkpoint(hub, tmp_path, capsys):
    """Though that is the pushed one; no checkpoint has a folder of the machine that it comes from."""
    first, second, third = (tmp_path / name / "digits" for name in ("first", "second", "third"))
    words = ("--hub_strategy", "checkpoint", "--hub_always_push", "--load_best_model_at_end")
    assert train(first, *words) == 0
    there = repository(hub)
    assert all(str(tmp_path).encode() not in content for content in there.files().values())
    final, commits = there.files()["model.safetensors"], history(there.branches["main"])
    assert json.loads(there.files()["last-checkpoint/trainer_state.json"])["best_model_checkpoint"] == "checkpoint-2"
    end, half = (next(c for c in commits if c.title.endswith(f"epoch {epoch} of 2")) for epoch in (2, 1))
    shutil.rmtree(first)
    there.branches["main"] = half
    assert train(second, *words, "--resume_from_checkpoint", "me/digits") == 0
    assert there.files()["model.safetensors"] == final
    assert "is not here" not in capsys.readouterr().out
    # One that is neither here nor there is told.
    there.branches["main"] = end
    assert train(third, *words, "--resume_from_checkpoint", "me/digits", "--num_train_epochs", "3") == 0
    assert "checkpoint-2, the best so far (`accuracy` 0.05), is not here" in capsys.readouterr().out


def test_all_checkpoints(hub, tmp_path):
    """Those that `save_total_limit` deletes here, too; a run that goes on adds to them."""
    words = ("--hub_strategy", "all_checkpoints", "--save_total_limit", "1", "--metric_for_best_model", "loss")
    assert train(tmp_path / "digits", *words) == 0
    checkpoint = tmp_path / "digits" / "checkpoint-4"
    assert train(tmp_path / "digits", *words, "--num_train_epochs", "3", "--resume", checkpoint) == 0
    files = repository(hub).files()
    assert {path.split("/")[0] for path in files if "/" in path} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    assert len(checkpoints.checkpoints(tmp_path / "digits")) < 3


def test_pushing_does_not_hold_up_training(hub, tmp_path):
    """While the first push hangs, training goes on to its end; of the saves meanwhile only the newest is pushed."""
    folder, status = tmp_path / "digits", []
    with hub.gate:
        hub.add("me/digits")
        thread = threading.Thread(target=lambda: status.append(train(folder, "--num_train_epochs", "4")))
        thread.start()
        deadline = time.time() + 60
        while not (folder / "all_results.json").is_file():
            assert time.time() < deadline and thread.is_alive()
            time.sleep(0.05)
        assert repository(hub).titles() == ["initial commit"]
    thread.join()
    assert status == [0]
    titles = repository(hub).titles()
    assert titles[1] == "Training in progress: step 2, epoch 1 of 4" and titles[-1] == "Finished training"
    assert len(titles) <= 4 and not list(folder.glob(".push*"))


# Pushes that fail.


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("POST .*/commit/main", 503),
        ("POST .*/commit/main", "lost"),
        ("PUT /lfs/", "drop"),
    ],
)
def test_what_passes_is_tried_again(hub, finished, capsys, request_, status):
    hub.add("me/digits")
    hub.fail(request_, status)
    assert train(finished) == 0
    assert hub.failures[0].times == 0
    assert set(repository(hub).files()) == FINISHED
    assert len(repository(hub).titles()) == 2
    assert "Not pushed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ("POST .*/commit/main", 401, "the Hub does not know your token: log in with `hf auth login`"),
        ("POST .*/commit/main", 412, "somebody else wrote there at the same time (told so)"),
        ("POST .*/preupload/main", "drop", "the Hub cannot be reached"),
    ],
)
def test_failed_push_is_told_and_made_up_for(hub, finished, capsys, monkeypatch, tmp_path, request_, status, said):
    """It does not fail the command; the same one pushes what is missing."""
    if status == "drop":
        quick(monkeypatch, tmp_path)
    hub.fail(request_, status, times=100)
    assert train(finished) == 0
    captured = capsys.readouterr()
    out = captured.out + captured.err
    assert f"warning: Not pushed to me/digits: the finished run: {said}" in out and "Traceback" not in out
    assert f"hf upload me/digits {finished} . --exclude 'checkpoint-*'" in out and "same command again pushes it" in out
    assert repository(hub).titles() == ["initial commit"] and not list(finished.glob(".push*"))
    hub.fail(request_, status, times=0)
    assert train(finished) == 0
    assert set(repository(hub).files()) == FINISHED


def quick(monkeypatch, tmp_path):
    """huggingface_hub repeats requests after seconds; the process that pushes does not wait for them."""
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'quick'}:{os.environ.get('PYTHONPATH', '')}")


def test_the_command_by_hand_pushes_the_same(hub, finished):
    hub.fail("POST .*/commit/main", 403, times=100)
    assert train(finished) == 0
    hub.fail("POST .*/commit/main", 403, times=0)
    command = Destination("me/digits", "", "").command(finished)
    hf = Path(sys.executable).with_name("hf")
    subprocess.run(command.replace("hf", str(hf), 1), shell=True, check=True, capture_output=True)
    assert set(repository(hub).files()) == FINISHED - {RECORD}


def test_a_push_that_fails_in_training_is_told_once(hub, tmp_path, capsys, monkeypatch):
    """And the next ones are tried, where an epoch takes longer than a push."""
    on_save = publisher.Publisher.on_save

    def save_and_wait(self, *args, **kwargs):
        on_save(self, *args, **kwargs)
        concurrent.futures.wait([push.outcome for push in self._pushes])

    monkeypatch.setattr(publisher.Publisher, "on_save", save_and_wait)
    hub.fail("POST .*/commit/main", 403, times=2)
    assert train(tmp_path / "digits", "--num_train_epochs", "4") == 0
    assert repository(hub).titles()[1] == "Training in progress: step 6, epoch 3 of 4"
    out = capsys.readouterr().out
    assert f"Pushed {hub.endpoint}/me/digits (step 6, epoch 3 of 4). Every save is pushed from now on." in out
    assert out.count("Not pushed: ") == 1 and "Training goes on, and the next save is pushed again." in out
    assert set(repository(hub).files()) == FINISHED


def test_what_cannot_be_prepared_is_told(hub, tmp_path, capsys, monkeypatch):
    """On a full disk, say."""

    def link(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publisher, "_link", link)
    assert train(tmp_path / "digits") == 0
    out = capsys.readouterr().out
    assert "Not pushed: step 2, epoch 1 of 2: [Errno 28] No space left on device. Training goes on" in out
    assert "Not pushed to me/digits: [Errno 28]" in out and not list((tmp_path / "digits").glob(".push*"))


def test_without_a_network(hub, tmp_path, capsys):
    """It is told at the start and at the end, and pushed when the same command finds the Hub."""
    folder, server = tmp_path / "digits", hub.server
    hub.__exit__()
    close_session()
    assert train(folder) == 0
    out = capsys.readouterr().out
    assert "warning: `push_to_hub` to digits: the Hub cannot be reached" in out
    assert "Not pushed to digits: the finished run: the Hub cannot be reached" in out
    port = server.server_port
    with type(hub)(port) as again:
        assert train(folder) == 0
        assert set(again.repositories["model", "me/digits"].files()) == FINISHED


def test_offline_mode_trains_and_pushes_later(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert train(tmp_path / "digits", "--hub_model_id", "lab/it") == 0
    assert "`push_to_hub` to lab/it: HF_HUB_OFFLINE is set" in capsys.readouterr().out and not hub.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert train(tmp_path / "digits", "--hub_model_id", "lab/it") == 0
    assert set(repository(hub, "lab/it").files()) == FINISHED


# What cannot be pushed is said before training.


def test_no_token(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with `hf auth login`" in fails(capsys, *words(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hub_model_id", "a/b/c"], "would be called a/b/c, which the Hub does not take"),
        (["--hub_model_id", "my run"], "would be called my run, which the Hub does not take"),
        (["--hub_token", "hf_nobody"], "the Hub does not know your token: log in"),
        (["--hub_token", READ_TOKEN], "your token may only read"),
        (["--hub_token", OTHER_TOKEN, "--hub_model_id", "me/x"], "your token may not write there: You don't have"),
        (["--hub_strategy", "sometimes"], "invalid choice: 'sometimes'"),
        (["--eval"], "this one only evaluates. For a finished run, give the command that trained it"),
    ],
)
def test_settings_that_cannot_work(hub, tmp_path, capsys, flags, said):
    try:
        message = fails(capsys, *words(tmp_path / "o", *flags))
    except SystemExit:  # Of argparse.
        message = capsys.readouterr().err
    assert said in message
    assert not (tmp_path / "o").exists() and not hub.repositories


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"theirs"},
        {"README.md": b"# Mine"},
        {RECORD: b'{"run": "another", "files": {"config.json": ""}}', "config.json": b"{}", "notes.md": b"mine"},
    ],
    ids=["another-model", "a-card", "another-run"],
)
def test_nothing_of_anybody_is_overwritten_unasked(hub, finished, capsys, files):
    there = hub.add("me/digits", files)
    message = fails(capsys, *words(finished))
    assert f"{hub.endpoint}/me/digits holds " in message and "--hub_overwrite" in message
    assert there.files() == files
    assert train(finished, "--hub_overwrite") == 0
    assert FINISHED <= set(there.files()) and there.files().get("notes.md") == files.get("notes.md")
    # It is this run's now.
    assert train(finished) == 0


def test_private_run_does_not_go_public(hub, finished, capsys):
    hub.add("me/digits")
    assert "is public" in fails(capsys, *words(finished, "--hub_private_repo"))
    assert "is public" in fails(capsys, *words(finished, "--hub_private_repo", "--hub_revision", "mine"))
    assert set(repository(hub).branches) == {"main"}


def test_another_run_in_another_folder(hub, finished, tmp_path, capsys):
    """The same name is no reason to replace the model there."""
    assert train(finished) == 0
    assert "the model of another run" in fails(capsys, *words(tmp_path / "elsewhere" / "digits", "--seed", "4"))
    # Nor is a checkpoint that it goes on from, under other settings.
    on = (tmp_path / "on" / "digits", "--resume_from_checkpoint", finished / "checkpoint-2")
    assert "the model of another run" in fails(capsys, *words(*on, "--weight_decay", "0.1"))
    assert train(*on) == 0


def test_branch(hub, finished, tmp_path):
    """A branch that does not exist is made, and is the run's, whatever is on `main`."""
    assert train(finished) == 0
    before = repository(hub).files()
    assert train(tmp_path / "other", "--seed", "4", "--hub_model_id", "digits", "--hub_revision", "seed/4") == 0
    files = repository(hub).files("seed/4")
    assert set(files) == FINISHED and files["model.safetensors"] != before["model.safetensors"]
    assert repository(hub).files() == before
    assert train(tmp_path / "other", "--seed", "4", "--hub_model_id", "digits", "--hub_revision", "seed/4") == 0


# What others do there meanwhile.


def test_what_somebody_changed_is_refused(hub, finished, capsys):
    assert train(finished) == 0
    hub.change("me/digits", {"README.md": b"# Better words", "notes.md": b"mine", "history.json": None})
    before = repository(hub).files()
    message = fails(capsys, *words(finished))
    assert f"{hub.endpoint}/me/digits was changed" in message and "--hub_overwrite" in message
    assert repository(hub).files() == before
    assert train(finished, "--hub_overwrite") == 0
    files = repository(hub).files()
    assert set(files) == FINISHED | {"notes.md"} and files["README.md"] != b"# Better words"
    # It is this run's again, also where somebody only adds a file.
    hub.change("me/digits", {"more.md": b"mine"})
    assert train(finished, "--hub_overwrite") == 0
    assert train(finished) == 0


def test_what_somebody_changes_while_it_trains_is_not_overwritten(hub, finished, capsys, monkeypatch):
    assert train(finished) == 0
    prepare = script.prepare
    monkeypatch.setattr(
        script, "prepare", lambda destination: prepare(destination) or hub.change("me/digits", {"config.json": b"{}"})
    )
    assert train(finished) == 0
    out = capsys.readouterr().out
    assert "Not pushed to me/digits" in out and "--hub_overwrite" in out
    assert "hf upload" not in out  # Which would overwrite it.
    assert repository(hub).files()["config.json"] == b"{}"


def test_branch_of_files_that_no_run_pushed(hub, finished):
    """They may be replaced there, since `main` keeps them; the others stay."""
    there = hub.add("me/digits", {"config.json": b"{}", "notes.md": b"mine", "README.md": b"# Mine"})
    for _ in range(2):
        assert train(finished, "--hub_revision", "ours") == 0
    files = there.files("ours")
    assert set(files) == FINISHED | {"notes.md"} and files["config.json"] == (finished / "config.json").read_bytes()
    assert there.files()["config.json"] == b"{}"


@pytest.mark.parametrize("record", [b"{", b'{"run": "x"}'])
def test_record_that_somebody_damaged(hub, finished, capsys, record):
    hub.add("me/digits", {RECORD: record, "config.json": b"{}"})
    assert "holds files that no run pushed" in fails(capsys, *words(finished))
    assert train(finished, "--hub_overwrite") == 0
    assert set(repository(hub).files()) == FINISHED


def test_private_repository_by_hand(tmp_path):
    """Where there is no repository, `hf upload` makes a public one unless told otherwise."""
    assert "--private" in Destination("me/x", run="a", token=TOKEN, private=True).command(tmp_path)
    assert "--private" not in Destination("me/x", run="a", token=TOKEN).command(tmp_path)


def test_nothing_new_makes_no_commit(hub, finished, capsys):
    assert train(finished) == 0
    titles = repository(hub).titles()
    assert train(finished) == 0
    assert "Up to date: " in capsys.readouterr().out and repository(hub).titles() == titles


# Runs that are stopped, and several processes.


def long(folder):
    """A run that can be stopped in its middle; the token is in its command line."""
    words_ = words(folder, "--num_train_epochs", "40", "--save_strategy", "steps", "--save_steps", "10")
    return [*words_, "--eval_strategy", "no", "--hub_token", TOKEN]


def wait_for_a_push(folder, alive):
    while not list(folder.glob(".push*")):
        assert alive()
        time.sleep(0.01)


def goes_on(hub, folder):
    assert script.main(long(folder)) == 0
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert set(repository(hub).files()) == FINISHED and not list(folder.glob(".push*"))


def test_stopped_run_goes_on_pushing(hub, tmp_path):
    """The push under way is left off. The token is not in the command that is shown."""
    folder = tmp_path / "digits"
    command = [sys.executable, "run_image_classification.py", *long(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": ""}
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with hub.gate:
        hub.add("me/digits")
        wait_for_a_push(folder, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 143, out
    assert "A push to the Hub was left off" in out and "--hub_token TOKEN" in out and TOKEN not in out
    goes_on(hub, folder)


def test_killed_run_goes_on_pushing(hub, tmp_path):
    """Its push may still be under way."""
    folder = tmp_path / "digits"
    with hub.gate:
        hub.add("me/digits")
        process = os.fork()
        if process == 0:
            try:
                script.main(long(folder))
            finally:
                os._exit(99)
        wait_for_a_push(folder, lambda: os.waitpid(process, os.WNOHANG) == (0, 0))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    goes_on(hub, folder)


def test_ctrl_c_in_the_last_push(hub, finished, capsys):
    hub.add("me/digits")

    def interrupt():
        while not hub.count("POST .*/preupload"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    with hub.gate:
        threading.Thread(target=interrupt, daemon=True).start()
        assert train(finished) == 130
    assert "The run is finished; the same command pushes it to the Hub." in capsys.readouterr().err
    assert not list(finished.glob(".push*"))
    assert train(finished) == 0
    assert set(repository(hub).files()) == FINISHED


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_of_several_processes_one_pushes(hub, tmp_path, layout, capfd):
    argv = words(tmp_path / "digits", "--hub_strategy", "checkpoint", "--per_device_train_batch_size", "8")

    def run():
        if layout == "fsdp2":
            processes.launched_by(PROJECT / "accelerate_configs" / "fsdp2.yaml")
            gather = Checkpointer.whole_weights

            def gathered(self):
                if (weights := gather(self)) is not None:
                    print("gathered", flush=True)
                return weights

            Checkpointer.whole_weights = gathered
        return script.main(argv)

    statuses = processes.in_two_forks(run)
    out, errors = capfd.readouterr()
    assert statuses == [0, 0], out + errors
    assert hub.count("GET /api/whoami-v2") == 1
    assert "2 processes" in out and ("gathered" in out) == (layout == "fsdp2")
    assert out.count(f"Pushed {hub.endpoint}/me/digits.\n") == 1
    files = repository(hub).files()
    assert {path for path in files if "/" not in path} == FINISHED
    assert "accelerate launch --num_processes 2" in files["recipe.yaml"].decode()
    weights, here = load(files["model.safetensors"]), load_file(tmp_path / "digits" / "model.safetensors")
    assert weights.keys() == here.keys() and all(weights[name].equal(here[name]) for name in here)
    assert load(files["last-checkpoint/model.safetensors"]).keys() == here.keys()


# The pieces.


RECIPES = [CONFIGURATION / "digits.yaml", *CONFIGURATION.glob("*/vit_tiny_patch16_224_karat.yaml")]
RECIPES += [*CONFIGURATION.glob("ablations/*.yaml"), CONFIGURATION / "cifar10" / "vit_tiny_patch16_224.yaml"]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_as_resolved_gives_the_same_settings(path, tmp_path):
    words = ["--output_dir", "o", "--use_cpu", "--grid", "5", "--lr", "3e-4", "--dataloader_drop_last"]
    words = words if "karat" in path.stem else [word for word in words if word not in ("--grid", "5")]
    if path.stem == "digits" or "learning_rate" in path.read_text():
        words = [word for word in words if word not in ("--lr", "3e-4")]
    settings = parse_settings([str(path), *words])
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe(settings.record, settings.training, settings.reported))
    again = parse_settings([str(written), "--output_dir", "o", "--use_cpu"])
    assert recipe(again.record, again.training, again.reported) == written.read_text()
    assert again.reported == settings.reported
    before, now = (run_folder.Request.of(each.record, each.training).settings for each in (settings, again))
    assert not run_folder.differences(before, now)


def test_token_is_not_shown():
    """Neither in a command that is printed, nor in the settings that trackers keep."""
    args = RunArguments(output_dir="o", hub_token=TOKEN, use_cpu=True)
    assert TOKEN not in args.to_json_string() and TOKEN not in str(args.to_sanitized_dict())
    hidden = ["python", "x.py", "--hub_token", "TOKEN", "--hub-token=TOKEN", "--seed", "1"]
    assert without_token(["python", "x.py", "--hub_token", "hf_a", "--hub-token=hf_b", "--seed", "1"]) == hidden


def test_hub_settings_alone_have_no_effect_and_say_so(tmp_path, capsys):
    assert train(tmp_path / "o", "--hub_model_id", "me/x", push=False) == 0
    assert "`hub_model_id` has no effect without `push_to_hub`" in capsys.readouterr().out


def test_transformers_own_push_is_refused():
    """It would pickle the token into the output folder."""
    args = RunArguments(output_dir="o", push_to_hub=True, use_cpu=True)
    with pytest.raises(InputError, match=r"publisher\.Publisher"):
        ImageClassificationTrainer(model=None, args=args)
