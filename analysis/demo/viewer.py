# SPDX-License-Identifier: Apache-2.0
"""One model, ready to be shown images: its guesses, where it looks, what its heads learned."""

import functools
import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import pipeline

from image_classification.errors import InputError

from .. import attention, functions, style
from ..images import prepare, processor_of
from ..models import Checkpoint
from .reading import read_image


TOP = 5
# Images that are remembered, so that moving a slider need not run the model again. They are told apart by their paths:
# Gradio names an upload by its content.
REMEMBERED = 64
# Of the pictures that are drawn.
DPI = 150
VIEWS = ("One head", "Mean of the heads", "All blocks (rollout)")
STAGES = {"What the model uses": "after", "Scores, before the activation": "before"}


@dataclass(kw_only=True)
class Seen:
    """
    An image as one model sees it.

    Args:
        pixels, picture: as the model takes it, (1, 3, height, width), and for people, (height, width, 3), from 0 to 1.
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
    A model that is ready to be shown images; safe to share between threads. Pictures are (height, width, 3) bytes.

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
        self._seen = functools.lru_cache(REMEMBERED)(lambda path: self._see(*read_image(path)))
        self._functions = functools.lru_cache(REMEMBERED)(
            lambda path, block, head: functions.compute(checkpoint, self._seen(path).pixels, block, [head])[0]
        )
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
        Show where the model looks: a veil over the image, of what is positive.

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
        """Draw all heads of all blocks as small signed maps; the `chosen` (block, head) is framed, if there is such."""
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
        """Find the (block, head) at a point of the overview's picture, in pixels from its top left corner."""
        (width, height), (left, bottom, across, up) = self._overview_layout()
        block = math.floor((x / (width * DPI) - left) / across * self.checkpoint.blocks)
        head = math.floor((y / (height * DPI) - (1 - bottom - up)) / up * self.checkpoint.heads)
        return None if self._absent(block, head) else (block, head)

    def draw_functions(self, path: str, block: int, head: int) -> tuple[np.ndarray | None, str]:
        """
        Draw the learned functions of a head, over the scores of an image.

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
        return Seen(
            pixels=prepared.pixels,
            picture=prepared.pictures[0],
            guesses=named if self.checkpoint.has_classifier else {},
            maps=maps,
            notes=notes,
        )

    def _label(self, label: str, rank: int, guesses: list[dict]) -> str:
        """Tell classes of one name apart, as two of ImageNet's do: they would be shown as one."""
        earlier = sum(guess["label"] == label for guess in guesses[:rank])
        return f"{label} ({earlier + 1})" if earlier else label

    def _kind(self, block: int, head: int) -> str:
        return self.checkpoint.head_kinds(block)[head]

    def _absent(self, block: int, head: int | None) -> str | None:
        """Say that the model has no such block or head, if so."""
        for what, number, count in (("block", block, self.checkpoint.blocks), ("head", head, self.checkpoint.heads)):
            if number is not None and not 0 <= number < count:
                return f"This model has no {what} {number}: its {what}s are 0 to {count - 1}."
        return None

    def _overview_layout(self) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
        """Choose width and height in inches, and as parts of them left, bottom, width and height of the axes."""
        rows, columns = self.checkpoint.grid
        side = min(0.8, 4.0 / self.checkpoint.blocks)
        across, down = side * self.checkpoint.blocks, side * self.checkpoint.heads * rows / columns
        left, bottom, spare = 0.5, 0.45, 0.08
        width, height = left + across + spare, bottom + down + spare
        return (width, height), (left / width, bottom / height, across / width, down / height)


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
