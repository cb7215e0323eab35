# SPDX-License-Identifier: Apache-2.0
"""
Several real processes: gradients, weights and metrics are those of one process, and a run goes on under another layout.

What FSDP2 over gloo does not show: mixed precision, and whether communication overlaps with computing. Accelerate does
not shard on the CPU by itself: `processes.shard_on_the_cpu` lets it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.runs import checkpoints
from image_classification.settings.parser import Parser
from tests.system import processes
from tests.system.processes import RUNS


PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "accelerate_configs"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    processes.train_all(folder, None, 1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ddp(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes.train_in_two(CONFIGS / "cpu_two_processes.yaml", folder, one)
    return folder


@pytest.fixture(scope="module")
def fsdp2(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    processes.train_in_two(CONFIGS / "fsdp2.yaml", folder, one)
    return folder


def result(folder, name):
    return torch.load(folder / name / "result.pt", weights_only=False)


def assert_close(first, second):
    """The same keys and, up to the order of sums, the same values; without times, and what counts repeated images."""
    if isinstance(first, dict):
        first, second = (
            {k: v for k, v in each.items() if not re.search("second|runtime|memory|flos", str(k))}
            for each in (first, second)
        )
        assert first.keys() == second.keys()
        pairs = [(first[key], second[key]) for key in first]
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        pairs = list(zip(first, second))
    else:
        return torch.testing.assert_close(second, first, rtol=1e-4, atol=2e-5)
    for pair in pairs:
        assert_close(*pair)


@pytest.fixture(params=["ddp", "fsdp2"])
def layout(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_two_processes_train_as_one(one, layout, run):
    """Of half the batch each; gradients of every step, weights, the optimiser, the average, rates, losses, metrics."""
    expected = result(one, run.name)
    assert len(expected["gradients"]) == (4 if run.name == "softmax" else 6)
    assert all(grads and max(map(torch.norm, grads.values())) > 1e-3 for grads in expected["gradients"])
    assert_close(expected, result(layout, run.name))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_two_processes_go_on_from_one(one, layout, run):
    expected, resumed = result(one, run.name), result(layout, f"{run.name}-resumed")
    assert len(resumed["gradients"]) == 1
    for key in ("gradients", "rates"):
        expected[key] = expected[key][-1:]
    assert_close(expected, resumed)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_one_process_goes_on_from_two(one, layout, run, tmp_path):
    steps = checkpoints.checkpoints(layout / run.name)
    assert all(checkpoints.damage(folder) is None for folder in steps.values())
    processes.train(run, tmp_path, 1, steps[run.middle])
    expected, resumed = result(one, run.name), result(tmp_path, ".")
    for key in ("gradients", "rates"):
        expected[key] = expected[key][-1:]
    assert_close(expected, resumed)


def test_checkpoint_of_two_processes_loads(layout):
    for name in ("blockwise", "softmax"):
        folder = max((layout / name).glob("checkpoint-*"))
        model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [type(model).__name__]
        code = {entry.split(".")[0] for entry in config.get("auto_map", {}).values()}
        assert (name == "softmax") != bool(code) and code <= {path.stem for path in folder.glob("*karat*.py")}
        assert_close(model.state_dict(), result(layout, name)["weights"])


def test_signal_to_the_launcher_stops_all_processes_at_one_step(tmp_path, small):
    """The script itself; then one process ends the run, as if it had been alone from the beginning."""

    def words(folder, batch):
        flags = [*small, "--model", "karat_digits", "--image_size", "8", "--patch_size", "4", "--eval_crop_ratio", "1"]
        flags += ["--data_set", "digits", "--max_train_samples", "62", "--max_eval_samples", "30", "--seed", "3"]
        flags += ["--num_train_epochs", "12", "--save_strategy", "steps", "--save_steps", "5"]
        flags[flags.index("--per_device_train_batch_size") + 1] = str(batch)
        return [*flags, "--output_dir", str(tmp_path / folder)]

    config = CONFIGS / "cpu_two_processes.yaml"
    command = [*LAUNCH, "--config_file", str(config), "run_image_classification.py", *words("run", 8)]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not list((tmp_path / "run").glob("checkpoint-*")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode != 0
    folder = tmp_path / "run"
    step = max(checkpoints.checkpoints(folder))
    assert f"goes on from {folder / f'checkpoint-{step}'}" in out and "accelerate.commands.launch --main" in out
    assert out.count("SIGTERM: a checkpoint is saved") == 1
    assert len(list((folder / f"checkpoint-{step}").glob("rng_state_*.pth"))) == 2 and step < 48
    assert not list(folder.glob(".checkpoint*"))
    # On one process the same batch is meant; the batch of the command line would be another run.
    assert script.main(words("run", 8)) == 2
    assert script.main(words("run", 16)) == 0
    assert script.main(words("alone", 16)) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert_close(first, second)


def test_fsdp_is_not_left_out_silently_where_there_is_one_device(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="FSDP needs several GPUs"):
        processes.make_trainer(RUNS[0], tmp_path, processes.Record(), 1)


# The configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_and_its_command(path):
    """Accelerate reads the file, and knows all flags of the command in it; so does the script."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16")
    (line,) = re.findall(r"^#   (accelerate launch .*)$", path.read_text(), re.M)
    words = shlex.split(line)[2:]
    launcher = launch_command_parser().parse_args(words)
    assert launcher.config_file == f"accelerate_configs/{path.name}"
    assert launcher.training_script == "run_image_classification.py"
    known = Parser()
    unknown = [
        word for word in launcher.training_script_args if word.startswith("--") and word[2:] not in known.settings
    ]
    assert not unknown
    assert path.name in (PROJECT / "docs" / "devices.md").read_text()
