# SPDX-License-Identifier: Apache-2.0
"""
Whole runs from the command line, as a user starts them: KArAt beside softmax by the paper's CIFAR-10 recipes, with the
step recorded (the default) and not, first from empty caches of compiled code and data, then from full ones.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from image_classification.paths import CONFIGURATION, PROJECT
from image_classification.reports.summary import RESULTS

from .common import Table


BASES = {"tiny": "fourier G=3", "small": "fourier G=3", "base": "fourier G=1"}
ROWS = ("tiny/32", "tiny/64", "tiny/128", "tiny/256", "small/128", "base/128")
# The default with `true`, which fails where the default would go on unrecorded.
MODES = {"recorded": ["--record_step", "true"], "unrecorded": ["--record_step", "false"]}
EPOCHS = {"recorded": 2.0, "unrecorded": 0.5}  # About a minute each.
STARTS = ("cold", "warm")
WAYS = ("softmax", "karat", "hybrid")
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
# Of the ten parts of a run in which the rate is logged: compilation, and workers that start.
SKIPPED = 2


class Runs(Table):
    """Rows of runs, with their time over softmax's for as many images."""

    suffix = "_runs"
    measured = (
        *("benchmark", "model", "provider", "mode", "start", "basis", "batch", "dtype", "epochs", "images_per_second"),
        *("ratio_time", "startup_seconds", "seconds", "peak_gib", "error"),
    )
    same = ("benchmark", "model", "mode", "start", "batch", "epochs")
    ratios = {}  # That of time is of rates, the other way round.

    def add(self, **row) -> None:
        softmax, own = (found.get("images_per_second") for found in (self.baseline(row), row))
        if softmax and own:
            row["ratio_time"] = softmax / own
        row["basis"] = BASES[row["model"]] if row["provider"] in WAYS[1:] else ""
        super().add(**row)


def write_images(folder: Path, count: int) -> None:
    """Write noise in the classes, sizes and files of CIFAR-10: `count` JPEGs, and a fifth for evaluation."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", count), ("test", count // 5)):
        images = []
        for small in rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
            images.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"img": images, "label": [index % 10 for index in range(number)]}
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@contextmanager
def workspace(data: Path | None, images: int) -> Iterator[tuple[Path, Path]]:
    """Make a temporary folder, and the folder of the data: `data`, or `images` made in the other."""
    with tempfile.TemporaryDirectory(prefix="karat-runs-") as name:
        if data is None:
            write_images(Path(name) / "data", images)
        yield Path(name), (data or Path(name) / "data").resolve()


def execute(words: list, cache: Path) -> tuple[str, dict]:
    """Run a command on one device, its caches in a folder; returns its output, `seconds`, and perhaps an `error`."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "HF_DATASETS_CACHE": "datasets"}
    folders["PYTHONPYCACHEPREFIX"] = "bytecode"  # Packages may have come without theirs, and refuse to keep any.
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # Else the Trainer would take all, in threads.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {name: str(cache / folder) for name, folder in folders.items()}
    began = time.perf_counter()
    done = subprocess.run([*map(str, words)], cwd=PROJECT, env=environment, capture_output=True, text=True)
    found: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if done.returncode:
        found["error"] = f"exit {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}"
    return done.stdout, found


def train(folder: Path, device: str, way: str, row: dict, data: Path, flags=()) -> dict:
    """Run the script once for a row of a way to attend, and read the result files that it leaves."""
    output = folder / way / "output"
    shutil.rmtree(output, ignore_errors=True)
    recipe = CONFIGURATION / "cifar10" / f"vit_{row['model']}_patch16_224{'_karat' * (way == 'karat')}.yaml"
    words = [sys.executable, PROJECT / "run_image_classification.py", recipe]
    words += ["--model", f"vit_{row['model']}_patch16_224_karat_hybrid"] if way == "hybrid" else []
    words += ["--data_set", "CIFAR10", "--data_path", data]
    words += ["--per_device_train_batch_size", row["batch"], "--num_train_epochs", row["epochs"]]
    words += ["--output_dir", output, "--logging_strategy", "steps", "--logging_steps", "0.1"]
    words += [*MODES[row["mode"]], *flags]
    words += ["--bf16", "--augment_on", "device"] if device == "cuda" else ["--use_cpu"]
    _, found = execute(words, folder / way / "cache")
    if "error" in found:
        return found
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    if rates := [entry["images_per_second"] for entry in log if "images_per_second" in entry][SKIPPED:]:
        found["images_per_second"] = statistics.median(rates)
    else:
        found["error"] = "too short to have a rate: more --epochs"
    results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    names = {"peak_gib": "train_peak_memory_gib", "startup_seconds": "train_startup_seconds"}
    return found | {name: results[theirs] for name, theirs in names.items() if theirs in results}


def run(
    device: str,
    table: Runs,
    rows=ROWS,
    modes=tuple(MODES),
    starts=STARTS,
    ways=WAYS,
    data: Path | None = None,
    images: int = 50_000,
    epochs: float | None = None,
    flags=(),
) -> None:
    """
    Measure whole runs.

    Args:
        rows: model and batch size, as "tiny/32".
        modes: of `MODES`; a step that is not recorded has nothing to compile, and starts once.
        starts: with empty caches, and again with what the first left there.
        ways: to attend.
        data: a folder with CIFAR-10's parquet files; `None` makes `images` like it.
        epochs: of each run; `None`: those of `EPOCHS`.
        flags: more flags of the script.
    """
    with workspace(data, images) as (folder, data):
        for name, mode in ((name, mode) for name in rows for mode in modes):
            model, batch = name.split("/")
            row = {"benchmark": "runs", "model": model, "batch": int(batch), "mode": mode, "dtype": DTYPES[device]}
            row["epochs"] = epochs or EPOCHS[mode]
            for start in starts if mode == "recorded" else starts[:1]:
                for way in ways:
                    found = train(folder, device, way, row, data, flags)
                    table.add(**row, start=start, provider=way, **found)
            for way in ways:
                shutil.rmtree(folder / way)
