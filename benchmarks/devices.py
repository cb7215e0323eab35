# SPDX-License-Identifier: Apache-2.0
"""
Two devices beside one, by the files of accelerate_configs/: the same gradients, images per second and memory, runs in
half precision, and checkpoints of one layout that go on in another.

Each layout is one launch of this module, which does everything for it: starting processes takes longer than the rest.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageClassification, TrainerCallback, logging

from image_classification.paths import CONFIGURATION, PROJECT
from image_classification.settings.arguments import RunArguments
from image_classification.training.trainer import ImageClassificationTrainer

from .common import Table
from .input_pipeline import Clock, Stopwatch, SyntheticTrainer


PRESETS = {
    "softmax": "vit_tiny_patch16_224",
    "blockwise": "vit_tiny_patch16_224_karat",
    "universal": "vit_tiny_patch16_224_karat_universal",
}
# Rows of gradients, and of weights relative to what training changed, that differ by more than this are marked.
LIMITS = {"gradients": 1e-3, "weights": 0.1}


@dataclass(frozen=True)
class Size:
    """
    The size of the runs on one kind of device.

    Args:
        model: fields of the model's configuration in place of the preset's.
        images: of the runs that are compared, in an epoch of three steps, the last of which is not full.
        batch: of these, over all processes.
        timed_batch: of each process, where images per second are measured.
        begin, end: steps between which they are.
    """

    model: dict
    images: int
    batch: int
    timed_batch: int
    begin: int
    end: int


SIZES = {
    "cuda": Size({}, 72, 32, 256, 10, 40),
    "cpu": Size({"image_size": 32, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}, 18, 8, 4, 1, 3),
}
LAYOUTS = {
    "cuda": {"one": None, "ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml", "one, resumed": None},
    # Accelerate does not shard on the CPU.
    "cpu": {"one": None, "ddp": "cpu_two_processes.yaml", "one, resumed": None},
}
WRITES = "ddp"  # The layout whose checkpoints the later ones go on from.


class Devices(Table):
    """Rows of a layout of processes, with their ratio to one process."""

    measured = (
        *("benchmark", "model", "provider", "processes", "dtype", "batch", "what", "images_per_second", "ratio"),
        *("peak_gib", "ratio_memory", "error"),
    )
    base, same = "one", ("model", "dtype", "what")

    def add(self, **row) -> None:
        row = {"benchmark": "devices", **row}
        one = self.baseline(row)
        numbers = str(row.get("error", ""))
        if "images_per_second" in row:
            row["ratio"] = row["images_per_second"] / one.get("images_per_second", float("nan"))
            row["ratio_memory"] = row["peak_gib"] / one.get("peak_gib", float("nan"))
            numbers = f"{row['images_per_second']:9.0f} images/s  x{row['ratio']:.2f} of one's"
            numbers += f"   {row['peak_gib']:.2f} GiB a device  x{row['ratio_memory']:.2f}  {row.get('error', '')}"
        self.keep(row, ("provider", "model", "dtype", "what"), numbers)


class Gradients(TrainerCallback):
    """Gradients of the first epoch's steps, whole, on the CPU."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.epoch is None or state.epoch < 1:
            found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
            self.steps.append({name.removeprefix("module."): gradient for name, gradient in found.items()})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().cpu()


def make_model(name: str, size: Size):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CONFIGURATION / PRESETS[name], num_labels=10, **size.model)
    return AutoModelForImageClassification.from_config(config)


def make_rows(size: Size, side: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(size.images, 3, side, side, generator=generator)
    labels = torch.randint(10, (size.images,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def make_trainer(kind, name: str, size: Size, device: str, folder: Path, rows=None, **settings: Any):
    # What the launcher or the run before has set.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    model = make_model(name, size)
    defaults: dict[str, Any] = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-3,
        "warmup_epochs": 0,
    }
    args = RunArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        disable_tqdm=True,
        seed=7,
        eval_strategy="no",
        dataloader_num_workers=0,
        save_total_limit=0,
        **(defaults | settings),
    )
    return kind(model=model, args=args, train_dataset=rows or make_rows(size, model.config.image_size))


def compared(name: str, size: Size, device: str, folder: Path, processes: int, checkpoint: Path | None) -> dict:
    """Train two epochs in fp32, or the second from a checkpoint of the first."""
    trainer = make_trainer(
        ImageClassificationTrainer,
        name,
        size,
        device,
        folder,
        per_device_train_batch_size=size.batch // processes,
        num_train_epochs=2,
        save_strategy="epoch" if checkpoint is None else "no",
        logging_strategy="steps",
        logging_steps=1,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.model.state_dict()
    return {
        "gradients": gradients.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {key.removeprefix("module."): whole(tensor) for key, tensor in state.items()},
    }


def timed(name: str, size: Size, device: str, folder: Path, processes: int, dtype: str) -> dict:
    """Measure images per second of all processes, and the peak memory of one, on tensors that lie on the device."""
    rows = [{"labels": 0}] * (size.timed_batch * processes * (size.end + 1))
    precision = {} if dtype == "float32" else {"bf16" if dtype == "bfloat16" else "fp16": True}
    trainer = make_trainer(
        SyntheticTrainer,
        name,
        size,
        device,
        folder,
        rows,
        per_device_train_batch_size=size.timed_batch,
        max_steps=size.end,
        **precision,
    )
    clock = Clock(size.begin, size.end, size.timed_batch * processes, Stopwatch())
    trainer.add_callback(clock)
    result = trainer.train()
    scaler = trainer.accelerator.scaler
    return {
        "images_per_second": clock.per_second,
        "peak_gib": trainer.state.log_history[-1]["train_peak_memory_gib"],
        "error": f"loss {result.training_loss:.3f}" + (f", scale {scaler.get_scale():g}" if scaler else ""),
    }


def work(layout: str, device: str, folder: Path) -> None:
    """Do all runs of a launch, in each of its processes; what came out of them goes to files of the folder."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = False
    size, processes = SIZES[device], int(os.environ.get("WORLD_SIZE", 1))
    main_process = int(os.environ.get("RANK", 0)) == 0
    own, rows = folder / layout.replace(", ", "-"), []
    for name in PRESETS:
        if layout != "one, resumed":
            result = compared(name, size, device, own / name, processes, None)
            if main_process:
                torch.save(result, own / name / "result.pt")
        if layout not in ("one", WRITES):
            result = compared(
                name, size, device, own / f"{name}-resumed", processes, folder / WRITES / name / "checkpoint-3"
            )
            if main_process:
                torch.save(result, own / f"{name}-resumed" / "result.pt")
    if layout != "one, resumed":
        dtypes = ["float32"] if device == "cpu" else ["bfloat16", "float16"]
        for name, dtype in ((name, dtype) for dtype in dtypes for name in PRESETS):
            row = {"model": name, "dtype": dtype, "what": "train", "batch": size.timed_batch, "processes": processes}
            try:
                row |= timed(name, size, device, own / "timed", processes, dtype)
            except (RuntimeError, ValueError) as error:  # All processes fail alike, or the launcher ends them.
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            rows.append(row)
    if main_process:
        own.mkdir(parents=True, exist_ok=True)
        (own / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    if processes > 1:
        torch.distributed.destroy_process_group()


def launch(layout: str, config: str | None, device: str, folder: Path) -> None:
    words = [sys.executable, "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if config is not None:
        path = PROJECT / "accelerate_configs" / config
        words += ["accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2", "--module"]
    elif device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = "0"  # Else the Trainer would take all, in threads.
    words += ["benchmarks.devices", layout, device, str(folder)]
    began = time.perf_counter()
    subprocess.run(words, check=True, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)
    print(f"{layout}: {time.perf_counter() - began:.0f} s", flush=True)


def compare(layout: str, folder: Path, table: Devices, processes: int) -> None:
    """Compare what must agree, between a layout and one process, or the layout whose checkpoints it went on from."""
    own, one, writer = folder / layout.replace(", ", "-"), folder / "one", folder / WRITES
    for name in PRESETS:
        row = {"provider": layout, "model": name, "dtype": "float32", "processes": processes, "batch": ""}
        if layout not in ("one", "one, resumed"):
            ours, theirs = (torch.load(path / name / "result.pt") for path in (own, one))
            steps = zip(ours["gradients"], theirs["gradients"], strict=True)
            wrong = max(apart(a, b) for a, b in steps)
            losses = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            found = f"gradients {wrong:.1e} from one process's, losses {losses:.1e}{_mark(wrong, 'gradients')}"
            table.add(**row, what="agree", error=found)
        if (own / f"{name}-resumed").is_dir():
            ours, theirs = torch.load(own / f"{name}-resumed" / "result.pt"), torch.load(writer / name / "result.pt")
            start = load_file(writer / name / "checkpoint-3" / "model.safetensors")
            between = sum(((ours["weights"][key] - theirs["weights"][key]) ** 2).sum() for key in start) ** 0.5
            moved = sum(((theirs["weights"][key] - start[key]) ** 2).sum() for key in start) ** 0.5
            wrong = float(between / moved)
            found = f"weights {wrong:.1e} apart, of what the epoch changed{_mark(wrong, 'weights')}"
            table.add(**row, what=f"goes on from {WRITES}", error=found)


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Compute the largest difference in a gradient over its norm; noise about zero, as in softmax's key bias, is 0."""
    total = sum(gradient.norm() ** 2 for gradient in theirs.values()) ** 0.5
    return max(float((ours[key] - b).norm() / b.norm().clamp(min=1e-3 * total)) for key, b in theirs.items())


def _mark(wrong: float, what: str) -> str:
    return "" if wrong < LIMITS[what] else f" (MORE THAN {LIMITS[what]:g})"


def run(device: str, table: Devices) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        print("devices: there is only one GPU here; left out.", flush=True)
        return
    folder = Path(tempfile.mkdtemp(prefix="karat-devices-"))
    try:
        for layout, config in LAYOUTS[device].items():
            try:
                launch(layout, config, device, folder)
            except subprocess.CalledProcessError as error:
                table.add(provider=layout, model="", dtype="", what="launch", error=f"exit {error.returncode}")
                continue
            processes = 1 if config is None else 2
            compare(layout, folder, table, processes)
            for row in json.loads((folder / layout.replace(", ", "-") / "rows.json").read_text()):
                table.add(provider=layout, **row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
