# SPDX-License-Identifier: Apache-2.0
"""
Classify images with a checkpoint: `python predict.py IMAGE... --model DIR`.

Needs nothing of the training side: torch, transformers, safetensors, einops and Pillow.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageOps
from transformers import pipeline

import modeling_karat_vit  # noqa: F401  (registers the model with Transformers)


def main(argv: list[str] | None = None) -> int:
    """
    Args:
        argv: the words after the script's name; default the process's.

    Returns:
        The exit status: 0, or 2 where an image or the model cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Classify images with a KArAt-ViT (or ViT) checkpoint.", allow_abbrev=False
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, or its name on the Hub")
    parser.add_argument("--top-k", "--top_k", type=int, default=5, help="labels to show (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error(f"--top-k is {args.top_k}, expected 1 or more")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # All images first, so that a broken one is not found after minutes of others.
        images = [load_image(path) for path in args.images]
        classify = load_classifier(args.model, args.device)
        for number, (path, image) in enumerate(zip(args.images, images, strict=True)):
            if number:
                print()
            print(table(path, classify(image, top_k=args.top_k)))
    except ValueError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def load_image(path: str) -> Image.Image:
    """Read an image upright and in RGB. Raises `ValueError` naming the file if there is none or it is damaged."""
    if not Path(path).is_file():
        what = "is a folder, expected an image file" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"the image {path} {what}.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others for broken files.
        raise ValueError(f"the image {path} cannot be read: it is truncated, damaged or no image ({error}).") from error


def load_classifier(model: str, device: str | None = None):
    """The pipeline of a checkpoint. Raises `ValueError` if there is no such model or device."""
    folder = Path(model)
    if folder.is_dir():
        for needed in ("config.json", "preprocessor_config.json"):
            if not (folder / needed).is_file():
                raise ValueError(f"{model} holds no {needed}: it is no checkpoint folder of a finished run.")
    elif folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ValueError(f"there is no model folder {model}. `python run_image_classification.py` trains one.")
    try:
        device = device if device is None else torch.device(device)
        classify = pipeline("image-classification", model=model, device=device, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the model {model} cannot be loaded{f' on {device}' if device else ''}: {reason}") from error
    if teacher := getattr(classify.model.config, "teacher_attention", None):
        raise ValueError(
            f"the model {model} attends with the maps of its teacher, {teacher}, and predicts nothing alone. Evaluate "
            f"it with `python run_image_classification.py --eval --resume {model} --teacher_attention TEACHER`."
        )
    return classify


def table(path: str, predictions: list[dict]) -> str:
    """One image's labels and scores, best first."""
    width = max(len(prediction["label"]) for prediction in predictions)
    rows = [f"  {item['label']:<{width}}  {100 * item['score']:6.2f} %" for item in predictions]
    return "\n".join([path, *rows])


if __name__ == "__main__":
    sys.exit(main())
