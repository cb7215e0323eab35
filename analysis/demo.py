# SPDX-License-Identifier: Apache-2.0
"""
A page in the browser: drop in an image and see the five best guesses of a model, where each head of each block looks,
and the functions that a KArAt head learned; with --compare, a second model beside it.

Prints the page's address and serves it until Ctrl-C. Images stay on this machine, and are deleted after about an
hour. With --push_to_space, it serves nothing here, and makes the same page a Space of the Hugging Face Hub instead:
models in folders are uploaded with it, models on the Hub are loaded from there.
"""

import argparse
import functools
import math
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import pipeline

from image_classification.errors import InputError
from image_classification.images import upright_rgb

from . import attention, functions, options, style
from .checkpoints import Checkpoint, load_checkpoint
from .images import find_images, prepare, processor_of


TOP = 5
# Images of more pixels are shrunk to this many as they are read.
SHRINK_ABOVE = 2**24
# What is read. Pillow knows more, and hands some, such as EPS, to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Images that are remembered, so that moving a slider need not run the model again. They are told apart by their paths:
# Gradio names an upload by its content.
REMEMBERED = 64
EXAMPLES = 48
# Of the pictures that are drawn.
DPI = 150
VIEWS = ("One head", "Mean of the heads", "All blocks (rollout)")
STAGES = {"What the model uses": "after", "Scores, before the activation": "before"}


@dataclass
class Seen:
    """
    One image, as one model sees it.

    Args:
        pixels: as the model takes them, (1, 3, height, width).
        picture: the same for people, (height, width, 3), from 0 to 1.
        guesses: the best `TOP` labels with their probabilities, best first; empty where there is no classifier.
        maps: of every block, what [CLS] sees.
        notes: what is worth knowing of how the image was read, in sentences.
    """

    pixels: torch.Tensor
    picture: np.ndarray
    guesses: dict[str, float]
    maps: list[attention.Maps]
    notes: list[str]


class Viewer:
    """
    One model, ready to be shown images; safe to share between threads. Pictures are (height, width, 3) bytes.

    Args:
        checkpoint: the model.
        name: what the page calls it.

    Raises:
        InputError: it has no image processor, or does not run on an RGB image.
    """

    # Of all models: PyTorch's hooks and Matplotlib's settings belong to the process.
    _lock = threading.RLock()

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name = checkpoint, name
        processor = processor_of(checkpoint)
        self._classify = pipeline("image-classification", model=checkpoint.model, image_processor=processor)
        self._seen = functools.lru_cache(REMEMBERED)(self._look)
        self._functions = functools.lru_cache(REMEMBERED)(self._learned)
        try:
            self._see(Image.new("RGB", (64, 64), "grey"), [])
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{checkpoint.source} does not run on an RGB image: {error}") from error

    def see(self, path: str) -> Seen:
        """
        Run the model on an image file.

        Raises:
            InputError: see `read_image`.
        """
        with self._lock:
            return self._seen(path)

    def draw_attention(
        self, path: str, block: int, head: int, view: str = VIEWS[0], stage: str = "after", opacity: float = 0.85
    ) -> tuple[np.ndarray | None, str]:
        """
        Where the model looks: a veil over the image, of what is positive.

        Args:
            path: of the image.
            block, head: which.
            view: of `VIEWS`.
            stage: `"before"` or `"after"` the activation. Rollout is always after.
            opacity: of the veil.

        Returns:
            The picture, or `None` where the model has no such block or head; and what it shows, in words.
        """
        with self._lock, style.context():
            seen = self._seen(path)
            if view == VIEWS[2]:
                row, low, what = seen.maps[0].rollout[0], None, f"rollout over all {len(seen.maps)} blocks"
            else:
                if absent := self._absent(block, None if view == VIEWS[1] else head):
                    return None, absent
                rows, low = getattr(seen.maps[block], stage)[0], 0.0
                row = rows.mean(0) if view == VIEWS[1] else rows[head]
                kind = style.KIND_NAMES[self._kind(block, head)] if view == VIEWS[0] else ""
                heads = f"head {head} ({kind})" if kind else f"mean of {len(rows)} heads"
                what = f"block {block}, {heads}"
                if not (row[1:] > 0).any():
                    what += ": positive nowhere"
            height, width = seen.picture.shape[:2]
            figure = style.figure(3.4, 3.4 * height / width)
            figure.set_layout_engine("none")
            values = attention.on_grid(row, seen.maps[0].grid)
            attention.draw_overlay(seen.picture, values, figure.add_axes((0, 0, 1, 1)), low, opacity)
            return _pixels(figure), what

    def draw_overview(self, path: str, stage: str = "after", chosen: tuple[int, int] | None = None) -> np.ndarray:
        """All heads of all blocks as small signed maps; the `chosen` (block, head) is framed, if there is such."""
        with self._lock, style.context():
            rows = np.stack([getattr(maps, stage)[0] for maps in self._seen(path).maps])
            size, box = self._overview_layout()
            figure = style.figure(*size)
            figure.set_layout_engine("none")
            axes = attention.draw_overview(rows, self.checkpoint.grid, figure.add_axes(box))
            axes.set_aspect("auto")
            if chosen is not None and not self._absent(*chosen):
                block, head = chosen
                corner = (block - 0.5, head - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=style.INK, linewidth=2, clip_on=False))
            return _pixels(figure)

    def head_at(self, x: float, y: float) -> tuple[int, int] | None:
        """The (block, head) at a point of the overview's picture, in pixels from its top left corner."""
        (width, height), (left, bottom, across, up) = self._overview_layout()
        block = math.floor((x / (width * DPI) - left) / across * self.checkpoint.blocks)
        head = math.floor((y / (height * DPI) - (1 - bottom - up)) / up * self.checkpoint.heads)
        return None if self._absent(block, head) else (block, head)

    def draw_functions(self, path: str, block: int, head: int) -> tuple[np.ndarray | None, str]:
        """
        The learned functions of a head, over the scores of an image.

        Returns:
            The picture, or `None` where there is nothing learned; and what it shows, in words.
        """
        if absent := self._absent(block, head):
            return None, absent
        if self._kind(block, head) == "softmax":
            return None, (
                f"Head {head} of block {block} is softmax: one fixed function, the same in every head. There is "
                "nothing learned to draw."
            )
        with self._lock, style.context():
            operator = self.checkpoint.operator(block)
            data = self._functions(path, block, head)
            figure = style.figure(style.COLUMN * 1.35, 2.7)
            functions.draw_all([data], figure, inputs=functions.input_name(operator))
            steps = len(operator.edges)
            first = f" These are of the first of its {steps} steps." if steps > 1 else ""
            outputs, inputs = data.strength.shape
            return _pixels(figure), (
                f"Block {block}, head {head}: {outputs * inputs:,} learned functions turn a score into attention."
                f"{first} Grey: the scores of this image."
            )

    def _see(self, image: Image.Image, notes: list[str]) -> Seen:
        prepared = prepare(self.checkpoint, [(image, "image", None)])
        guesses = self._classify(image, top_k=min(TOP, len(self.checkpoint.labels)))
        named = {self._label(guess["label"], rank, guesses): guess["score"] for rank, guess in enumerate(guesses)}
        maps = attention.compute_all(self.checkpoint, prepared.pixels)
        guesses = named if self.checkpoint.has_classifier else {}
        return Seen(prepared.pixels, prepared.pictures[0], guesses, maps, notes)

    def _look(self, path: str) -> Seen:
        return self._see(*read_image(path))

    def _learned(self, path: str, block: int, head: int) -> functions.Functions:
        return functions.compute(self.checkpoint, self._seen(path).pixels, block, [head])[0]

    def _label(self, label: str, rank: int, guesses: list[dict]) -> str:
        """Told apart where two classes have one name, as two of ImageNet's do: they would be shown as one."""
        earlier = sum(guess["label"] == label for guess in guesses[:rank])
        return f"{label} ({earlier + 1})" if earlier else label

    def _kind(self, block: int, head: int) -> str:
        return self.checkpoint.head_kinds(block)[head]

    def _absent(self, block: int, head: int | None) -> str | None:
        """Says that the model has no such block or head, if so."""
        for what, number, count in (("block", block, self.checkpoint.blocks), ("head", head, self.checkpoint.heads)):
            if number is not None and not 0 <= number < count:
                return f"This model has no {what} {number}: its {what}s are 0 to {count - 1}."
        return None

    def _overview_layout(self) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
        """Width and height of the figure in inches, and left, bottom, width and height of its axes as parts of it."""
        rows, columns = self.checkpoint.grid
        side = min(0.8, 4.0 / self.checkpoint.blocks)
        across, down = side * self.checkpoint.blocks, side * self.checkpoint.heads * rows / columns
        left, bottom, spare = 0.5, 0.45, 0.08
        width, height = left + across + spare, bottom + down + spare
        return (width, height), (left / width, bottom / height, across / width, down / height)


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(DPI)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def read_image(path: str) -> tuple[Image.Image, list[str]]:
    """
    Read whatever image somebody has: upright, in RGB, the first of several frames, and shrunk if it is very large.

    At most 89 megapixels (Pillow's limit) are decoded, some 0.4 GB.

    Args:
        path: of the file.

    Returns:
        The image, and what is worth knowing of how it was read, in sentences.

    Raises:
        InputError: the file is gone, damaged, no image, too large, or has floating-point or 32-bit pixels.
    """
    notes = []
    try:
        image = Image.open(path, formats=FORMATS)
        megapixels = image.width * image.height / 1e6
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if getattr(image, "is_animated", False):
            notes.append("The file holds several pictures: this is the first.")
        if image.mode.startswith("I;16"):
            image = _eight_bits(image)
            notes.append("16 bits a pixel were reduced to 8.")
        if image.width * image.height > SHRINK_ABOVE:
            factor = (SHRINK_ABOVE / (image.width * image.height)) ** 0.5
            # A JPEG is decoded at the smaller size to begin with.
            image.thumbnail([max(1, round(side * factor)) for side in image.size])
            notes.append(f"The image has {megapixels:.0f} megapixels and was shrunk as it was read.")
        image.load()
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            notes.append("Transparency is ignored, as in training.")
    except FileNotFoundError as error:
        raise InputError("The image is not kept any longer. Please upload it again.") from error
    except Image.DecompressionBombError as error:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"The image is too large: at most {limit:.0f} megapixels. Shrink it first.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others for broken files.
        raise InputError(
            "This file cannot be read: it is damaged, cut short, or no image of a known kind. Try PNG, JPEG, WebP, "
            "GIF, BMP, TIFF or AVIF."
        ) from error
    return upright_rgb(image, Path(path).name), notes


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image with the upper 8 of them, still with its orientation."""
    reduced = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    reduced.getexif().update(image.getexif())
    return reduced


def find_examples(paths: list[str] | None, checkpoints: list[Checkpoint], folder: Path) -> list[str]:
    """
    Example images as PNG files.

    Args:
        paths: files, and folders of which up to `EXAMPLES` are drawn; `None` for held-out images of the data set of a
            run, where it is on this machine.
        checkpoints: the models.
        folder: where to write the files.

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
    options.add_model(parser, compare=True)
    parser.add_argument(
        "--examples",
        nargs="+",
        metavar="PATH",
        help="image files, or folders of them, to offer as examples (default: held-out images of the data set that "
        "run.json, beside the checkpoint, names, if it is on this machine)",
    )
    parser.add_argument("--host", help="address to listen at; 0.0.0.0 for all of this machine (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860)")
    parser.add_argument(
        "--share", action="store_true", help="also make a public address, for a week, through Gradio's servers"
    )
    parser.add_argument(
        "--push_to_space",
        metavar="USER/NAME",
        help="make or update this Space of the Hugging Face Hub, and do not serve the page here",
    )
    parser.add_argument("--private", action="store_true", help="with --push_to_space: a new Space is yours alone")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --push_to_space: write to a Space that this command did not make",
    )


def run(args: argparse.Namespace) -> None:
    page = _page()
    if args.push_to_space is None and (args.private or args.overwrite):
        raise InputError("`--private` and `--overwrite` go with --push_to_space.")
    if args.port is not None and not 0 < args.port < 2**16:
        raise InputError(f"`--port` is {args.port}, expected 1 to {2**16 - 1}.")
    target = None
    if args.push_to_space is not None:
        from . import space

        target = space.Target(args.push_to_space, args.overwrite, args.private)
    viewers = load_viewers(args.model, args.compare, args.device)
    with tempfile.TemporaryDirectory(prefix="karat-vit-examples-") as folder:
        examples = find_examples(args.examples, [viewer.checkpoint for viewer in viewers], Path(folder))
        if target is not None:
            target.push(viewers, examples)
        else:
            page.serve(page.build(viewers, examples), args.host, args.port, args.share)


def load_viewers(model: str, compare: str | None = None, device: str | None = None) -> list[Viewer]:
    """The model of `--model` and, if there is one, of `--compare`, tried out on an image."""
    where = options.device_of(device)
    sources = [model] if compare is None else [model, compare]
    checkpoints = [load_checkpoint(source, flag, where) for source, flag in zip(sources, ("--model", "--compare"))]
    names = options.names(None, sources)
    return [Viewer(checkpoint, name) for checkpoint, name in zip(checkpoints, names)]


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
