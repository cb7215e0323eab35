# SPDX-License-Identifier: Apache-2.0
"""Flags that the commands share, and what their values mean."""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from image_classification.errors import InputError
from image_classification.models.loading import device_of as device_of

from .models import Checkpoint, load_checkpoint


def add_model(parser: argparse.ArgumentParser, compare: bool = False, unset: str = "") -> None:
    """Add `--model`, which need not be given if `unset` says what is shown then."""
    parser.add_argument(
        "--model",
        required=not unset,
        metavar="DIR_OR_REPO",
        help="checkpoint of a KArAt-ViT, of a softmax ViT, or of another family: a folder, or its name on the Hub"
        + (unset and f" (default: {unset})"),
    )
    if compare:
        parser.add_argument("--compare", metavar="DIR_OR_REPO", help="another checkpoint, shown beside it")
    add_device(parser)


def load_models(model: str, compare: str | None, device: torch.device | str) -> list[Checkpoint]:
    """Load the model of `--model` and, if there is one, that of `--compare`, under names that tell them apart."""
    sources = {flag: source for flag, source in (("--model", model), ("--compare", compare)) if source is not None}
    checkpoints = [load_checkpoint(source, flag, device) for flag, source in sources.items()]
    for checkpoint, name in zip(checkpoints, names(None, list(sources.values()))):
        checkpoint.name = name
    return checkpoints


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")


def add_images(parser: argparse.ArgumentParser, count: int) -> None:
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="image files, or folders of them (default: held-out images of the data set that run.json, beside the "
        "checkpoint, names)",
    )
    parser.add_argument(
        "--data-set",
        metavar="NAME_OR_DIR",
        help="draw from the held-out images of this data set, or of this folder of one, as run_image_classification.py "
        "reads them with --data_set and --data_path",
    )
    parser.add_argument(
        "--num-images",
        type=at_least(1),
        default=count,
        metavar="COUNT",
        help=f"how many to draw from a folder or data set; named files are all used (default: {count})",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the draw (default: 0)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="images computed at once (default: 8)")


def add_block(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block", type=int, default=-1, help="which block, from 0; negative ones from the end (default: -1)"
    )


def add_share(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--share", type=functools.partial(above_zero, most=1), default=0.6, help=f"{what} (default: 0.6)"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="outputs/analysis", metavar="DIR", help="folder for the files (default: outputs/analysis)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of a flag: whole numbers from `least`."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
        return int(text)

    return whole_number


def above_zero(text: str, most: float = math.inf) -> float:
    """Read the value of a flag above 0, and at most `most`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text} is not above 0" + (f" and at most {most}" if most < math.inf else ""))
    return value


def numbers(given: list[int] | None, size: int, flag: str, what: str) -> list[int]:
    """
    Resolve the blocks, heads, ... that a flag names: numbers from 0, negative ones from the end; unset means all.

    Raises:
        InputError: there is no such one.
    """
    if given is None:
        return list(range(size))
    for number in given:
        if not -size <= number < size:
            raise InputError(f"`{flag}` names {what} {number}, and the model has {size}: 0 to {size - 1}.")
    return list(dict.fromkeys(number % size for number in given))


def block_of(number: int, checkpoint: Checkpoint) -> int:
    """Resolve the block of `--block` in a model."""
    return numbers([number], checkpoint.blocks, "--block", "block")[0]


def names(given: list[str] | None, sources: list[str]) -> list[str]:
    """Name several models: by `--names`, or their folders' names; the folder above tells equal ones apart."""
    if given is not None:
        if len(given) != len(sources) or len(set(given)) != len(given):
            raise InputError(f"`--names` gives {' '.join(given)}, expected {len(sources)} different names.")
        return given
    paths = [Path(source).resolve() if Path(source).is_dir() else Path(source) for source in sources]
    short = [path.name for path in paths]
    return [path.name if short.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
