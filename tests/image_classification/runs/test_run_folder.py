# SPDX-License-Identifier: Apache-2.0
"""The output folder: nothing of anyone's is overwritten, and the same command goes on or says that it is done."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.runs import checkpoints, run_folder
from image_classification.settings.parser import parse_settings
from image_classification.training.trainer import ImageClassificationTrainer


def request(folder, *words):
    settings = parse_settings(["--output_dir", str(folder), "--use_cpu", *words])
    return run_folder.Request.of(settings.record, settings.training)


def checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    if complete:
        (path / "trainer_state.json").touch()
    return path


def test_new_or_empty_folder(tmp_path):
    assert run_folder.plan(request(tmp_path / "new")) == run_folder.Plan()
    assert run_folder.plan(request(tmp_path)) == run_folder.Plan()


def test_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex.*Choose another --output_dir"):
        run_folder.plan(request(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        run_folder.plan(request(tmp_path / "thesis.tex"))


def test_the_same_command_goes_on_from_the_last_complete_checkpoint(tmp_path):
    mine = request(tmp_path)
    run_folder.write_record(mine)
    assert "starts again" in run_folder.plan(mine).message
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, complete=False)
    assert run_folder.plan(mine).checkpoint == str(tmp_path / "checkpoint-10")


def test_settings_that_only_change_the_speed_are_free(tmp_path):
    run_folder.write_record(request(tmp_path))
    checkpoint(tmp_path, 1)
    assert run_folder.plan(
        request(tmp_path, "--num_workers", "7", "--save_total_limit", "0", "--disable_tqdm")
    ).checkpoint


def test_batch_is_what_all_devices_make_of_it(tmp_path):
    """Half the images on each of two devices, or in twice as many parts, are the same run; half in all are not."""
    run_folder.write_record(request(tmp_path, "--batch-size", "32", "--gradient_accumulation_steps", "2"))
    checkpoint(tmp_path, 1)
    assert run_folder.plan(request(tmp_path, "--batch-size", "16", "--gradient_accumulation_steps", "4")).checkpoint
    with pytest.raises(InputError, match=r"`global_batch_size` was 64 and is now 32.*--per_device_train_batch_size"):
        run_folder.plan(request(tmp_path, "--batch-size", "16", "--gradient_accumulation_steps", "2"))


@pytest.mark.system
@pytest.mark.parametrize("existed", [True, False])
def test_only_one_process_trains_in_a_folder(tmp_path, existed):
    """As long as it lives, and no longer, however it ends; also in a folder that there was not before."""
    folder = tmp_path if existed else tmp_path / "new" / "run"
    ready, held = os.pipe()
    process = os.fork()
    if process == 0:
        with run_folder.FolderLock() as lock:
            lock.take(str(folder))
            os.write(held, b"!")
            signal.pause()
    os.read(ready, 1)
    with run_folder.FolderLock() as lock:
        with pytest.raises(InputError, match=r"Another process is training in .* --output_dir"):
            lock.take(str(folder))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        lock.take(str(folder))
        assert (folder / run_folder.LOCK).is_file()
        # Not inherited by data workers, which may outlive this process for a while.
        worker = os.fork()
        if worker == 0:
            signal.pause()
    try:
        with run_folder.FolderLock() as lock:
            lock.take(str(folder))
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    assert not (folder / run_folder.LOCK).exists() and (folder.exists() or not existed)


def test_folder_that_was_only_locked_is_not_left_behind(tmp_path):
    with run_folder.FolderLock() as lock:
        lock.take(str(tmp_path / "a" / "b"))
        assert run_folder.plan(request(tmp_path / "a" / "b")) == run_folder.Plan()
    assert not (tmp_path / "a").exists() and tmp_path.exists()
    with run_folder.FolderLock() as lock:
        lock.take(str(tmp_path / "a" / "b"))
        run_folder.write_record(request(tmp_path / "a" / "b"))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [run_folder.RECORD]


def test_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with run_folder.FolderLock() as lock, pytest.raises(InputError, match=f"{folder.name[:20]}"):
            lock.take(str(folder))


@pytest.mark.system
def test_second_command_changes_nothing_of_the_first(tmp_path, monkeypatch, small, capsys):
    """While the first one trains in a folder that was new to both, another one with another seed is refused."""
    folder = tmp_path / "run"
    words = [*small, "--model", "karat_digits", "--data_set", "digits", "--max_train_samples", "32"]
    words += ["--num_train_epochs", "1", "--max_eval_samples", "8", "--output_dir", str(folder)]
    seen = []

    def second(name):
        """Another process, while the first one reads its data, before it has written anything, and while it trains."""
        process = os.fork()
        if process == 0:
            monkeypatch.undo()
            os._exit(script.main([*words, "--seed", "7"]))
        seen.append((name, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), run_folder.read_record(folder)))

    load, train = script.load_images, ImageClassificationTrainer.train
    monkeypatch.setattr(script, "load_images", lambda *args: (second("data"), load(*args))[1])
    monkeypatch.setattr(
        ImageClassificationTrainer, "train", lambda *args, **kwargs: (second("train"), train(*args, **kwargs))[1]
    )
    assert script.main(words) == 0
    assert [(name, status) for name, status, _ in seen] == [("data", 2), ("train", 2)]
    assert seen[0][2] is None and seen[1][2]["settings"]["seed"] == 42
    assert run_folder.read_record(folder)["settings"]["seed"] == 42


def test_folder_without_a_checkpoint_may_be_used_again(tmp_path):
    """By a command with other settings, which is another run; not where anything was trained."""
    run_folder.write_record(request(tmp_path, "--grid", "3"), identity="first", start=1.0)
    (tmp_path / "preprocessor_config.json").touch()
    corrected = request(tmp_path, "--grid", "5")
    plan = run_folder.plan(corrected)
    assert plan.anew and plan.checkpoint is None and plan.identity != "first"
    run_folder.write_record(corrected, identity=plan.identity, start=2.0)
    record = run_folder.read_record(tmp_path)
    assert (record["settings"]["grid_size"], record["id"], record["start"]) == (5, plan.identity, 2.0)
    # Also one that goes on from another folder's checkpoint, and was refused before.
    path = checkpoint(tmp_path / "other", 4)
    resumed = request(tmp_path, "--grid", "3", "--resume", str(path))
    assert run_folder.plan(resumed).checkpoint == str(path) and run_folder.plan(resumed).anew
    for name in ("checkpoint-7", "checkpoint-8.damaged", "model.safetensors"):
        (tmp_path / name).mkdir()
        for words in (["--grid", "3"], ["--grid", "3", "--resume", str(path)]):
            with pytest.raises(InputError, match="another"):
                run_folder.plan(request(tmp_path, *words))
        (tmp_path / name).rmdir()
    run_folder.write_record(corrected, finished={"metrics": {"eval_accuracy": 0.5}, "eval_images": 2})
    with pytest.raises(InputError, match="another run"):
        run_folder.plan(request(tmp_path, "--grid", "3"))


def test_refused_command_may_be_corrected(image_folder, tmp_path, small, capsys):
    words = [*small, "--model", "vit_tiny_patch16_224", "--data_path", str(image_folder), "--patch_size", "4"]
    words += ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert script.main([*words, "--image_size", "8", "16"]) == 2
    assert "`eval_crop_ratio`" in capsys.readouterr().err
    # Refused later: when its optimiser is made, after the record is written.
    assert script.main([*words, "--image_size", "8", "--optim_args", "what"]) == 2
    assert run_folder.read_record(tmp_path / "run") is not None
    assert script.main([*words, "--image_size", "8", "16", "--eval_crop_ratio", "1"]) == 0
    assert run_folder.read_record(tmp_path / "run")["settings"]["image_size"] == [8, 16]


def test_record_that_was_half_written_counts_as_none(tmp_path):
    (tmp_path / ".run.json.part").write_text("{")
    assert run_folder.plan(request(tmp_path)) == run_folder.Plan()


def test_another_run_names_what_differs(tmp_path):
    run_folder.write_record(request(tmp_path, "--grid", "3"))
    path = checkpoint(tmp_path, 4)
    with pytest.raises(InputError, match="another run: `grid_size` was 3 and is now 5"):
        run_folder.plan(request(tmp_path, "--grid", "5"))
    # Unless a checkpoint of it is named.
    assert run_folder.plan(request(tmp_path, "--num_train_epochs", "50", "--resume", str(path))).checkpoint == str(path)


def test_finished_run_has_nothing_left_to_do(tmp_path):
    mine = request(tmp_path)
    finished = {"metrics": {"eval_accuracy": 0.5}, "eval_images": 4}
    run_folder.write_record(mine, finished)
    with pytest.raises(InputError, match="without its weights"):
        run_folder.plan(mine)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        run_folder.plan(mine)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert run_folder.plan(mine).finished == finished


def test_resume_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run_folder.plan(request(tmp_path / "new", "--resume", str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds none.*trainer_state\.json.*--finetune"):
        run_folder.plan(request(tmp_path / "new", "--resume", str(tmp_path / "empty")))


def test_resume_takes_the_last_checkpoint_of_a_run(tmp_path):
    old = tmp_path / "old"
    checkpoint(old, 2)
    checkpoint(old, 12)
    assert run_folder.plan(request(tmp_path / "new", "--resume", str(old))).checkpoint == str(old / "checkpoint-12")
    run_folder.write_record(request(tmp_path / "other"))
    checkpoint(tmp_path / "other", 3)
    with pytest.raises(InputError, match="is of another"):
        run_folder.plan(request(tmp_path / "other", "--resume", str(old)))


def test_record_keeps_no_secret(tmp_path):
    run_folder.write_record(request(tmp_path, "--hub_token", "hf_secret"))
    assert "hf_secret" not in (tmp_path / run_folder.RECORD).read_text()


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b'{"settings": 5}', b'{"settings": {}, "finished": true}', 9999 * b"["]
    + [
        b'{"settings": {"seed": 42}, "finished": %s}' % finished
        for finished in (b"{}", b'{"metrics": {}}', b'{"metrics": {"eval_accuracy": "x"}, "eval_images": 6}')
    ]
    + [b'{"settings": {}}'],
)
def test_damaged_record(tmp_path, content):
    (tmp_path / run_folder.RECORD).write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        run_folder.plan(request(tmp_path))


def test_record_of_another_release_is_compared_where_both_know_the_setting(tmp_path):
    mine = request(tmp_path)
    run_folder.write_record(mine)
    record = json.loads((tmp_path / run_folder.RECORD).read_text())
    record["settings"]["setting_of_the_future"] = 1
    del record["settings"]["momentum"]
    (tmp_path / run_folder.RECORD).write_text(json.dumps(record))
    assert run_folder.plan(mine).message


STATE = {"global_step": 5, "epoch": 1.0, "log_history": [], "max_steps": 9}
PROGRESS = {"losses": [0.5], "logged_loss": 2.0, "last_logged_step": 4, "seconds": 3.5, "epoch_ended": True, "due": []}


@pytest.mark.parametrize(
    "file, change",
    [
        ("trainer_state.json", {"global_step": -5}),
        ("trainer_state.json", {"global_step": None}),
        ("trainer_state.json", {"log_history": [1, "x"]}),
        ("trainer_state.json", {"nonsense": 1, "stateful_callbacks": 5}),
        ("progress.json", {"losses": ["a"]}),
        ("progress.json", {"losses": 1.0}),
        ("progress.json", {"due": [1]}),
    ],
)
def test_progress_that_is_none(tmp_path, file, change):
    for name, content in (("trainer_state.json", STATE), ("progress.json", PROGRESS)):
        (tmp_path / name).write_text(json.dumps(content | (change if name == file else {})))
    with pytest.raises(InputError, match=f"{file} (is damaged|cannot be read).*{next(iter(change))}"):
        checkpoints.check_progress(tmp_path)


def test_progress(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    (tmp_path / "progress.json").write_text(json.dumps(PROGRESS))
    checkpoints.check_progress(tmp_path)
