# SPDX-License-Identifier: Apache-2.0
"""
Training augmentation on the device that trains, a batch at a time, where CPU workers are too slow for it.

A worker reads an image, crops and resizes it, and draws the random numbers of everything else, with the very objects
and generators of `TrainTransform`: for the same key both ways crop, flip, change and erase alike. The drawn operations
travel with the batch (`DrawnBatch`), which carries them out where it is moved to: every operation once, on all images
that drew it. Where there are kernels for it, crops are resized there, too; and of the JPEGs a share may be left to the
GPU's own decoder (nvJPEG), in the thread of PyTorch's data loader that pins memory, while the step before trains.

A training step of a small model is bound by Python and launches, and whatever else runs Python in its process, another
thread too, makes it slower. So a batch comes from a worker as one tensor, numbers and all, in memory that is shared and
pinned once (`SharedBatches`), and on a GPU a few kernels change all its images at once (`device_kernels.py`). The
formulas here are what those are held against, and what runs without CUDA or Triton.

The formulas are Pillow's, in whole numbers; affine operations interpolate by torch's bicubic (a = -0.75; Pillow: -1),
and the noise of random erasing comes from the device's generator.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import shutil
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import ExifTags, Image
from torch._utils import _flatten_dense_tensors
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

from .arguments import DataArguments
from .augmentation import Mix, auto_augment, collate, mixes, random_erasing
from .errors import InputError
from .images import decode


logger = logging.getLogger(__name__)

# A crop of up to so many times the pixels that it becomes is resized by the device, and a batch has room for so many
# times its own: crops of images of any one size are not larger on average.
LARGER_CROPS, LARGER_BATCH = 4, 2.25
MOST_LAYERS = 8  # Of operations that an image goes through, where memory is shared out.
SYSTEM_MEMORY = Path("/dev/shm")  # Where Linux has what processes share.
AT_ONCE = 64  # Images that are resized together without the kernels: their canvases lie in memory side by side.
# How a batch is mixed with itself in reverse order: the share of the image itself, and top, bottom, left and right of
# what is its partner's.
Mixing = tuple[float, tuple[int, int, int, int]]


@dataclass
class Encoded:
    """
    A JPEG that the device decodes.

    Args:
        content: the file, uint8 (bytes,).
        height, width: of the image.
        where: what an error calls it.
        box: top, left, height and width of the crop, once it is drawn.
    """

    content: torch.Tensor
    height: int
    width: int
    where: str
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass
class Cropped:
    """A crop that the device resizes: uint8 (height, width, 3)."""

    pixels: torch.Tensor


@dataclass
class Drawn:
    """
    One image on its way to the device.

    Args:
        pixels: uint8 (3, height, width), cropped and resized; or what is not yet.
        flip: whether to flip it horizontally.
        operations: name in `OPERATIONS` and numbers, in the order in which they are applied.
        boxes: top, bottom, left, right of each erased part, and its colour (3,), normalised.
    """

    pixels: torch.Tensor | Cropped | Encoded
    flip: bool
    operations: list[tuple[str, tuple[float, ...]]]
    boxes: list[tuple[int, int, int, int, list[float]]]


class DrawTransform:
    """
    uint8 image (3, height, width) -> `Drawn`: the worker's part of `TrainTransform`.

    Args:
        args: the data arguments.
        size: height and width of the model's images.
        processor: whose mean and standard deviation normalise.
        device_resize: leave it to the device to resize crops that are not much larger than what they become.

    Raises:
        InputError: torchvision or timm is missing, or `args.auto_augment` has operations that exist on the CPU only.
    """

    def __init__(
        self, args: DataArguments, size: tuple[int, int], processor: BaseImageProcessor, device_resize: bool = False
    ):
        if not is_torchvision_available():
            raise InputError(
                "Training augments images with torchvision, which is not installed: pip install torchvision."
            )
        from torchvision.transforms import v2

        self.size = size
        # Pillow's nearest neighbour is torch's exact one.
        self.mode = "nearest-exact" if args.train_interpolation == "nearest" else args.train_interpolation
        self.crop = v2.RandomResizedCrop(size, tuple(args.train_crop_scale), tuple(args.train_crop_ratio))
        self.device_decode = args.device_decode
        self.most_to_device = LARGER_CROPS * math.prod(size) if device_resize else 0
        self.flip = args.horizontal_flip
        self.policy = [
            _recorded(policy, args.auto_augment) for policy in auto_augment(args, size, processor.image_mean)
        ]
        self.jitter = None
        if args.color_jitter > 0 and args.auto_augment is None:
            self.jitter = v2.ColorJitter(*[args.color_jitter] * 3)
        self.erasing = random_erasing(args)
        for erasing in self.erasing:
            # The noise of single pixels is the device's to draw.
            erasing.per_pixel = False

    def read(self, item: dict[str, Any], where: str) -> "torch.Tensor | Encoded":
        """As `decode`, into uint8 (3, height, width), or left to the device."""
        return read(item, where, self.device_decode)

    def __call__(self, image: "torch.Tensor | Encoded") -> Drawn:
        # In the order, and by the calls, of `TrainTransform`.
        if isinstance(image, Encoded):
            box = self.crop.make_params([torch.empty(3, image.height, image.width, device="meta")])
            pixels = dataclasses.replace(image, box=(box["top"], box["left"], box["height"], box["width"]))
        else:
            box = self.crop.make_params([image])
            top, left, height, width = (box[name] for name in ("top", "left", "height", "width"))
            pixels = image[:, top : top + height, left : left + width]
            if height * width <= self.most_to_device:
                pixels = Cropped(pixels.permute(1, 2, 0).contiguous())
            else:
                # As torchvision's `resized_crop`, which is slower at this layout, the decoder's and the batch's.
                pixels = pixels[None].contiguous(memory_format=torch.channels_last)
                pixels = F.interpolate(pixels, self.size, mode=self.mode, antialias=self.mode != "nearest-exact")[0]
        flip = self.flip > 0 and not bool(torch.rand(1) >= self.flip)
        operations: list[tuple[str, tuple[float, ...]]] = []
        for policy in self.policy:
            operations = policy(operations)
        if self.jitter is not None:
            operations = self._jitter()
        boxes = _Boxes(self.size)
        for erasing in self.erasing:
            erasing(boxes)
        return Drawn(pixels, flip, [_lowered(name, *numbers, self.size) for name, numbers in operations], boxes.drawn)

    def _jitter(self) -> list[tuple[str, tuple[float, ...]]]:
        drawn = self.jitter.make_params([])
        named = [
            ("Brightness", drawn["brightness_factor"]),
            ("Contrast", drawn["contrast_factor"]),
            ("Color", drawn["saturation_factor"]),
        ]
        # The fourth is the hue, which is never changed.
        return [(named[i][0], (named[i][1],)) for i in drawn["fn_idx"].tolist() if i < 3 and named[i][1] is not None]


class _Boxes:
    """In place of an image for timm's random erasing: keeps what would be erased."""

    dtype = torch.float32

    def __init__(self, size: tuple[int, int]):
        self._size, self.drawn = (3, *size), []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, part: tuple[slice, slice, slice], color: torch.Tensor) -> None:
        _, rows, columns = part
        self.drawn.append((rows.start, rows.stop, columns.start, columns.stop, color.flatten().tolist()))


class _Mixed:
    """In place of images for timm's mixup of a whole batch: keeps what would be done with them."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, int, int, int]):
        self.shape, self.share, self.box = shape, 1.0, (0, 0, 0, 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part) -> "_Mixed":
        return self

    def __setitem__(self, part: tuple[slice, slice, slice, slice], others: "_Mixed") -> None:
        _, _, rows, columns = part
        self.box = int(rows.start), int(rows.stop), int(columns.start), int(columns.stop)

    def flip(self, axis: int) -> "_Mixed":
        return _Mixed(self.shape)

    def mul_(self, share: float) -> "_Mixed":
        self.share = share
        return self

    def add_(self, others: "_Mixed") -> "_Mixed":
        return self


def _recorded(policy, name: str):
    """timm's policy, applied to a list of operations: it appends those that it would apply to an image."""
    operations = getattr(policy, "ops", None) or [op for ops in getattr(policy, "policy", ()) for op in ops]
    missing = sorted({op.name for op in operations if op.name not in TIMM_OPERATIONS})
    if missing or not operations or type(policy).__name__ == "AugMixAugment":
        which = f"uses {', '.join(missing)}" if missing else "mixes chains of operations"
        raise InputError(
            f"`auto_augment` {name!r} {which}, which only CPU workers do. Give --augment_on workers, or a policy such "
            "as 'rand-m15-n2-mstd1.0-inc1'."
        )
    for op in operations:
        op.aug_fn = functools.partial(_record, TIMM_OPERATIONS[op.name])
    return policy


def _record(name: str, before: list, *numbers: float, **_) -> list:
    return [*before, (name, numbers)]


def _lowered(name: str, *rest) -> tuple[str, tuple[float, ...]]:
    """An operation as timm names it -> one of `OPERATIONS`: the affine ones become one, with their matrix."""
    *numbers, size = rest
    if name in MATRICES:
        return "Affine", MATRICES[name](*numbers, *size)
    return name, tuple(float(number) for number in numbers)


def read(item: dict[str, Any], where: str, device_decode: float = 0.0) -> "torch.Tensor | Encoded":
    """
    As `decode`, into uint8 (3, height, width): JPEGs by torchvision, which is quicker than Pillow, and whatever it
    cannot read by Pillow, which has the say on what is a broken image.

    Args:
        item, where: as `decode` has them.
        device_decode: the share of the JPEGs that is left to the device. Their checksum decides which, so that it is
            the same ones in every epoch and run.
    """
    content = item.get("bytes")
    try:
        from torchvision.io import decode_jpeg

        if content is None:
            with open(item["path"], "rb") as file:
                content = file.read()
        if content[:3] == b"\xff\xd8\xff":
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            chosen = zlib.crc32(content[-1024:]) < device_decode * 2**32
            if chosen and (size := _plain_size(content)) is not None:
                return Encoded(encoded, *size, where)
            image = decode_jpeg(encoded, apply_exif_orientation=True)
            if image.shape[0] in (1, 3):  # Not CMYK.
                return image.expand(3, -1, -1)
    except (ImportError, OSError, RuntimeError):  # ImportError: later versions will have no decoder.
        pass
    return torch.from_numpy(np.array(decode(item, where))).permute(2, 0, 1)


def _plain_size(content: bytes) -> tuple[int, int] | None:
    """
    Height and width of a JPEG that nvJPEG reads as Pillow does: whole, grey or coloured by the usual three, upright.
    """
    if content[-2:] != b"\xff\xd9":
        return None
    with Image.open(io.BytesIO(content)) as header:
        upright = header.getexif().get(ExifTags.Base.Orientation) in (None, 1)
        return header.size[::-1] if header.mode in ("RGB", "L") and upright else None


def resize_whole(data: torch.Tensor, sides: np.ndarray, out: torch.Tensor, interpolation: str) -> None:
    """
    Args:
        data: images one after another, uint8 (height, width, 3) each.
        sides: their heights and widths, int64 (n, 2).
        out: for the results, uint8 (n, height, width, 3).
        interpolation: bicubic, bilinear or nearest.
    """
    if kernels := kernels_on(out.device):
        kernels.resize_whole(data, sides, out, interpolation)
        return
    images = [
        part.view(*size, 3).permute(2, 0, 1)
        for part, size in zip(data.split((3 * sides.prod(1)).tolist()), sides.tolist(), strict=True)
    ]
    resize_crops(images, np.column_stack([np.zeros_like(sides), sides]), out, interpolation)


def resize_crops(images: list[torch.Tensor], crops: np.ndarray, out: torch.Tensor, interpolation: str) -> None:
    """
    Args:
        images: uint8 (3, height, width) each.
        crops: top, left, height, width of each crop, int64 (n, 4).
        out: for the results, uint8 (n, height, width, 3).
        interpolation: bicubic, bilinear or nearest.
    """
    if kernels := kernels_on(out.device):
        kernels.resize_crops(images, crops, out, interpolation)
        return
    for begin in range(0, len(images), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        resized = crop_and_resize(images[part], crops[part], tuple(out.shape[1:3]), interpolation)
        out[part] = resized.permute(0, 2, 3, 1)


@functools.cache
def kernels_on(device: torch.device):
    """The module of Triton kernels, where they run; else `None`."""
    try:
        from . import device_kernels
    except ImportError:
        return None
    if device.type == "cuda":
        fit = not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fit = device.type == "cpu" and device_kernels.INTERPRET
    return device_kernels if fit else None


def crop_and_resize(
    images: list[torch.Tensor], boxes: np.ndarray, size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """
    As torchvision's `resized_crop` with antialiasing, of images of different sizes at once.

    Both steps of a resize are matrices, so a batch takes two products, whatever the sizes: no call is for one image.

    Args:
        images: uint8 (3, height, width) each.
        boxes: top, left, height, width of each crop (n, 4).
        size: of the results.
        interpolation: bicubic, bilinear or nearest.

    Returns:
        uint8 (n, 3, *size).
    """
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    begins = np.cumsum(3 * heights * widths) - 3 * heights * widths
    device = images[0].device
    numbers = np.column_stack([begins, heights * widths, widths, boxes]).astype(np.int32)
    begin, plane, width, *box = torch.from_numpy(numbers).to(device).T[:, :, None, None, None].unbind(0)
    top, left, height_of_crop, width_of_crop = box
    _, _, high, wide = boxes.max(0).tolist()
    # Beyond a crop its last row and column, which the matrices multiply by zero.
    y = torch.arange(high, device=device, dtype=torch.int32)[:, None].minimum(height_of_crop - 1) + top
    x = torch.arange(wide, device=device, dtype=torch.int32).minimum(width_of_crop - 1) + left
    channel = torch.arange(3, device=device, dtype=torch.int32)[:, None, None]
    index = (y * width + begin + channel * plane) + x
    canvas = _flatten_dense_tensors(images).index_select(0, index.flatten()).view(index.shape).float()
    sides = torch.cat([box[2], box[3]]).flatten()
    sizes = torch.tensor([size[0]] * len(images) + [size[1]] * len(images), device=device)
    matrices = resize_matrices(sides, sizes, max(size), max(high, wide), interpolation)
    rows, columns = matrices[: len(images), None, : size[0], :high], matrices[len(images) :, None, : size[1], :wide]
    return (rows @ (canvas @ columns.mT)).round_().clamp_(0, 255).to(torch.uint8)


def resize_matrices(
    sides: torch.Tensor, sizes: torch.Tensor, largest: int, longest: int, interpolation: str
) -> torch.Tensor:
    """
    Matrices (n, largest, longest) whose first `sizes` (n,) rows resize the first `sides` (n,) of `longest` numbers, as
    Pillow does.
    """
    scale = (sides.double() / sizes)[:, None, None]
    center = (torch.arange(largest, device=sides.device) + 0.5)[:, None] * scale
    place = torch.arange(longest, device=sides.device)
    if interpolation == "nearest":
        return (place == center.floor()).float()
    x = ((place + 0.5 - center) / scale.clamp(min=1)).abs()
    if interpolation == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = torch.where(place < sides[:, None, None], weights, 0.0)
    # The rows beyond an image's size may be nowhere.
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)).float()


@dataclass
class DrawnNumbers:
    """
    What was drawn for the B images of a batch, on the way to the device.

    Args:
        labels: class indices, int64 (B,).
        places: of the images among those of the batch's `data`, int32 (B,).
        flips: int32 (B,).
        codes: of the operations, int32 (layers, B), as `CODES` has them; 0 for none.
        numbers: of the operations, fp32 (layers, B, 6).
        boxes: fp32 (parts, B, 7): top, bottom, left, right and colour of erased parts; bottom and right are 0 for none.
    """

    labels: torch.Tensor
    places: torch.Tensor
    flips: torch.Tensor
    codes: torch.Tensor
    numbers: torch.Tensor
    boxes: torch.Tensor

    @classmethod
    def split(cls, data: torch.Tensor, images: int, layers: int, parts: int) -> tuple["DrawnNumbers", torch.Tensor]:
        """Views of the first bytes of `data`, and the rest of it."""
        fields, begin = [], 0
        for kind, shape in cls._fields(images, layers, parts):
            end = begin + kind.itemsize * math.prod(shape)
            fields.append(data[begin:end].view(kind).view(shape))
            begin = end
        return cls(*fields), data[cls.length(images, layers, parts) :]

    @classmethod
    def length(cls, images: int, layers: int, parts: int) -> int:
        """Of what `split` takes, in bytes."""
        fields = cls._fields(images, layers, parts)
        # What follows begins where an allocation could.
        return 64 * math.ceil(sum(kind.itemsize * math.prod(shape) for kind, shape in fields) / 64)

    @staticmethod
    def _fields(images: int, layers: int, parts: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        # The widest first: views must be aligned.
        return [
            (torch.int64, (images,)),
            (torch.int32, (images,)),
            (torch.int32, (images,)),
            (torch.int32, (layers, images)),
            (torch.float32, (layers, images, 6)),
            (torch.float32, (parts, images, 7)),
        ]


class Place(NamedTuple):
    """Of a batch of `count` bytes in `SharedBatches`; or, where it is not `held` there, in the order of batches."""

    key: str
    number: int
    count: int
    held: bool


@dataclass
class DrawnBatch:
    """
    Images of `DrawTransform`, which become a training batch where they are moved to.

    Only `data` goes through shared memory: each further tensor would cost the main process a connection to the worker.

    Args:
        data: uint8 (bytes,): `DrawnNumbers`, the images that are resized (height, width, 3), the crops that are not,
            each (height, width, 3), then the files of those that are not decoded.
        place: in `SharedBatches`, where there are any.
        size: height and width of the images.
        counts: of images, layers of operations, and erased parts of an image.
        sides: height and width of the crops that are not resized, int64 (crops, 2).
        lengths: of the files, in bytes.
        crops: top, left, height and width of the crops of the files (files, 4).
        names: of the files, for errors.
        mixed: mixup or CutMix of the batch; `None` where it has neither, or where each pair of images has its own.
        key: of the random numbers of the batch.
        augmentation: what happens on the device: the key of a `DeviceAugmentation`.
    """

    data: torch.Tensor
    place: Place | None
    size: tuple[int, int]
    counts: tuple[int, int, int]
    sides: np.ndarray
    lengths: list[int]
    crops: np.ndarray
    names: list[str]
    mixed: Mixing | None
    key: tuple[int, ...]
    augmentation: str

    def __len__(self) -> int:
        return self.counts[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "data": None} if self.place is not None and self.place.held else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.data is None:
            self.data = SHARED[self.place.key].find(self.place)

    @property
    def _shared(self) -> "SharedBatches | None":
        return None if self.place is None else SHARED.get(self.place.key)

    def _pinned(self) -> torch.Tensor:
        """`data`, from which a GPU copies without waiting."""
        shared = self._shared
        return self.data if shared is not None and shared.pinned and self.place.held else self.data.pin_memory()

    def pin_memory(self) -> "DrawnBatch":
        """Called by PyTorch's data loader in a thread of its own: what is to be decoded is, while a step trains."""
        if self.lengths and torch.cuda.is_available():
            return self._completed(torch.device("cuda", torch.cuda.current_device()))
        return dataclasses.replace(self, data=self._pinned())

    def to(self, device: torch.device, non_blocking: bool = True) -> dict[str, torch.Tensor]:
        """Called by accelerate. -> `pixel_values` (B, 3, height, width) and `labels`, augmented on `device`."""
        device, copied, batch = torch.device(device), None, self
        if not self.data.is_cuda:
            batch = self._completed(device)
            if device.type == "cuda":
                copied = _stream(device, bool(self.lengths)).record_event()
                torch.cuda.current_stream(device).wait_event(copied)
        if (shared := self._shared) is not None:
            shared.taken(copied)
        made = AUGMENTATIONS[self.augmentation](batch, device)
        if batch.data.is_cuda:
            _keep(batch.data)
        return made

    @torch.no_grad()
    def _completed(self, device: torch.device) -> "DrawnBatch":
        """
        With all images decoded and resized, on `device`, by a stream of its own: training goes on meanwhile. What is
        decoded is done then; the rest is under way.
        """
        interpolation, area = AUGMENTATIONS[self.augmentation].interpolation, 3 * math.prod(self.size)
        # Pinned, also for nvJPEG: copying other memory to a GPU may wait for it.
        data = self._pinned() if device.type == "cuda" and self.lengths else self.data
        missing = len(self.sides) + len(self.lengths)
        resized = DrawnNumbers.length(*self.counts) + area * (len(self) - missing)
        files = len(data) - sum(self.lengths)
        with _own_stream(device, bool(self.lengths)) as finished:
            # First: see `_own_stream`.
            decoded = decode_files(list(data[files:].split(self.lengths)), self.names, device) if self.lengths else []
            # Other devices than CUDA's have no event to wait for, before the memory is written to again.
            moved = data[:files].to(device, non_blocking=device.type == "cuda")
            if missing == 0:
                return dataclasses.replace(self, data=moved)
            whole = torch.empty(resized + area * missing, dtype=torch.uint8, device=device)
            whole[:resized].copy_(moved[:resized])
            images = whole[resized:].view(-1, *self.size, 3)
            if len(self.sides):
                resize_whole(moved[resized:], self.sides, images[: len(self.sides)], interpolation)
            if self.lengths:
                resize_crops(decoded, self.crops, images[len(self.sides) :], interpolation)
                finished()
        return dataclasses.replace(self, data=whole, sides=self.sides[:0], lengths=[], crops=self.crops[:0], names=[])


@contextlib.contextmanager
def _own_stream(device: torch.device, decoding: bool) -> Iterator[Callable[[], None]]:
    """
    Work beside the training, with what waits until it is done. On a CPU there is only one way to work.

    nvJPEG writes from a stream of its own into memory that it does not wait for. So that memory must be none that work
    on the GPU still uses, though it has been given back: decoding has a stream, and by it memory, of its own, comes
    first there, and all is done in the end.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    stream = _stream(device, decoding)
    with torch.cuda.stream(stream):
        yield stream.synchronize


_being_read: collections.deque[tuple[torch.cuda.Event, torch.Tensor]] = collections.deque()


def _keep(data: torch.Tensor) -> None:
    """
    Another stream's memory, which must not have it back before this one is through with it. (With `record_stream`, the
    allocator would ask the driver about that at every allocation of the next step.)
    """
    _being_read.append((torch.cuda.current_stream(data.device).record_event(), data))
    while _being_read and _being_read[0][0].query():
        _being_read.popleft()


def let_go() -> None:
    """Of what the device may still read, once it has."""
    while _being_read:
        _being_read.popleft()[0].synchronize()


@functools.cache
def _stream(device: torch.device, decoding: bool, /) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def check_device_decode(device: torch.device) -> None:
    """
    Raises:
        InputError: there is no JPEG decoder on `device`.
    """
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format="JPEG")
    encoded = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        # On other devices than these two, torchvision would take the CPU.
        if device.type not in ("cuda", "cpu"):
            raise RuntimeError("only CUDA's nvJPEG")
        decode_jpeg([encoded], ImageReadMode.RGB, device)
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"`device_decode`: torchvision cannot decode JPEGs on {device} ({str(error).splitlines()[0]}). Leave it "
            "out: the workers decode."
        ) from error


def decode_files(files: list[torch.Tensor], names: list[str], device: torch.device) -> list[torch.Tensor]:
    """
    JPEGs, uint8 (bytes,) each, to uint8 images (3, height, width) on `device`.

    Raises:
        InputError: one of them is broken, by its name.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(files, ImageReadMode.RGB, device)
    except RuntimeError:  # All or none: which one it is, and whether it is broken, is Pillow's to say.
        items = [{"bytes": file.numpy().tobytes(), "path": None} for file in files]
        return [read(item, name).to(device) for item, name in zip(items, names, strict=True)]


class SharedBatches:
    """
    Memory for the batches of data workers, which a GPU reads as it is. Memory that is new for each batch would have to
    be cleared by the system, mapped by the main process, and copied to pinned memory by a thread of it.

    Each worker writes to its places in turn, of which it has one more than the batches that are on their way from it. A
    loader that keeps the order asks a worker for another batch when it hands over one of it, which is `workers` batches
    after the one that is overwritten then: `taken` makes sure that this has been copied.

    Args:
        workers: of the data loader.
        ahead: batches that each of them prepares ahead (`prefetch_factor`).
        length: of a batch at most, in bytes.
        device: that reads it.
    """

    def __init__(self, workers: int, ahead: int, length: int, device: torch.device):
        self.key = uuid.uuid4().hex
        self.places, self.length, self.workers = ahead + 1, length, workers
        self.memory = _shared(workers * self.places * length)
        # Batches of each worker, also in former epochs, and the process that it is.
        self.written = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.writer = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.copies: collections.deque[torch.cuda.Event | None] = collections.deque()
        self.pinned = device.type == "cuda" and _pin(self.memory)
        if self.pinned:
            weakref.finalize(self, _unpin, self.memory)
        SHARED[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": None, "pinned": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        SHARED[self.key] = self

    def next_place(self, count: int) -> Place:
        """In a worker."""
        worker = torch.utils.data.get_worker_info().id
        if worker >= self.workers or not self._is_mine(worker):
            return Place(self.key, 0, count, False)
        number = worker * self.places + int(self.written[worker]) % self.places
        self.written[worker] += 1
        return Place(self.key, number, count, count <= self.length)

    def _is_mine(self, worker: int) -> bool:
        """Two iterators of one loader have workers of the same numbers: the one that was first has the places."""
        other = int(self.writer[worker])
        if other != os.getpid():
            if other and psutil.pid_exists(other):
                return False
            self.writer[worker] = os.getpid()
        return True

    def find(self, place: Place) -> torch.Tensor:
        """Of a batch that is held: uint8 (bytes,)."""
        return self.memory[place.number * self.length :][: place.count]

    def taken(self, copied: torch.cuda.Event | None) -> None:
        """In the main process: a batch is on the device, or will be by then."""
        self.copies.append(copied)
        while len(self.copies) >= self.workers:
            if (event := self.copies.popleft()) is not None:
                event.synchronize()


# Those of this process, by their keys.
SHARED: "weakref.WeakValueDictionary[str, SharedBatches]" = weakref.WeakValueDictionary()


def _shared(count: int) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (count,), (1,))


def _pin(memory: torch.Tensor) -> bool:
    """Whether it could be."""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status != 0:
        logger.warning(
            f"{memory.nbytes / 2**30:.1f} GiB of memory for batches cannot be pinned (CUDA error {status}): each batch "
            "is copied once more. Fewer --dataloader_num_workers or smaller batches need less."
        )
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # Takes the error along, which would be raised by the next operation.
    return status == 0


def _unpin(memory: torch.Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class CollateDrawn:
    """Rows of `ImageDataset` -> `DrawnBatch` in training; in evaluation `collate`."""

    def __init__(
        self,
        args: DataArguments,
        size: tuple[int, int],
        classes: int,
        processor: BaseImageProcessor,
        device_resize: bool = False,
    ):
        self.device_resize = device_resize
        self.size, self.parts = size, args.random_erasing_count if args.random_erasing > 0 else 0
        self.finish = DeviceAugmentation(args, classes, processor)
        self.decodes = args.device_decode > 0  # Leaves files to the device.
        # The last batches that a worker handed over in memory of their own, as many as are on their way by default.
        # Whoever lets go of shared memory last frees it, and holds Python's lock for milliseconds: not to be the main
        # process.
        self.sent: collections.deque[torch.Tensor] = collections.deque(maxlen=2)
        self.shared: SharedBatches | None = None

    def share(self, images: int, workers: int, ahead: int, device: torch.device) -> bool:
        """
        From now on, batches of up to `images` images come in `SharedBatches`, unless their crops or files are larger
        than usual, or the system has no room for it. -> Whether they are in pinned memory.
        """
        pixels = images * 3 * math.prod(self.size)
        length = DrawnNumbers.length(images, MOST_LAYERS, self.parts)
        length += math.ceil(pixels * (LARGER_BATCH if self.device_resize else 1) / 64) * 64
        needed, room = length * workers * (ahead + 1), math.inf
        self.shared = None
        if SYSTEM_MEMORY.is_dir():
            room = shutil.disk_usage(SYSTEM_MEMORY).free / 2  # Evaluation has batches, too.
        try:
            if needed <= room:
                self.shared = SharedBatches(workers, ahead, length, device)
                return self.shared.pinned
        except RuntimeError:  # Another process was faster.
            pass
        logger.warning(
            f"{SYSTEM_MEMORY} has too little left for {needed / 2**30:.1f} GiB of batches, which would reach the "
            "device without another copy. Fewer --dataloader_num_workers need less (Docker: --shm-size)."
        )
        return False

    def __call__(self, rows: list[dict]):
        if "key" not in rows[0]:
            return collate(rows)
        drawn: list[Drawn] = [row["pixel_values"] for row in rows]
        crops = [one.pixels.pixels for one in drawn if isinstance(one.pixels, Cropped)]
        files = [one.pixels for one in drawn if isinstance(one.pixels, Encoded)]
        counts = len(drawn), max(len(one.operations) for one in drawn), self.parts
        head = DrawnNumbers.length(*counts)
        resized = [one.pixels for one in drawn if torch.is_tensor(one.pixels)]
        data, place = self._data(head, resized, crops, files)
        numbers, _ = DrawnNumbers.split(data[:head].zero_(), *counts)
        labels, places, flips, codes, of_operations, boxes = (field.numpy() for field in vars(numbers).values())
        labels[:] = [row["labels"] for row in rows]
        # Stable: the resized images in their order, the crops in theirs, and the files.
        kinds = [(torch.Tensor, Cropped, Encoded).index(type(one.pixels)) for one in drawn]
        places[:] = np.argsort(np.argsort(kinds, kind="stable"))
        flips[:] = [one.flip for one in drawn]
        for index, one in enumerate(drawn):
            for layer, (name, given) in enumerate(one.operations):
                codes[layer, index] = CODES[name]
                of_operations[layer, index, : len(given)] = given
            for part, (*box, color) in enumerate(one.boxes):
                boxes[part, index] = [*box, *(color * 3)[:3]]
        return DrawnBatch(
            data=data,
            place=place,
            size=self.size,
            counts=counts,
            sides=np.array([crop.shape[:2] for crop in crops], dtype=np.int64).reshape(-1, 2),
            lengths=[len(file.content) for file in files],
            crops=np.array([file.box for file in files], dtype=np.int64).reshape(-1, 4),
            names=[file.where for file in files],
            mixed=self.finish.draw_mixing(len(rows), self.size, rows[0]["key"]),
            key=rows[0]["key"],
            augmentation=self.finish.key,
        )

    def _data(self, head: int, images: list[torch.Tensor], crops: list[torch.Tensor], files: list[Encoded]):
        """`DrawnBatch.data`, with `head` bytes before the images that nothing is written to, and `DrawnBatch.place`."""
        begin = head + len(images) * 3 * self.size[0] * self.size[1]
        rest = [*(crop.flatten() for crop in crops), *(file.content for file in files)]
        count = begin + sum(len(part) for part in rest)
        working, place = torch.utils.data.get_worker_info() is not None, None
        if working and self.shared is not None:
            place = self.shared.next_place(count)
        if place is not None and place.held:
            data = self.shared.find(place)
        elif working:
            # In shared memory from the start, as PyTorch's own collation has it: sending it is then no copy.
            data = _shared(count)
            self.sent.append(data)
        else:
            data = torch.empty(count, dtype=torch.uint8)
        for pixels, image in zip(data[head:begin].view(len(images), *self.size, 3), images, strict=True):
            pixels.copy_(image.permute(1, 2, 0))
        if rest:
            torch.cat(rest, out=data[begin:])
        return data, place


# Those of this process, by their keys: a batch that comes from a worker finds the one that it was made for.
AUGMENTATIONS: "weakref.WeakValueDictionary[str, DeviceAugmentation]" = weakref.WeakValueDictionary()


class DeviceAugmentation:
    """
    `DrawnBatch` -> a training batch on a device: flip, RandAugment or colour jitter, normalisation, random erasing,
    mixup and CutMix. By the kernels, none of it waits for the device.
    """

    def __init__(self, args: DataArguments, classes: int, processor: BaseImageProcessor):
        self.key = uuid.uuid4().hex
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        self.fill = [min(255, round(255 * x)) for x in self.mean]
        self.interpolation = args.train_interpolation
        self.noise = args.random_erasing_mode == "pixel"
        self.mix = Mix(args, classes) if mixes(args) else None
        AUGMENTATIONS[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        AUGMENTATIONS[self.key] = self

    @torch.no_grad()
    def __call__(self, batch: DrawnBatch, device: torch.device) -> dict[str, torch.Tensor]:
        drawn, pixels = DrawnNumbers.split(batch.data.to(device, non_blocking=True), *batch.counts)
        pixels, labels = pixels.view(len(batch), *batch.size, 3), drawn.labels.clone()
        if kernels := kernels_on(device):
            images = self.change_by_kernels(kernels, pixels, drawn, batch)
        else:
            images = self.change(pixels, drawn, batch)
        if self.mix is None:
            return {"pixel_values": images, "labels": labels}
        if batch.mixed is None:
            return self.mix.mix(images, labels, batch.key)
        share, (top, bottom, left, right) = batch.mixed
        # As timm has it, from the part of the images that is left.
        share -= (bottom - top) * (right - left) / math.prod(batch.size)
        targets = F.one_hot(labels, self.mix.classes).float()
        pairs = targets[: len(batch) - len(batch) % 2]
        pairs.copy_(pairs * share + pairs.flip(0) * (1 - share))
        return {"pixel_values": images, "labels": targets}

    def draw_mixing(self, count: int, size: tuple[int, int], key: tuple[int, ...]) -> Mixing | None:
        """`DrawnBatch.mixed`. Single pairs of images are left to timm, on the device."""
        if self.mix is None or self.mix.mixup.mode != "batch":
            return None
        mixed = _Mixed((count - count % 2, 3, *size))
        self.mix.mix(mixed, torch.zeros(count, dtype=torch.int64), key)
        return mixed.share, mixed.box

    def _seed(self, drawn: DrawnNumbers, key: tuple[int, ...]) -> int | None:
        """
        Of the noise of erased parts; `None` where nothing is erased or its colours are given. Below 2^30: larger
        integers would be of another type, for which Triton would compile again.
        """
        if not self.noise or len(drawn.boxes) == 0:
            return None
        return int(np.random.SeedSequence(key).generate_state(4, np.uint32)[3]) >> 2

    def change_by_kernels(self, kernels, pixels: torch.Tensor, drawn: DrawnNumbers, batch: DrawnBatch) -> torch.Tensor:
        """As `change`."""
        images = kernels.arrange(pixels, drawn.places, drawn.flips)
        for codes, numbers in zip(drawn.codes, drawn.numbers, strict=True):
            images = kernels.operate(images, codes, numbers, self.fill, self.interpolation)
        return kernels.finish(images, drawn.boxes, self.mean, self.std, self._seed(drawn, batch.key), batch.mixed)

    def change(self, pixels: torch.Tensor, drawn: DrawnNumbers, batch: DrawnBatch) -> torch.Tensor:
        """
        All that happens to the images.

        Args:
            pixels: uint8 (B, height, width, 3), in the order of `DrawnBatch.data`.
            drawn: of `batch`, where the pixels are.

        Returns:
            fp32 (B, 3, height, width), normalised.
        """
        images = pixels.permute(0, 3, 1, 2).index_select(0, drawn.places)
        images = torch.where(drawn.flips[:, None, None, None] != 0, images.flip(-1), images)
        for codes, numbers in zip(drawn.codes, drawn.numbers, strict=True):
            for name, code in CODES.items():
                which = (codes == code).nonzero()[:, 0]
                if len(which):
                    images[which] = self.apply(name, images[which], numbers[which])
        images = images.float()
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(255 * mean).div_(255 * std)
        noise, seed = None, self._seed(drawn, batch.key)
        if seed is not None:
            generator = torch.Generator(images.device).manual_seed(seed)
            noise = torch.empty_like(images).normal_(generator=generator)
        images = self._erase(images, drawn.boxes, noise)
        return images if batch.mixed is None else mix(images, *batch.mixed)

    def apply(self, name: str, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """One operation on uint8 images (n, 3, height, width) with its numbers (n, 6)."""
        if name == "Affine":
            return affine(images, numbers, self.fill, self.interpolation)
        return OPERATIONS[name](images, numbers[:, 0, None, None, None])

    def _erase(self, images: torch.Tensor, boxes: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        rows = torch.arange(images.shape[2], device=images.device)[:, None]
        columns = torch.arange(images.shape[3], device=images.device)
        for part in boxes:
            top, bottom, left, right = part[:, :4, None, None].unbind(1)
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            images = torch.where(inside[:, None], part[:, 4:, None, None] if noise is None else noise, images)
        return images


def mix(images: torch.Tensor, share: float, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Images (B, 3, height, width), which are changed as `DrawnBatch.mixed` says. An odd one out stays as it is."""
    pairs = images[: len(images) - len(images) % 2]
    others = pairs.flip(0)
    pairs.mul_(share).add_(others * (1 - share))
    top, bottom, left, right = box
    pairs[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images


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
    Args:
        images: uint8 (n, 3, height, width).
        matrices: (n, 6): a, b, c, d, e, f; an output pixel with its centre at (x, y) is taken from
            (a x + b y + c, d x + e y + f) of the image.
        fill: colour of what comes from outside of the image.
        interpolation: bicubic, bilinear or nearest.
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


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # About the centre; Pillow turns counter-clockwise.
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


MATRICES: dict[str, Callable[..., tuple[float, ...]]] = {
    "ShearX": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
    "Rotate": _rotation,
}
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
# What `DrawnNumbers` and the kernels call them; 0 is for none.
CODES = {name: code for code, name in enumerate((*OPERATIONS, "Affine"), start=1)}
# timm's names; `Increasing` and the like only say how a magnitude becomes the operation's number.
TIMM_OPERATIONS = {name: name for name in (*OPERATIONS, *MATRICES)} | {
    f"{name}{suffix}": name
    for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    for suffix in ("Increasing", "Original")
}
