# SPDX-License-Identifier: Apache-2.0
"""
Classify images with a checkpoint: `python predict.py IMAGE... --model DIR`.

Needs nothing of the training side: torch, transformers, safetensors, einops and Pillow.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import transformers
from tqdm import tqdm
from transformers import pipeline

from image_classification.data.images import check_image, read_image
from image_classification.errors import InputError, one_line, reason_of, run_command
from image_classification.flags import Parser
from image_classification.models.families import fixed_image_size
from image_classification.models.loading import device_of, load_image_processor, load_model


# A bar is shown for more images than this.
FEW = 10


def main(argv: list[str] | None = None) -> int:
    """
    Args:
        argv: the words after the script's name; default the process's.

    Returns:
        The exit status: 0, 2 where an image or the model cannot be used, 1 after a failure that nobody foresaw, 130
        after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    return run_command("predict.py", lambda: predict(argv), debug="--debug" in argv)


def predict(argv: list[str]) -> None:
    """Print the labels of each image. Raises `InputError` where an image or the model cannot be used."""
    parser = Parser(prog="predict.py", description="Classify images with a checkpoint of run_image_classification.py.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, or its name on the Hub")
    parser.add_argument("--top-k", type=int, default=5, help="labels to show (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error(f"--top-k is {args.top_k}, expected 1 or more")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    classify = load_classifier(args.model, args.device)
    # All images first, so that a broken one is not found after minutes of others; one at a time is in memory.
    for path in progress(args.images, "Checking images"):
        check_image(path)
    for number, path in enumerate(progress(args.images, "Classifying")):
        shown = table(path, classify(read_image(path), args.top_k))
        tqdm.write(f"\n{shown}" if number else shown)


def progress(images: list[str], what: str) -> tqdm:
    """The images, with a bar on standard error if they are many."""
    return tqdm(images, desc=what, unit="image", leave=False, disable=len(images) <= FEW)


def load_classifier(model: str, device: str | None = None) -> Callable:
    """
    A checkpoint as a function of an image and the number of labels wanted.

    Raises:
        InputError: there is no such model or device, or the model is damaged.
    """
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".") or model.count("/") != 1):
        raise InputError(f"there is no model folder {model}. `python run_image_classification.py` trains one.")
    network, _ = load_model(model, "--model")
    processor = load_image_processor(model, "--model", fixed_image_size(network.config))
    if processor is None:
        raise InputError(f"`--model` {model} has no preprocessor_config.json, which says how images are prepared.")
    if teacher := getattr(network.config, "teacher_attention", None):
        raise InputError(
            f"the model {model} attends with the maps of its teacher, {teacher}, and predicts nothing alone. Evaluate "
            f"it with `python run_image_classification.py --eval --resume {model} --teacher_attention TEACHER`."
        )
    where = device_of(device)
    try:
        classify = pipeline("image-classification", model=network, image_processor=processor, device=where)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the model {model} cannot be put on the device {where}: {reason_of(error)}") from error

    def guess(image, labels: int) -> list[dict]:
        guesses = classify(image, top_k=labels)
        if any(item["score"] != item["score"] for item in guesses):
            raise InputError(f"the model {model} gives scores that are no numbers (NaN): it is damaged or diverged.")
        return guesses

    return guess


def table(path: str, predictions: list[dict]) -> str:
    """One image's labels and scores, best first."""
    labels = [one_line(prediction["label"]) for prediction in predictions]
    width = max(map(len, labels))
    rows = [f"  {label:<{width}}  {100 * item['score']:6.2f} %" for label, item in zip(labels, predictions)]
    return "\n".join([path, *rows])


if __name__ == "__main__":
    sys.exit(main())
