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
    The first words of a run: on what, and how, it trains, or what it only evaluates; with the model, and where to and
    when it is pushed, in words.
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
    rate, peak = metrics.get("train_images_per_second"), metrics.get("train_peak_memory_gib")
    words = f"Trained in {f'{minutes} min ' if minutes else ''}{seconds} s"
    return (
        words + (f", {rate:,.0f} images/s" if rate else "") + (f", at most {peak:.2f} GiB of memory." if peak else ".")
    )


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
    scores = {kind: (100 * metrics[f"eval_{kind}_accuracy"], metrics[f"eval_{kind}_loss"]) for kind in names}
    own, others = (f"{accuracy:.2f} % (loss {loss:.4f})" for accuracy, loss in (scores[weights], scores[other]))
    return f"Written are {names[weights]}: held-out accuracy {own}, of {names[other]} {others}."


def predict_command(folder: str | Path) -> str:
    """The command that classifies the sample image, as it can be typed here."""
    here, words = Path.cwd(), [Path(sys.executable), PROJECT / "predict.py"]
    python, script = (str(path.relative_to(here) if path.is_relative_to(here) else path) for path in words)
    python = "python" if shutil.which("python") == sys.executable else python
    return shlex.join([python, script, str(Path(folder) / SAMPLE), "--model", str(folder)])


def summary(folder: str | Path, finished: dict[str, Any]) -> str:
    """The last words of a run."""
    metrics, images, folder = finished["metrics"], finished["eval_images"], Path(folder)
    last = f"Classify an image (put one of your own in place of the sample):\n  {predict_command(folder)}"
    if teacher := finished.get("teacher"):
        last = f"It attends with the maps of its teacher, {teacher}, and is of no use without it."
    return (
        f"  result      {describe(metrics)}\n"
        f"              {round(metrics['eval_accuracy'] * images):,} of {images:,} held-out images right\n"
        f"  checkpoint  {folder}\n"
        f"  curves      {folder / CURVES}\n\n{last}"
    )
