# SPDX-License-Identifier: Apache-2.0
"""
Training images on their way to a device that augments them.

Where all of them fit, they are decoded once and stay there, and the data loader hands over nothing but indices. Else
the data workers decode, crop and resize them, as ever.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..data.dataset import ImageDataset, ImageSource
from ..data.images import decode
from ..data.transforms import torchvision_transforms
from ..runs.signals import outlive_signals
from ..settings.arguments import DataArguments


SAMPLE = 200  # Images by which the size of all is estimated.
# Images that a worker decodes at a time, or more if they have fewer bytes than this: handing over takes a millisecond.
AT_ONCE, BYTES_AT_ONCE = 128, 2**21


def read(item: dict[str, Any], where: str) -> torch.Tensor:
    """
    As `decode`, into uint8 (height, width, 3): JPEGs by torchvision, which is quicker than Pillow, and whatever it
    cannot read by Pillow, which has the say on what is a broken image.
    """
    content = item.get("bytes")
    try:
        from torchvision.io import decode_jpeg

        if content is None:
            with open(item["path"], "rb") as file:
                content = file.read()
        if content[:3] == b"\xff\xd8\xff":
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            image = decode_jpeg(encoded, apply_exif_orientation=True)
            if image.shape[0] in (1, 3):  # Not CMYK.
                return image.expand(3, -1, -1).permute(1, 2, 0)
    except (ImportError, OSError, RuntimeError):  # ImportError: later versions will have no decoder.
        pass
    return torch.from_numpy(np.array(decode(item, where)))


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """uint8 (height, width, 3) -> (*size, 3), as torchvision does it, but at the decoder's layout, which is quicker."""
    pixels = image.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    # Pillow's nearest neighbour is torch's exact one.
    mode = "nearest-exact" if interpolation == "nearest" else interpolation
    return F.interpolate(pixels, size, mode=mode, antialias=interpolation != "nearest")[0].permute(1, 2, 0)


class CropTransform:
    """
    uint8 (height, width, 3), as `read` returns it -> (*size, 3): `TrainTransform`'s random crop, by the same numbers.
    """

    def __init__(self, args: DataArguments, size: tuple[int, int]):
        v2 = torchvision_transforms()
        self.size, self.interpolation = size, args.train_interpolation
        self.crop = v2.RandomResizedCrop(size, tuple(args.train_crop_scale), tuple(args.train_crop_ratio))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        box = self.crop.make_params([image.permute(2, 0, 1)])
        top, left, height, width = (box[name] for name in ("top", "left", "height", "width"))
        return resize(image[top : top + height, left : left + width], self.size, self.interpolation)


@dataclass
class ResidentImages:
    """Decoded images of different sizes."""

    pixels: torch.Tensor  # uint8 (bytes,): one (height, width, 3) after another, on the device or where it reads them.
    offsets: torch.Tensor  # Where they begin, int64 (n,).
    sides: torch.Tensor  # Heights and widths, int32 (n, 2).
    labels: torch.Tensor  # int64 (n,).
    tallest: int  # The largest height.

    def __len__(self) -> int:
        return len(self.labels)

    def crop(self, item: int, box: list[int]) -> torch.Tensor:
        """Top, left, height and width of an image: uint8 (height, width, 3)."""
        top, left, height, width = box
        tall, wide = self.sides[item].tolist()
        image = self.pixels[int(self.offsets[item]) :][: 3 * tall * wide].view(tall, wide, 3)
        return image[top : top + height, left : left + width]


def load_resident(
    split: Dataset, name: str, device: torch.device, share: float, processes: int = 1, workers: int = 0
) -> tuple[ResidentImages | None, str]:
    """
    Decode all images of a split and keep them, if they fit.

    Args:
        split: columns `image` (undecoded) and `label`; `name` is what errors call it.
        share: of the device's memory that they may take; else of the host's that is free.
        processes: on this host, which all do the same, each with so many `workers` that decode.

    Returns:
        The images, or `None` where they do not fit; and where they are, in words.

    Raises:
        InputError: an image cannot be read.
    """
    # Of all processes the least, so that all go the same way: the two ways draw different crops.
    free = int(min(gather_object([psutil.virtual_memory().available])) * share / processes)
    of_device = int(torch.cuda.get_device_properties(device).total_memory * share) if device.type == "cuda" else 0
    sample = split[np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(int)]["image"]
    needed = len(split) * int(np.mean([read(item, f"{name} image").numel() for item in sample]))
    on_device = device.type == "cuda" and needed <= of_device
    pinned, most = device.type == "cuda" and not on_device, of_device if on_device else free
    too_large = f"more than `resident_share` {share:g} allows: workers decode them"
    # PyTorch pins powers of two.
    if (2 ** math.ceil(math.log2(needed)) if pinned else needed) > most:
        return None, f"decoded they would take about {needed / 2**30:,.2f} GiB, {too_large}"
    where: dict[str, Any] = {"dtype": torch.uint8, "device": device if on_device else "cpu", "pin_memory": pinned}
    pixels, of_parts, end = torch.empty(needed, **where), [], 0
    parts = _Decoded(split, name, at_once=max(AT_ONCE, BYTES_AT_ONCE * len(split) // needed))
    for part, of_part in in_workers(parts, "Decoding images", workers):
        begin, end = end, end + len(part)
        if end > most:
            return None, f"decoded they take {end / 2**30:,.2f} GiB and more, {too_large}"
        if end > len(pixels):  # The sample's images were smaller.
            pixels, before = torch.empty(min(end + end // 8, most), **where), pixels
            pixels[:begin].copy_(before[:begin])
        pixels[begin:end].copy_(part)
        of_parts.append(of_part)
    sides = torch.cat(of_parts)
    lengths = 3 * sides.long().prod(1)
    images = ResidentImages(
        pixels[:end],
        (lengths.cumsum(0) - lengths).to(device),
        sides.to(device),
        torch.tensor(split["label"][:]).to(device),
        int(sides[:, 0].max()),
    )
    place = "on the device" if on_device else "in pinned memory" if pinned else "in memory"
    return images, f"decoded once, {end / 2**30:,.2f} GiB {place}: no data workers"


class _Decoded(torch.utils.data.Dataset):
    """
    The images of a split, `at_once` at a time: their bytes, uint8 (n,), and heights and widths, int32 (images, 2).
    `read` makes uint8 (height, width, 3) of an undecoded one and what errors call it.
    """

    def __init__(self, split: Dataset, name: str, read: Callable[[dict, str], torch.Tensor] = read, at_once=AT_ONCE):
        self.split, self.name, self.read, self.at_once = split, name, read, at_once

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.at_once)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = number * self.at_once
        items = self.split[begin : begin + self.at_once]["image"]
        images = [self.read(item, f"{self.name} image {index}") for index, item in enumerate(items, begin)]
        sides = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
        return torch.cat([image.flatten() for image in images]), sides


def in_workers(parts: _Decoded, doing: str, workers: int) -> Iterator:
    """What is in a data set, in order, prepared by processes; with a progress bar where it takes a while."""
    loader = torch.utils.data.DataLoader(parts, batch_size=None, num_workers=workers, worker_init_fn=outlive_signals)
    hidden = int(os.environ.get("LOCAL_RANK", 0)) > 0
    bar = tqdm(total=len(parts.split), desc=doing, unit="image", leave=False, delay=2, disable=hidden)
    with bar:
        for part in loader:
            yield part
            bar.update(len(part[1]))


class ResidentDataset(ImageDataset):
    """Indices of resident images, which need no data workers."""

    needs_workers = False

    def __init__(self, split: Dataset, name: str, repeated: bool = False):
        super().__init__(split, None, name, repeated=repeated, collate=_indices)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [{"index": torch.tensor(indices), "epoch": int(self._epoch)}]


class ResidentEvaluation(ImageSource):
    """
    Images of an evaluation as torchvision's image processor resizes and crops them, which stay on the device as uint8
    from the first time that they are asked for. `finish` normalises them there, as the processor does.
    """

    needs_workers = False

    def __init__(self, split: Dataset, name: str, processor: BaseImageProcessor, device: torch.device, workers: int):
        self.split, self.name, self.processor = split, name, processor
        self.device, self.workers, self.collate = device, workers, _indices
        self.labels = torch.tensor(split["label"][:], device=device)
        self.pixels: torch.Tensor | None = None

    @staticmethod
    def fits(
        images: int,
        size: tuple[int, int],
        processor: BaseImageProcessor,
        device: torch.device,
        share: float,
        others: ResidentImages | None = None,
    ) -> bool:
        """Whether so many images of a size fit into a share of the device's memory, beside others that may be in it."""
        if device.type != "cuda" or not hasattr(processor, "rescale_and_normalize"):
            return False
        taken = others.pixels.numel() if others is not None and others.pixels.device.type == "cuda" else 0
        needed = taken + images * 3 * math.prod(size)
        return needed <= share * torch.cuda.get_device_properties(device).total_memory

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [{"index": torch.tensor(indices)}]

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`pixel_values`, fp32 (B, 3, height, width), and `labels`, int64 (B,), of the `index`, int64 (B,)."""
        index = batch["index"]
        if self.pixels is None:
            self.pixels = self._load()
        processor = self.processor
        pixels = processor.rescale_and_normalize(
            self.pixels[index].permute(0, 3, 1, 2).contiguous(),
            processor.do_rescale,
            processor.rescale_factor,
            processor.do_normalize,
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def _load(self) -> torch.Tensor:
        pixels, end = torch.empty(0), 0
        processed = functools.partial(_processed, self.processor)  # Goes to processes, and must not take tensors along.
        for part, sides in in_workers(_Decoded(self.split, self.name, processed), "Reading images", self.workers):
            part = part.view(len(sides), *sides[0].tolist(), 3)
            if end == 0:
                pixels = part.new_empty((len(self), *part.shape[1:]), device=self.device)
            pixels[end : end + len(part)] = part
            end += len(part)
        return pixels


def _processed(processor: BaseImageProcessor, item: dict[str, Any], where: str) -> torch.Tensor:
    """By Pillow, resized and cropped as evaluation and pipeline do it: uint8 (height, width, 3)."""
    made = processor(decode(item, where), return_tensors="pt", do_rescale=False, do_normalize=False)
    return made["pixel_values"][0].permute(1, 2, 0)


def collate_for_device(rows: list[dict]) -> dict[str, Any]:
    """
    Rows of cropped images -> what `DeviceAugmentation` makes a training batch of: `epoch`; `index` of the items in it,
    int64 (B,); `pixels`, uint8 (B, height, width, 3); and `labels`, int64 (B,). Of resident images `ResidentDataset`
    has `epoch` and `index` alone.
    """
    kept = [{"pixels": row["pixel_values"], "labels": row["labels"], "index": row["key"][2]} for row in rows]
    indices = [row["index"] for row in kept]
    return {**default_collate(kept), "epoch": rows[0]["key"][1], "first": min(indices), "last": max(indices)}


def _indices(rows: list[dict]) -> dict[str, Any]:
    """The one row of indices is the batch."""
    return rows[0]
