# SPDX-License-Identifier: Apache-2.0
"""The output folder: nothing of anyone's is overwritten, and the same command goes on or says that it is done."""

import json
import os
import signal

import pytest

from image_classification import runs
from image_classification.arguments import parse_settings
from image_classification.errors import InputError


def settings(folder, *words):
    return parse_settings(["--output_dir", str(folder), "--use_cpu", *words])


def checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    if complete:
        (path / "trainer_state.json").touch()
    return path


def test_new_or_empty_folder(tmp_path):
    assert runs.plan(settings(tmp_path / "new")) == runs.Plan()
    assert runs.plan(settings(tmp_path)) == runs.Plan()


def test_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex.*Choose another --output_dir"):
        runs.plan(settings(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        runs.plan(settings(tmp_path / "thesis.tex"))


def test_the_same_command_goes_on_from_the_last_complete_checkpoint(tmp_path):
    mine = settings(tmp_path)
    runs.write_record(mine)
    assert "starts again" in runs.plan(mine).message
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, complete=False)
    assert runs.plan(mine).checkpoint == str(tmp_path / "checkpoint-10")


def test_settings_that_only_change_the_speed_are_free(tmp_path):
    runs.write_record(settings(tmp_path))
    checkpoint(tmp_path, 1)
    assert runs.plan(settings(tmp_path, "--num_workers", "7", "--save_total_limit", "0", "--disable_tqdm")).checkpoint


def test_batch_is_what_all_devices_make_of_it(tmp_path):
    """Half the images on each of two devices, or in twice as many parts, are the same run; half in all are not."""
    runs.write_record(settings(tmp_path, "--batch-size", "32", "--gradient_accumulation_steps", "2"))
    checkpoint(tmp_path, 1)
    assert runs.plan(settings(tmp_path, "--batch-size", "16", "--gradient_accumulation_steps", "4")).checkpoint
    with pytest.raises(InputError, match=r"`global_batch_size` was 64 and is now 32.*--per_device_train_batch_size"):
        runs.plan(settings(tmp_path, "--batch-size", "16", "--gradient_accumulation_steps", "2"))


def test_only_one_process_trains_in_a_folder(tmp_path):
    """As long as it lives, and no longer, however it ends."""
    runs.write_record(settings(tmp_path))
    ready, held = os.pipe()
    process = os.fork()
    if process == 0:
        with runs.FolderLock() as lock:
            lock.take(str(tmp_path))
            os.write(held, b"!")
            signal.pause()
    os.read(ready, 1)
    with runs.FolderLock() as lock:
        with pytest.raises(InputError, match="Another process is training"):
            lock.take(str(tmp_path))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        lock.take(str(tmp_path))
        assert (tmp_path / runs.LOCK).is_file()
    assert not (tmp_path / runs.LOCK).exists()


def test_another_run_names_what_differs(tmp_path):
    runs.write_record(settings(tmp_path, "--grid", "3"))
    with pytest.raises(InputError, match="another run: `grid_size` was 3 and is now 5"):
        runs.plan(settings(tmp_path, "--grid", "5"))
    # Unless a checkpoint of it is named.
    path = checkpoint(tmp_path, 4)
    assert runs.plan(settings(tmp_path, "--num_train_epochs", "50", "--resume", str(path))).checkpoint == str(path)


def test_finished_run_has_nothing_left_to_do(tmp_path):
    mine = settings(tmp_path)
    finished = {"metrics": {"eval_accuracy": 0.5}, "eval_images": 4}
    runs.write_record(mine, finished)
    with pytest.raises(InputError, match="without its weights"):
        runs.plan(mine)
    (tmp_path / "model.safetensors").touch()
    assert runs.plan(mine).finished == finished


def test_resume_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        runs.plan(settings(tmp_path / "new", "--resume", str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds none.*trainer_state\.json.*--finetune"):
        runs.plan(settings(tmp_path / "new", "--resume", str(tmp_path / "empty")))


def test_resume_takes_the_last_checkpoint_of_a_run(tmp_path):
    old = tmp_path / "old"
    checkpoint(old, 2)
    checkpoint(old, 12)
    assert runs.plan(settings(tmp_path / "new", "--resume", str(old))).checkpoint == str(old / "checkpoint-12")
    runs.write_record(settings(tmp_path / "other"))
    with pytest.raises(InputError, match="is of another one"):
        runs.plan(settings(tmp_path / "other", "--resume", str(old)))


def test_record_keeps_no_secret(tmp_path):
    runs.write_record(settings(tmp_path, "--hub_token", "hf_secret"))
    assert "hf_secret" not in (tmp_path / runs.RECORD).read_text()


def test_damaged_record(tmp_path):
    (tmp_path / runs.RECORD).write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        runs.plan(settings(tmp_path))


def test_record_of_another_release_is_compared_where_both_know_the_setting(tmp_path):
    mine = settings(tmp_path)
    runs.write_record(mine)
    record = json.loads((tmp_path / runs.RECORD).read_text())
    record["settings"]["setting_of_the_future"] = 1
    del record["settings"]["momentum"]
    (tmp_path / runs.RECORD).write_text(json.dumps(record))
    assert runs.plan(mine).message
