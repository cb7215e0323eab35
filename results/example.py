# SPDX-License-Identifier: Apache-2.0
"""
Makes the project's example of a finished run: `python -m results.example RUN --data FOLDER`.

The example is what `python -m analysis demo` shows without --model: the run's model in half precision, its image
processor, held-out images of its classes, and a card with the run's row of results/runs.csv. It is written only where
it predicts what the run's model does, in at most 13 MB.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from analysis.images import find_images, prepare
from analysis.models import Checkpoint, load_checkpoint
from image_classification.errors import InputError, run_command
from image_classification.flags import Parser
from image_classification.models.building import describe_model
from image_classification.paths import EXAMPLE
from image_classification.runs import checkpoints

from .page import read
from .screen import TABLE, name_of


LIMIT = 13_000_000
# Held-out images that logits are compared on, of which the first of each class are the example's.
COMPARED, SHOWN = 100, 10
# The norm of the distance of the logits over that of the logits: rounding to fp16 moves each weight by up to 2^-11.
TOLERANCE = 0.01

TITLE = "# The example of `python -m analysis demo`"
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- karat-vit
---

{title}

{model}.

* Trained from scratch by `{recipe}`: {epochs} epochs, seed {seed}, on {data}.
* {accuracy} % of {images} held-out images ({judged_on}) right, by {weights}. Row `{screen}`, `{arm}`, of
  `results/runs.csv`.
* The weights lie here in half precision, and are computed with in fp32. On {compared} held-out images that moves the
  logits by {moved:.2%} of their norm; each of the images here gets the class that it got.
* The images are held-out ones, the first of each class in a random draw. Their names are the true classes.

Made by `python -m results.example`.
"""


def row_of(checkpoint: Checkpoint, table: Path) -> dict[str, str]:
    """The row of the table that is a run's, by the folder that it trained in: SCREEN/ARM-SEED."""
    if checkpoint.run is None or not checkpoint.run.get("finished"):
        raise InputError(f"{checkpoint.source} is no folder of a finished run (run.json).")
    name = "/".join(Path(checkpoint.run["settings"]["output_dir"]).parts[-2:])
    for row in read(table):
        if name_of(row) == name:
            return row
    raise InputError(f"{table} has no row of {name}, which {checkpoint.source} says that it is.")


def write_model(source: Path, target: Path) -> None:
    """Write a checkpoint in half precision, without the code that lies beside it."""
    weights = {name: x for file in checkpoints.weight_files(source) for name, x in load_file(file).items()}
    half = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
    save_file(half, target / checkpoints.WEIGHTS, metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        content: dict[str, Any] = checkpoints.read_json(source / name)
        content.pop("auto_map", None)
        content |= {"dtype": "float16"} if name == "config.json" else {}
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def logits_of(checkpoint: Checkpoint, found: list) -> torch.Tensor:
    """The logits of images, (B, classes)."""
    return torch.cat([checkpoint.model(pixels).logits for pixels in prepare(checkpoint, found).pixels.split(10)])


def first_of_classes(found: list) -> dict[str, int]:
    """The number of the first image of each of up to `SHOWN` classes, by the class."""
    first: dict[str, int] = {}
    for number, (_, _, label) in enumerate(found):
        first.setdefault(label, number)
    return dict(sorted(first.items())[:SHOWN])


def make(run: str, data: str | None, target: Path, table: Path) -> None:
    """
    Write the example.

    Args:
        run: folder of a finished run.
        data: folder of its data set, or a name that `--data_set` takes; `None`: as run.json says.
        target: folder to replace.
        table: CSV of the runs.

    Raises:
        InputError: the run is not finished or has no row, its model in half precision is too large or another one, or
            the target holds something else than an example.
    """
    card = target / "README.md"
    if target.exists() and not (card.is_file() and TITLE in card.read_text(encoding="utf-8")):
        raise InputError(f"`--output` {target} is there, and no example to replace: name another.")
    whole = load_checkpoint(run, "RUN")
    row = row_of(whole, table)
    found = find_images([whole], None, COMPARED, data_set=data)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(Path(whole.source), folder)
        expected, logits = (logits_of(each, found) for each in (whole, load_checkpoint(made)))
        moved = ((logits - expected).norm() / expected.norm()).item()
        shown = first_of_classes(found)
        other = [label for label, number in shown.items() if logits[number].argmax() != expected[number].argmax()]
        if other or not moved <= TOLERANCE:
            raise InputError(
                f"{run} in half precision is another model: its logits differ by {moved:.1%} of their norm, and it "
                f"predicts other classes for {len(other)} of {len(shown)} images ({', '.join(other) or 'none'})."
            )
        for label, number in shown.items():
            image: Image.Image = found[number][0]
            image.save(folder / f"{re.sub(r'[^0-9A-Za-z]+', '_', label)}.png")
        finished = (whole.run or {})["finished"]
        averaged = finished["weights"] == "ema"
        text = CARD.format(
            **row | {"epochs": f"{float(row['epochs']):g}", "accuracy": row["average_last" if averaged else "last"]},
            title=TITLE,
            model=describe_model(whole.model),
            data=(whole.run or {})["settings"]["data_set"] or "the data of its recipe",
            images=f"{finished['eval_images']:,}",
            weights="the averaged weights" if averaged else "the plain weights",
            compared=len(found),
            moved=moved,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > LIMIT:
            raise InputError(f"{run} in half precision has {size / 1e6:.1f} MB, expected at most {LIMIT / 1e6:.0f}.")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copyfile(path, target / path.name)
    print(f"{target}: {size / 1e6:.1f} MB, {len(shown)} images, logits moved by {moved:.2%} of their norm.")


def main(argv: list[str] | None = None) -> int:
    """Write the example of the run that is named. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m results.example", description=(__doc__ or "").split("\n")[1])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--data", help="folder of its data set, or its name (default: as run.json says)")
    parser.add_argument("--output", type=Path, default=EXAMPLE, help=f"folder to replace (default: {EXAMPLE})")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV of the runs")
    args = parser.parse_args(argv)
    return run_command("python -m results.example", lambda: make(args.run, args.data, args.output, args.table))


if __name__ == "__main__":
    sys.exit(main())
