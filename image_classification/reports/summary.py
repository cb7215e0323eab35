# SPDX-License-Identifier: Apache-2.0
"""A finished run in words: its figures, and the command that tries the model on an image."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.images import decode
from ..paths import PROJECT
from .console import describe
from .curves import CURVES


RESULTS = "all_results.json"
SAMPLE = "sample.png"


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
