# SPDX-License-Identifier: Apache-2.0
"""
Two devices beside one, by the files of accelerate_configs/: images per second and memory. That they train the same
model is tests/system/test_processes.py's to show.

Each layout is one launch of this module, which does everything for it: starting processes takes longer than the rest.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, logging

from image_classification.paths import CONFIGURATION, PROJECT
from image_classification.settings.arguments import RunArguments

from .common import Clock, Table
from .input_pipeline import SyntheticTrainer


PRESETS = {
    "softmax": "vit_tiny_patch16_224",
    "blockwise": "vit_tiny_patch16_224_karat",
    "universal": "vit_tiny_patch16_224_karat_universal",
}


@dataclass(frozen=True)
class Size:
    """
    The size of the runs on one kind of device.

    Args:
        model: fields of the model's configuration in place of the preset's.
        batch: of each process.
        steps: between which images per second are measured.
        dtypes: of the runs.
    """

    model: dict
    batch: int
    steps: tuple[int, int]
    dtypes: tuple[str, ...]


SMALL = {"image_size": 32, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES = {"cuda": Size({}, 256, (10, 40), ("bfloat16", "float16")), "cpu": Size(SMALL, 4, (1, 3), ("float32",))}
LAYOUTS = {
    "cuda": {"one": None, "ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml"},
    # Accelerate does not shard on the CPU.
    "cpu": {"one": None, "ddp": "cpu_two_processes.yaml"},
}


class Devices(Table):
    """Rows of a layout of processes, with their ratio to one process."""

    suffix = "_devices"
    measured = (
        *("benchmark", "model", "provider", "processes", "dtype", "batch", "what", "images_per_second", "ratio"),
        *("peak_gib", "ratio_memory", "error"),
    )
    base, same = "one", ("model", "dtype", "what")
    ratios = {"ratio": "images_per_second", "ratio_memory": "peak_gib"}


def timed(name: str, size: Size, device: str, folder: Path, processes: int, dtype: str) -> dict:
    """Measure images per second of all processes, and the peak memory of one, on tensors that lie on the device."""
    # What the launcher or the run before has set.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CONFIGURATION / PRESETS[name], num_labels=10, **size.model)
    precision: dict[str, Any] = {} if dtype == "float32" else {"bf16" if dtype == "bfloat16" else "fp16": True}
    args = RunArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        disable_tqdm=True,
        seed=7,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        dataloader_num_workers=0,
        learning_rate=1e-3,
        warmup_epochs=0,
        per_device_train_batch_size=size.batch,
        max_steps=size.steps[1],
        **precision,
    )
    rows = [{"labels": 0}] * (size.batch * processes * (size.steps[1] + 1))
    model = AutoModelForImageClassification.from_config(config)
    trainer = SyntheticTrainer(model=model, args=args, train_dataset=rows)
    clock = Clock(size.batch * processes, device, *size.steps)
    trainer.add_callback(clock)
    result = trainer.train()
    scaler = trainer.accelerator.scaler
    return {
        "images_per_second": clock.per_second,
        "peak_gib": trainer.state.log_history[-1]["train_peak_memory_gib"],
        "error": f"loss {result.training_loss:.3f}" + (f", scale {scaler.get_scale():g}" if scaler else ""),
    }


def work(layout: str, device: str, folder: Path) -> None:
    """Do all runs of a launch, in each of its processes; the rows go to a file of the folder."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = False
    size, processes, rows = SIZES[device], int(os.environ.get("WORLD_SIZE", 1)), []
    for name, dtype in ((name, dtype) for dtype in size.dtypes for name in PRESETS):
        row = {"model": name, "dtype": dtype, "what": "train", "batch": size.batch, "processes": processes}
        try:
            row |= timed(name, size, device, folder / layout, processes, dtype)
        except (RuntimeError, ValueError) as error:  # All processes fail alike, or the launcher ends them.
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows.append(row)
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"{layout}.json").write_text(json.dumps(rows), encoding="utf-8")
    if processes > 1:
        torch.distributed.destroy_process_group()


def launch(layout: str, config: str | None, device: str, folder: Path) -> list[dict]:
    """Measure a layout in processes of its own; returns its rows."""
    words = [sys.executable, "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if config is not None:
        path = PROJECT / "accelerate_configs" / config
        words += ["accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2", "--module"]
    elif device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = "0"  # Else the Trainer would take all, in threads.
    words += ["benchmarks.devices", layout, device, str(folder)]
    done = subprocess.run(words, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        return [{"model": "", "dtype": "", "what": "launch", "error": f"exit {done.returncode}"}]
    return json.loads((folder / f"{layout}.json").read_text(encoding="utf-8"))


def run(device: str, table: Devices) -> None:
    """Measure every layout of a kind of device."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        print("devices: there is only one GPU here; left out.", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="karat-devices-") as folder:
        for layout, config in LAYOUTS[device].items():
            for row in launch(layout, config, device, Path(folder)):
                table.add(benchmark="devices", provider=layout, **row)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
