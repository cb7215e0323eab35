# SPDX-License-Identifier: Apache-2.0
"""A run in words: what it begins with; its figures, and the command that tries the model on an image."""

import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.images import decode
from ..data.sources import ImageData
from ..paths import PROJECT
from ..settings.arguments import ModelArguments, RunArguments
from .console import describe
from .curves import CURVES


RESULTS = "all_results.json"
SAMPLE = "sample.png"


def opening(
    model: ModelArguments, args: RunArguments, data: ImageData, described: str, pushed: str | None = None
) -> str:
    """
    The first words of a run: on what, and how, it trains, or what it only evaluates.

    Args:
        model, args: its settings.
        data: of the run; without images to train on where it only evaluates.
        described: the model in words.
        pushed: where to and when it is pushed, if it is.
    """
    train = f"{len(data.train):,} training and " if data.train is not None else ""
    lines = [
        f"Data    {data.name}: {train}{len(data.validation):,} held-out images, {len(data.labels)} classes",
        *(f"        {note}" for note in data.notes),
        f"Model   {model.model or model.finetune or 'checkpoint'}: {described}",
    ]
    if (teacher := model.teacher_attention) is not None:
        lines += [f"Teacher {teacher}: its attention maps take the place of the model's; queries and keys are frozen"]
    lines += [f"Device  {args.device.type}, {args.world_size} process{'es' if args.world_size > 1 else ''}"]
    if data.train is not None:
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        lines += [
            f"Rate    {args.describe_learning_rate()}; {args.optimizer_name}, batch {args.global_batch_size}, "
            f"{length}, weight decay {args.weight_decay:g}",
            f"Output  {args.output_dir}",
            *([f"Hub     {pushed}"] if pushed else []),
            "",
        ]
    return "\n".join(lines)


def cost(metrics: dict[str, float]) -> str:
    """Time, rate and memory of training, as one sentence."""
    minutes, seconds = divmod(math.floor(metrics["train_runtime"]), 60)
    words = [f"Trained in {f'{minutes} min ' if minutes else ''}{seconds} s"]
    if rate := metrics.get("train_images_per_second"):
        words.append(f"{rate:,.0f} images/s")
    if peak := metrics.get("train_peak_memory_gib"):
        words.append(f"at most {peak:.2f} GiB of memory")
    return f"{', '.join(words)}."


def save_sample(split: Dataset, path: Path) -> None:
    """The first held-out image, as it came, for the first try of predict.py."""
    decode(split[0]["image"], "validation image 0").save(path)


def describe_reported(reported: dict[str, float]) -> str:
    """`the paper reports top-1 76.69 %, top-5 98.57 %`, or nothing where a recipe names no figures."""
    figures = ", ".join(f"{name.replace('top', 'top-')} {value:.2f} %" for name, value in reported.items())
    return f"the paper reports {figures}" if figures else ""


def describe_choice(weights: str, metrics: dict[str, float]) -> str:
    """Which weights a run with an average of them ends with, and why."""
    names = {"ema": "the averaged weights", "model": "the plain weights"}
    other = "model" if weights == "ema" else "ema"
    figures = {
        kind: f"{100 * metrics[f'eval_{kind}_accuracy']:.2f} % (loss {metrics[f'eval_{kind}_loss']:.4f})"
        for kind in names
    }
    return f"Written are {names[weights]}: held-out accuracy {figures[weights]}, of {names[other]} {figures[other]}."


def predict_command(folder: str | Path) -> str:
    """The command that classifies the sample image, as it can be typed here."""
    python = Path(sys.executable)
    found = shutil.which("python")
    here = Path.cwd()
    if found and Path(found) == python:
        command = "python"
    elif python.is_relative_to(here):
        command = str(python.relative_to(here))
    else:
        command = str(python)
    script = PROJECT / "predict.py"
    script = script.relative_to(here) if script.is_relative_to(here) else script
    return shlex.join([command, str(script), str(Path(folder) / SAMPLE), "--model", str(folder)])


def summary(folder: str | Path, finished: dict[str, Any]) -> str:
    """The last words of a run."""
    metrics, images, folder = finished["metrics"], finished["eval_images"], Path(folder)
    last = [
        "",
        "Classify an image (put one of your own in place of the sample):",
        f"  {predict_command(folder)}",
    ]
    if teacher := finished.get("teacher"):
        last = ["", f"It attends with the maps of its teacher, {teacher}, and is of no use without it."]
    return "\n".join(
        [
            f"  result      {describe(metrics)}",
            f"              {round(metrics['eval_accuracy'] * images):,} of {images:,} held-out images right",
            f"  checkpoint  {folder}",
            f"  curves      {folder / CURVES}",
            *last,
        ]
    )
