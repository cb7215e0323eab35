# SPDX-License-Identifier: Apache-2.0
"""
A page in the browser: drop in an image and see the five best guesses of a model, where each head of each block looks,
and the functions that a KArAt head learned; with --compare, a second model beside it.

Prints the page's address and serves it until Ctrl-C. Images stay on this machine, and are deleted after about an
hour. Without --model it shows the example that comes with the project, where there is one. With --push-to-space, it
serves nothing here, and makes the same page a Space of the Hugging Face Hub instead: models in folders are uploaded
with it, models on the Hub are loaded from there.
"""

import argparse
import tempfile
from pathlib import Path

from image_classification.errors import InputError
from image_classification.paths import EXAMPLE

from .. import options
from ..images import find_images
from ..models import Checkpoint
from .space import Target
from .viewer import Viewer


EXAMPLES = 48


def find_examples(paths: list[str] | None, checkpoints: list[Checkpoint], folder: Path) -> list[str]:
    """
    Write example images as PNG files into a folder: those at `paths`, of which folders give up to `EXAMPLES`, or
    held-out ones of the data set of a run, where it is on this machine.

    Raises:
        InputError: see `find_images`; where no paths are given there are no examples instead, and it is said why.
    """
    if paths is None:
        settings = next((each.run["settings"] for each in checkpoints if each.run is not None), None)
        if settings is None or (settings["data_path"] is None and settings["data_set"] != "digits"):
            print("No example images: name a folder of them with --examples.")
            return []
    try:
        found = find_images(checkpoints, paths, EXAMPLES if paths else 12, flag="--examples")
    except InputError as error:
        if paths is not None:
            raise
        print(f"No example images: {error}")
        return []
    files = []
    for number, (image, _, _) in enumerate(found):
        files.append(str(folder / f"{number:02}.png"))
        image.save(files[-1])
    return files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, compare=True, unset="the project's example")
    parser.add_argument(
        "--examples",
        nargs="+",
        metavar="PATH",
        help="image files, or folders of them, to offer as examples (default: held-out images of the data set that "
        "run.json, beside the checkpoint, names, if it is on this machine; the images of the project's example)",
    )
    parser.add_argument("--host", help="address to listen at; 0.0.0.0 for all of this machine (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860)")
    parser.add_argument(
        "--share", action="store_true", help="also make a public address, for a week, through Gradio's servers"
    )
    parser.add_argument(
        "--push-to-space",
        metavar="USER/NAME",
        help="make or update this Space of the Hugging Face Hub, and do not serve the page here",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-space: a new Space is yours alone")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --push-to-space: write to a Space that this command did not make",
    )


def run(args: argparse.Namespace) -> None:
    page = _page()
    if args.push_to_space is None and (args.private or args.overwrite):
        raise InputError("`--private` and `--overwrite` go with --push-to-space.")
    if args.port is not None and not 0 < args.port < 2**16:
        raise InputError(f"`--port` is {args.port}, expected 1 to {2**16 - 1}.")
    if args.model is None:
        if not EXAMPLE.is_dir():
            raise InputError(
                f"`--model` names no model, and {EXAMPLE}, the project's example, is not there. Train a model with "
                "`make train`, and name its folder: --model outputs/digits."
            )
        print(f"The project's example, {EXAMPLE}: its README.md says what it is. --model shows another one.")
        args.model, args.examples = str(EXAMPLE), args.examples or [str(EXAMPLE)]
    target = None
    if args.push_to_space is not None:
        target = Target(args.push_to_space, args.overwrite, args.private)
    viewers = load_viewers(args.model, args.compare, args.device)
    with tempfile.TemporaryDirectory(prefix="karat-vit-examples-") as folder:
        examples = find_examples(args.examples, [viewer.checkpoint for viewer in viewers], Path(folder))
        if target is not None:
            target.push(viewers, examples)
        else:
            page.serve(page.build(viewers, examples), args.host, args.port, args.share)


def load_viewers(model: str, compare: str | None = None, device: str | None = None) -> list[Viewer]:
    """Load the model of `--model` and, if there is one, of `--compare`, and try them out on an image."""
    checkpoints = options.load_models(model, compare, options.device_of(device))
    return [Viewer(checkpoint, checkpoint.name) for checkpoint in checkpoints]


def _page():
    try:
        from . import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError(
            'The page needs Gradio, which is not installed: pip install -c constraints.txt -e ".[demo]"'
        ) from error
    return page
