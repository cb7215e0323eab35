# SPDX-License-Identifier: Apache-2.0
"""
Training augmentation on the device that trains, a batch at a time, where CPU workers are too slow for it.

What happens to an item is a row of numbers, drawn for the whole epoch on the device (`draws.py`). On an NVIDIA GPU with
Triton a few kernels carry it out for all images of a batch at once (`kernels.py`), and nothing waits for the
device; the formulas here are what those are held against, and what runs elsewhere.

The formulas are Pillow's, in whole numbers; affine operations interpolate by torch's bicubic (a = -0.75; Pillow: -1).
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor

from ..data.augmentation import REPEATS, mixes
from ..data.sources import ImageData
from ..errors import InputError
from ..settings.arguments import DataArguments, RunArguments
from .draws import BLOCK, BOX, CODES, FLIP, LAYERS, MIX, SEED, WORDS, Draws
from .resident import ResidentImages, load_resident, resize


logger = logging.getLogger(__name__)

READ_AT_ONCE = 4  # Blocks that are kept of items which come in their order.


@functools.cache
def kernels_on(device: torch.device):
    """The module of Triton kernels, where they run; else `None`."""
    try:
        from . import kernels
    except ImportError:
        return None
    if device.type == "cuda":
        fit = not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fit = device.type == "cpu" and kernels.INTERPRET
    return kernels if fit else None


class DeviceAugmentation:
    """
    A batch of `collate_for_device` or of `ResidentDataset`, moved to the device -> `pixel_values`, fp32 (B, 3, height,
    width), normalised, and `labels`: int64 (B,), or under mixup and CutMix probabilities, fp32 (B, classes).

    Args:
        args: the data arguments, which `Draws` may refuse.
        size: height and width of the model's images.
        processor: whose mean and standard deviation normalise.
        items: of an epoch: one more than the largest index.
        images: which `index` means, modulo their number; `None`: the batches bring them along, cropped.
        in_order: the indices of an epoch come about in their order: only some blocks of numbers are kept.
    """

    def __init__(
        self,
        args: DataArguments,
        size: tuple[int, int],
        classes: int,
        processor: BaseImageProcessor,
        seed: int,
        items: int,
        images: ResidentImages | None = None,
        in_order: bool = False,
    ):
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        self.draws = Draws(args, size, self.mean, seed)
        self.size, self.classes, self.images, self.in_order = size, classes, images, in_order
        self.fill = [min(255, round(255 * x)) for x in self.mean]
        self.interpolation = args.train_interpolation
        self.noise = args.random_erasing > 0 and args.random_erasing_mode == "pixel"
        self.mode = args.mixup_mode if mixes(args) else None
        self.rows = min(BLOCK, items)  # Of a block.
        self.blocks = math.ceil(items / self.rows)
        self.table: torch.Tensor | None = None
        # The epoch and the block that lie in each part of the table.
        self.held: list[tuple[int, int] | None] = [None] * (min(self.blocks, READ_AT_ONCE) if in_order else self.blocks)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        drawn, items = self.drawn(batch), None
        labels: Any = batch.get("labels")
        if self.images is not None:
            items = batch["index"] % len(self.images)  # Under repeated augmentation it names the repetition, too.
            labels = self.images.labels[items]
        if kernels := kernels_on(drawn.device):
            images = self.change_by_kernels(kernels, batch.get("pixels"), items, drawn)
        else:
            images = self.change(self.flipped(batch.get("pixels"), items, drawn), drawn)
        return {"pixel_values": images, "labels": labels if self.mode is None else self.mixed_labels(labels, drawn)}

    def drawn(self, batch: dict[str, Any]) -> torch.Tensor:
        """The rows of a batch, fp32 (B, words). Those of an epoch are drawn when its first batch comes."""
        index, wanted = batch["index"], range(self.blocks)
        if self.in_order:
            wanted = range(batch["first"] // self.rows, batch["last"] // self.rows + 1)
        parts = len(self.held)
        if self.table is None:
            self.table = torch.empty(parts * self.rows, self.draws.words, device=index.device)
        for block in wanted:
            if self.held[block % parts] == (batch["epoch"], block):
                continue
            self.held[block % parts] = (batch["epoch"], block)
            begin = block % parts * self.rows
            self.table[begin : begin + self.rows].copy_(self._draw(index.device, batch["epoch"], block))
        return self.table[index % len(self.table) if self.blocks > parts else index]

    def _draw(self, device: torch.device, epoch: int, block: int) -> torch.Tensor:
        sides, draws_on = None, device if device.type == "cuda" else torch.device("cpu")
        if self.images is not None:
            items = torch.arange(block * self.rows, (block + 1) * self.rows, device=device) % len(self.images)
            sides = self.images.sides[items].to(draws_on)
        return self.draws.draw(draws_on, epoch, block, self.rows, sides)

    def _partner(self, count: int, device: torch.device) -> torch.Tensor:
        """Of each image; an odd one out is its own."""
        return torch.arange(count - count % 2 - 1, -1 - count % 2, -1, device=device) % count

    def _leader(self, partner: torch.Tensor) -> torch.Tensor | slice:
        """Whose row says how an image is mixed."""
        if self.mode == "batch":
            return slice(0, 1)
        own = torch.arange(len(partner), device=partner.device)
        return own if self.mode == "elem" else own.minimum(partner)

    def mixed_labels(self, labels: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        partner = self._partner(len(labels), labels.device)
        own = (labels[:, None] == torch.arange(self.classes, device=labels.device)).float()
        share = drawn[self._leader(partner), LAYERS - 1 : LAYERS]
        return torch.lerp(own[partner], own, share)

    def change_by_kernels(self, kernels, pixels, items, drawn: torch.Tensor) -> torch.Tensor:
        """As `change` of `flipped`."""
        if items is not None:
            images = kernels.crop_and_resize(self.images, items, drawn, self.size, self.interpolation)
        else:
            images = kernels.arrange(pixels, drawn)
        for layer in range(self.draws.layers):
            images = kernels.operate(images, drawn, LAYERS + layer * WORDS, self.fill, self.interpolation)
        parts = self.draws.begin_of_parts, self.draws.parts
        return kernels.finish(images, drawn, *parts, self.mean, self.std, self.noise, self.mode)

    def flipped(self, pixels: Any, items: torch.Tensor | None, drawn: torch.Tensor) -> torch.Tensor:
        """Cropped and resized, if they were not, and flipped: uint8 (B, 3, height, width)."""
        if self.images is not None and items is not None:
            boxes = drawn[:, BOX:FLIP].long().tolist()
            crops = [self.images.crop(item, box) for item, box in zip(items.tolist(), boxes, strict=True)]
            pixels = torch.stack([resize(crop, self.size, self.interpolation) for crop in crops]).to(drawn.device)
        images = pixels.permute(0, 3, 1, 2)
        return torch.where(drawn[:, FLIP, None, None, None] != 0, images.flip(-1), images).contiguous()

    def change(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """
        All else that happens to uint8 images (B, 3, height, width), changed or not: fp32, normalised, of that shape.
        """
        for layer in range(self.draws.layers):
            numbers = drawn[:, LAYERS + layer * WORDS :][:, :WORDS]
            for name, code in CODES.items():
                which = (numbers[:, 0] == code).nonzero()[:, 0]
                if len(which):
                    images[which] = self.apply(name, images[which], numbers[which, 1:])
        images = images.float()
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(255 * mean).div_(255 * std)
        images = self._erase(images, drawn)
        if self.mode is None:
            return images
        partner = self._partner(len(images), images.device)
        share, *box = drawn[self._leader(partner), MIX : LAYERS - 1, None, None].unbind(1)
        others = images[partner]
        mixed = torch.lerp(others, images, share[:, None])
        return torch.where(_inside(images, *box)[:, None], others, mixed)

    def apply(self, name: str, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """One operation on uint8 images (n, 3, height, width) with its numbers (n, 6)."""
        if name == "Affine":
            return affine(images, numbers, self.fill, self.interpolation)
        return OPERATIONS[name](images, numbers[:, 0, None, None, None])

    def _erase(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        noise = None
        if self.noise:
            noise = torch.empty_like(images)
            for image, seed in zip(noise, drawn[:, SEED].tolist(), strict=True):
                image.normal_(generator=torch.Generator(images.device).manual_seed(int(seed)))
        for part in drawn[:, self.draws.begin_of_parts :].split(WORDS, 1) if self.draws.parts else ():
            inside = _inside(images, *part[:, :4, None, None].unbind(1))[:, None]
            images = torch.where(inside, part[:, 4:, None, None] if noise is None else noise, images)
        return images


def build_augmentation(
    args: DataArguments, run: RunArguments, size: tuple[int, int], data: ImageData, processor: BaseImageProcessor
) -> DeviceAugmentation | None:
    """
    What `augment_on` asks for, with the images that fit on the device; `None`: the workers augment. The log says which
    way, and why. Raises `InputError` as `Draws` and `load_resident` do.
    """
    if data.train is None or args.augment_on == "workers" or (args.augment_on == "auto" and run.device.type != "cuda"):
        return None
    if args.augment_on == "auto" and (why := _only_workers(args, run.device, processor)):
        logger.info(f"Images  augmented by the workers: {why}")
        return None
    images, how = None, "workers decode and crop"
    if args.resident_share > 0 and not args.streaming:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or run.world_size)
        workers = run.dataloader_num_workers or 0
        images, how = load_resident(data.train, "training", run.device, args.resident_share, processes, workers)
    items = len(data.train) * (REPEATS if args.repeated_aug else 1)
    logger.info(f"Images  augmented on the device; {how}")
    return DeviceAugmentation(args, size, len(data.labels), processor, run.seed, items, images, args.streaming)


def _only_workers(args: DataArguments, device: torch.device, processor: BaseImageProcessor) -> str:
    """Why; empty if the device can do it."""
    if kernels_on(device) is None:
        return "there are no kernels for it without Triton, or on this GPU"
    try:
        Draws(args, (1, 1), processor.image_mean, 0)
    except InputError:
        return f"the device does not know all operations of {args.auto_augment}"
    return ""


def _inside(images: torch.Tensor, top, bottom, left, right) -> torch.Tensor:
    """Boxes (n, 1, 1) -> (n, height, width)."""
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


# Operations on uint8 images (n, 3, height, width), as Pillow does them; `number` is (n, 1, 1, 1).


def auto_contrast(images: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    low = images.amin((2, 3), keepdim=True).double()
    high = images.amax((2, 3), keepdim=True).double()
    # A number over a tensor would be that times the reciprocal: rounded twice.
    scale = torch.full_like(high, 255) / (high - low)
    stretched = (images * scale - low * scale).clamp(0, 255).floor()
    return torch.where(high > low, stretched, images).to(torch.uint8)


def equalize(images: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    values = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    below = counts.cumsum(2) - counts
    # All but the pixels of the largest value that occurs.
    step = below.gather(2, values.amax(2, keepdim=True)) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, values)
    return torch.where(step > 0, equalized, values).to(torch.uint8).view_as(images)


def invert(images: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return 255 - images


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return images & (0xFF00 >> bits.clamp(0, 8).int()).to(torch.uint8)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return torch.where(images < 128, (images + number).clamp(max=255), images).to(torch.uint8)


def color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(gray(images), images, factor)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = (gray(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean.float(), images, factor)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(torch.zeros_like(factor), images, factor)


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.float()
    # In whole numbers, so that the sums are exact; the border stays.
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(smooth, kernel, groups=3) / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def gray(images: torch.Tensor) -> torch.Tensor:
    """Pillow's mode L: (n, 1, height, width), whole numbers in fp32."""
    red, green, blue = images.int().split(1, 1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).float()


def _blend(other: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """From `other` (at factor 0) to the image (at 1) and beyond."""
    return (other + factor * (images - other)).clamp(0, 255).floor().to(torch.uint8)


def affine(images: torch.Tensor, matrices: torch.Tensor, fill: list[int], interpolation: str) -> torch.Tensor:
    """
    uint8 images (n, 3, height, width) moved by matrices (n, 6), as `draws.MATRICES` has them; `fill` is the colour of
    what comes from outside of the image.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = (torch.arange(height, device=images.device) + 0.5)[:, None]
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    if interpolation == "nearest":  # Where torch rounds halves to even numbers, Pillow does not.
        from_x, from_y = from_x.floor() + 0.5, from_y.floor() + 0.5
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=-1)
    moved = F.grid_sample(images.float(), grid, interpolation, "border", align_corners=False)
    # Not one tensor of the three numbers: making it would wait for the device.
    outside = torch.stack([torch.full_like(moved[0, 0], value) for value in fill])
    return torch.where(inside[:, None], moved.clamp(0, 255), outside).to(torch.uint8)


_IN_ORDER = auto_contrast, equalize, invert, posterize, solarize, solarize_add, color, contrast, brightness, sharpness
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = dict(zip(CODES, _IN_ORDER))
