# SPDX-License-Identifier: Apache-2.0
"""
Training images on their way to a device that augments them.

Where all of them fit, they are decoded once and stay there, and the data loader hands over nothing but indices. Else
the data workers decode, crop and resize them, as ever.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from .arguments import DataArguments, cores_to_use
from .augmentation import collate
from .images import decode
from .transforms import ImageDataset, torchvision_transforms


SAMPLE = 200  # Images by which the size of all is estimated.
AT_ONCE = 128  # Images that a thread decodes at a time.


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
    uint8 image (height, width, 3) -> (*size, 3): the random crop of `TrainTransform`, by the same random numbers.

    Args:
        args: the data arguments.
        size: height and width of the model's images.
    """

    read = staticmethod(read)

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
    """
    Decoded images of different sizes.

    Args:
        pixels: uint8 (bytes,): one image (height, width, 3) after another, on the device or in memory that it reads.
        offsets: where they begin, int64 (n,).
        sides: heights and widths, int32 (n, 2).
        labels: int64 (n,).
        tallest: the largest height.
    """

    pixels: torch.Tensor
    offsets: torch.Tensor
    sides: torch.Tensor
    labels: torch.Tensor
    tallest: int

    def __len__(self) -> int:
        return len(self.labels)

    def crop(self, item: int, box: list[int]) -> torch.Tensor:
        """Top, left, height and width of an image: uint8 (height, width, 3)."""
        top, left, height, width = box
        tall, wide = self.sides[item].tolist()
        image = self.pixels[int(self.offsets[item]) :][: 3 * tall * wide].view(tall, wide, 3)
        return image[top : top + height, left : left + width]


def load_resident(
    split: Dataset, name: str, device: torch.device, share: float, processes: int = 1
) -> tuple[ResidentImages | None, str]:
    """
    Decode all images of a split and keep them, if they fit.

    Args:
        split: columns `image` (undecoded) and `label`.
        name: of the split, for errors.
        device: that trains.
        share: of its memory that they may take; else of the host's that is free.
        processes: on this host, which all do the same.

    Returns:
        The images, or `None` where they do not fit; and where they are, in words.

    Raises:
        InputError: an image cannot be read.
    """
    free = int(psutil.virtual_memory().available * share / processes)
    of_device = int(torch.cuda.get_device_properties(device).total_memory * share) if device.type == "cuda" else 0
    sample = split[np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(int)]["image"]
    needed = len(split) * int(np.mean([read(item, f"{name} image").numel() for item in sample]))
    on_device = device.type == "cuda" and needed <= of_device
    pinned, most = device.type == "cuda" and not on_device, of_device if on_device else free
    too_large = f"more than `resident_share` {share:g} allows: workers decode them"
    # PyTorch pins powers of two.
    if (2 ** math.ceil(math.log2(needed)) if pinned else needed) > most:
        return None, f"decoded they would take about {needed / 2**30:,.2f} GiB, {too_large}"
    where = {"dtype": torch.uint8, "device": device if on_device else "cpu", "pin_memory": pinned}
    pixels, sides, end = torch.empty(needed, **where), [], 0
    threads = max(1, cores_to_use() // processes)
    batches = [range(begin, min(begin + AT_ONCE, len(split))) for begin in range(0, len(split), AT_ONCE)]
    hidden = int(os.environ.get("LOCAL_RANK", 0)) > 0
    with (
        tqdm(total=len(split), desc="Decoding images", unit="image", leave=False, delay=2, disable=hidden) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for part, of_part in pool.map(lambda batch: _decode(split, name, batch), batches):
                begin, end = end, end + len(part)
                if end > most:
                    return None, f"decoded they take {end / 2**30:,.2f} GiB and more, {too_large}"
                if end > len(pixels):  # The sample's images were smaller.
                    pixels, before = torch.empty(min(end + end // 8, most), **where), pixels
                    pixels[:begin].copy_(before[:begin])
                pixels[begin:end].copy_(part)
                sides += of_part
                bar.update(len(of_part))
        finally:
            pool.shutdown(cancel_futures=True)
    sides = torch.tensor(sides, dtype=torch.int32)
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


def _decode(split: Dataset, name: str, indices: range) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    items = split[indices.start : indices.stop]["image"]
    images = [read(item, f"{name} image {index}") for index, item in zip(indices, items, strict=True)]
    return torch.cat([image.flatten() for image in images]), [tuple(image.shape[:2]) for image in images]


class ResidentDataset(ImageDataset):
    """Indices of resident images, which need no data workers."""

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [{"index": torch.tensor(indices), "epoch": int(self._epoch)}]


def collate_for_device(rows: list[dict]) -> dict[str, Any]:
    """
    A batch that `DeviceAugmentation` makes a training batch of: `epoch`; `index` of the items in it, int64 (B,); and
    where the images are not resident `pixels`, uint8 (B, height, width, 3), and `labels`, int64 (B,). In evaluation
    `collate`.
    """
    if "epoch" in rows[0]:
        return rows[0]
    if "key" not in rows[0]:
        return collate(rows)
    kept = [{"pixels": row["pixel_values"], "labels": row["labels"], "index": row["key"][2]} for row in rows]
    indices = [row["index"] for row in kept]
    return {**default_collate(kept), "epoch": rows[0]["key"][1], "first": min(indices), "last": max(indices)}
