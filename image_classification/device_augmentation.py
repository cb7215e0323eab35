# SPDX-License-Identifier: Apache-2.0
"""
Training augmentation on the device that trains, a batch at a time, where CPU workers are too slow for it.

A worker reads an image, crops and resizes it, and draws the random numbers of everything else, with the very objects
and generators of `TrainTransform`: for the same key both ways crop, flip, change and erase alike. The drawn operations
travel with the batch (`DrawnBatch`), which carries them out where it is moved to: every operation once, on all images
that drew it. Of the JPEGs a share may be left to the GPU's own decoder (nvJPEG), in the thread of PyTorch's data loader
that pins memory, while the step before trains.

A training step of a small model is bound by Python and launches, and whatever else runs Python in its process, another
thread too, makes it slower. So a batch comes from a worker as one tensor in shared memory and a few NumPy arrays, and
on a GPU its augmentation is a CUDA graph: one launch in place of some hundreds.

The formulas are Pillow's, in whole numbers; affine operations interpolate by torch's bicubic (a = -0.75; Pillow: -1),
and the noise of random erasing comes from the device's generator.
"""

import contextlib
import dataclasses
import functools
import io
import math
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch._utils import _flatten_dense_tensors
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

from .arguments import DataArguments
from .augmentation import Mix, auto_augment, collate, mixes, random_erasing
from .data import decode
from .errors import InputError


AT_ONCE = 64  # Images that are decoded and resized together: their canvases lie in memory side by side.


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
class Drawn:
    """
    One image on its way to the device.

    Args:
        pixels: uint8 (3, height, width), cropped and resized; or an `Encoded`, which is not yet.
        flip: whether to flip it horizontally.
        operations: name in `OPERATIONS` and numbers, in the order in which they are applied.
        boxes: top, bottom, left, right of each erased part, and its colour (3,), normalised.
    """

    pixels: torch.Tensor | Encoded
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

    Raises:
        InputError: torchvision or timm is missing, or `args.auto_augment` has operations that exist on the CPU only.
    """

    def __init__(self, args: DataArguments, size: tuple[int, int], processor: BaseImageProcessor):
        if not is_torchvision_available():
            raise InputError(
                "Training augments images with torchvision, which is not installed: pip install torchvision."
            )
        from torchvision.transforms import v2

        self.size = size
        # Pillow's nearest neighbour is torch's exact one.
        name = "nearest-exact" if args.train_interpolation == "nearest" else args.train_interpolation
        self.interpolation = v2.InterpolationMode(name)
        self.crop = v2.RandomResizedCrop(size, tuple(args.train_crop_scale), tuple(args.train_crop_ratio))
        self.device_decode = args.device_decode
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
        """As `data.decode`, into uint8 (3, height, width), or left to the device."""
        return read(item, where, self.device_decode)

    def __call__(self, image: "torch.Tensor | Encoded") -> Drawn:
        from torchvision.transforms.v2 import functional

        # In the order, and by the calls, of `TrainTransform`.
        if isinstance(image, Encoded):
            box = self.crop.make_params([torch.empty(3, image.height, image.width, device="meta")])
            pixels = dataclasses.replace(image, box=(box["top"], box["left"], box["height"], box["width"]))
        else:
            box = self.crop.make_params([image])
            # As `resized_crop`, which is slower at this layout, the decoder's and the batch's.
            pixels = functional.crop(image, **box)[None].contiguous(memory_format=torch.channels_last)
            pixels = functional.resize(pixels, list(self.size), interpolation=self.interpolation, antialias=True)[0]
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
    As `data.decode`, into uint8 (3, height, width): JPEGs by torchvision, which is quicker than Pillow, and whatever it
    cannot read by Pillow, which has the say on what is a broken image.

    Args:
        item, where: as `data.decode` has them.
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
class DrawnBatch:
    """
    Images of `DrawTransform`, which become a training batch where they are moved to.

    Only `data` goes through shared memory: each further tensor would cost the main process a connection to the worker.

    Args:
        data: uint8: the images that are decoded (height, width, 3) one behind the other, then the files of those that
            are not. On the device, once they are: all images (B, 3, height, width).
        size: height and width of the images.
        places: for each image of the batch (B,) its place among those in `data`.
        labels: class indices (B,).
        flips: (B,).
        order: image indices (layers, B); `runs` says which of them are for which operation.
        numbers: of the operations, in the same order (layers, B, 6).
        boxes: (parts, B, 7): top, bottom, left, right and colour of erased parts; bottom and right are 0 for none.
        runs: for each layer the operations as (name, begin, end) in `order`.
        lengths: of the files, in bytes.
        crops: top, left, height and width of the crops of the files (files, 4).
        names: of the files, for errors.
        key: of the random numbers of the batch.
        augmentation: what happens on the device: the key of a `DeviceAugmentation`.
    """

    data: torch.Tensor
    size: tuple[int, int]
    places: np.ndarray
    labels: np.ndarray
    flips: np.ndarray
    order: np.ndarray
    numbers: np.ndarray
    boxes: np.ndarray
    runs: list[list[tuple[str, int, int]]]
    lengths: list[int]
    crops: np.ndarray
    names: list[str]
    key: tuple[int, ...]
    augmentation: str

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> "DrawnBatch":
        """Called by PyTorch's data loader in a thread of its own: what is to be decoded is, while a step trains."""
        if self.lengths and torch.cuda.is_available():
            return self._decoded(torch.device("cuda", torch.cuda.current_device()))
        return dataclasses.replace(self, data=self.data.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = True) -> dict[str, torch.Tensor]:
        """Called by accelerate. -> `pixel_values` (B, 3, height, width) and `labels`, augmented on `device`."""
        batch = self._decoded(torch.device(device)) if self.lengths else self
        if batch.data.is_cuda:
            # Another stream's memory, which must not have it back before this one is through with it.
            batch.data.record_stream(torch.cuda.current_stream(batch.data.device))
        return AUGMENTATIONS[self.augmentation](batch, torch.device(device))

    @torch.no_grad()
    def _decoded(self, device: torch.device) -> "DrawnBatch":
        """With all images decoded, on `device`."""
        interpolation = AUGMENTATIONS[self.augmentation].interpolation
        files = self.data[len(self.data) - sum(self.lengths) :].split(self.lengths)
        done = len(self) - len(files)
        with _own_stream(device) as finished:
            pixels = torch.empty(len(self), 3, *self.size, dtype=torch.uint8, device=device)
            whole = self.data[: done * 3 * self.size[0] * self.size[1]].view(done, *self.size, 3)
            if device.type == "cuda":
                whole = whole.pin_memory().to(device, non_blocking=True)
            pixels[:done] = whole.permute(0, 3, 1, 2)
            images = decode_files(list(files), self.names, device)
            for begin in range(0, len(images), AT_ONCE):
                part = slice(begin, begin + AT_ONCE)
                resized = crop_and_resize(images[part], self.crops[part], self.size, interpolation)
                pixels[done + begin : done + begin + len(resized)] = resized
            finished()
        return dataclasses.replace(self, data=pixels, lengths=[], crops=self.crops[:0], names=[])


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """
    Work beside the training, with what waits until it is done. On a CPU there is only one way to work.

    nvJPEG writes from a stream of its own into memory that it does not wait for: so that memory is none that training
    has just given back, and what was decoded before is no longer needed.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield stream.synchronize


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
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


class CollateDrawn:
    """Rows of `ImageDataset` -> `DrawnBatch` in training; in evaluation `collate`."""

    def __init__(self, args: DataArguments, size: tuple[int, int], classes: int, processor: BaseImageProcessor):
        self.size, self.parts = size, args.random_erasing_count if args.random_erasing > 0 else 0
        self.finish = DeviceAugmentation(args, classes, processor)

    def __call__(self, rows: list[dict]):
        if "key" not in rows[0]:
            return collate(rows)
        drawn: list[Drawn] = [row["pixel_values"] for row in rows]
        layers = max(len(one.operations) for one in drawn)
        order = np.zeros((layers, len(rows)), dtype=np.int64)
        numbers = np.zeros((layers, len(rows), 6), dtype=np.float32)
        runs: list[list[tuple[str, int, int]]] = [[] for _ in range(layers)]
        for layer in range(layers):
            by_name: dict[str, list[int]] = {}
            for index, one in enumerate(drawn):
                if layer < len(one.operations):
                    by_name.setdefault(one.operations[layer][0], []).append(index)
            end = 0
            for name, indices in sorted(by_name.items()):
                begin, end = end, end + len(indices)
                runs[layer].append((name, begin, end))
                order[layer, begin:end] = indices
                given = np.array([drawn[index].operations[layer][1] for index in indices])
                numbers[layer, begin:end, : given.shape[1]] = given
        boxes = np.zeros((self.parts, len(rows), 7), dtype=np.float32)
        for index, one in enumerate(drawn):
            for part, (*box, color) in enumerate(one.boxes):
                boxes[part, index] = [*box, *(color * 3)[:3]]
        encoded = [isinstance(one.pixels, Encoded) for one in drawn]
        files = [one.pixels for one in drawn if isinstance(one.pixels, Encoded)]
        return DrawnBatch(
            data=self._data([one.pixels for one in drawn if torch.is_tensor(one.pixels)], files),
            size=self.size,
            # Stable: the decoded images in their order, then the files in theirs.
            places=np.argsort(np.argsort(encoded, kind="stable")),
            labels=np.array([row["labels"] for row in rows], dtype=np.int64),
            flips=np.array([one.flip for one in drawn]),
            order=order,
            numbers=numbers,
            boxes=boxes,
            runs=runs,
            lengths=[len(file.content) for file in files],
            crops=np.array([file.box for file in files], dtype=np.int64).reshape(-1, 4),
            names=[file.where for file in files],
            key=rows[0]["key"],
            augmentation=self.finish.key,
        )

    def _data(self, images: list[torch.Tensor], files: list[Encoded]) -> torch.Tensor:
        pixels = len(images) * 3 * self.size[0] * self.size[1]
        count = pixels + sum(len(file.content) for file in files)
        if torch.utils.data.get_worker_info() is None:
            data = torch.empty(count, dtype=torch.uint8)
        else:
            # In shared memory from the start, as PyTorch's own collation has it: sending it is then no copy.
            storage = torch.UntypedStorage._new_shared(max(count, 1), device="cpu")
            data = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (count,), (1,))
        for place, image in zip(data[:pixels].view(len(images), *self.size, 3), images, strict=True):
            place.copy_(image.permute(1, 2, 0))
        if files:
            torch.cat([file.content for file in files], out=data[pixels:])
        return data


# Those of this process, by their keys: a batch that comes from a worker finds the one that it was made for.
AUGMENTATIONS: "weakref.WeakValueDictionary[str, DeviceAugmentation]" = weakref.WeakValueDictionary()


class DeviceAugmentation:
    """
    `DrawnBatch` -> a training batch on a device: flip, RandAugment or colour jitter, normalisation, random erasing,
    mixup and CutMix. None of it waits for the device.
    """

    def __init__(self, args: DataArguments, classes: int, processor: BaseImageProcessor):
        self.key = uuid.uuid4().hex
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        self.fill = [min(255, round(255 * x)) for x in self.mean]
        self.interpolation = args.train_interpolation
        self.noise = args.random_erasing_mode == "pixel"
        self.mix = Mix(args, classes) if mixes(args) else None
        self._graph: _Graph | None = None
        self._images = 0  # In the batch before.
        AUGMENTATIONS[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graph": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        AUGMENTATIONS[self.key] = self

    @torch.no_grad()
    def __call__(self, batch: DrawnBatch, device: torch.device) -> dict[str, torch.Tensor]:
        pixels = batch.data.to(device, non_blocking=True)
        if pixels.ndim == 1:
            pixels = pixels.view(len(batch), *batch.size, 3).permute(0, 3, 1, 2)
        again, self._images = len(batch) == self._images, len(batch)
        # The last batch of an epoch may be a smaller one: a graph is for a size that comes again.
        if device.type == "cuda" and again:
            images = self._replay(batch, pixels, device)
        else:
            layout = Layout.of(batch)
            packed = torch.from_numpy(layout.pack(batch)).to(device)
            images = self.change(pixels, packed, self._draw_noise(batch, device), layout)
        labels = torch.from_numpy(batch.labels).to(device, non_blocking=True)
        if self.mix is None:
            return {"pixel_values": images, "labels": labels}
        return self.mix.mix(images, labels, batch.key)

    def _replay(self, batch: DrawnBatch, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        graph, needed = self._graph, Layout.of(batch)
        if graph is None or not graph.layout.holds(needed):
            layout = needed.with_room() if graph is None else graph.layout.enlarged(needed)
            # Its memory first.
            self._graph = graph = None
            noise = self._draw_noise(batch, device)
            self._graph = graph = _Graph(self.change, layout, pixels, layout.pack(batch), noise)
        graph.pixels.copy_(pixels)
        graph.packed.copy_(torch.from_numpy(graph.layout.pack(batch)), non_blocking=True)
        if graph.noise is not None:
            self._draw_noise(batch, device, graph.noise)
        graph.replay()
        return graph.images.clone()

    def _draw_noise(
        self, batch: DrawnBatch, device: torch.device, into: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What is erased is filled with it, (B, 3, height, width); `None` where nothing is or its colours are given."""
        if not self.noise or len(batch.boxes) == 0:
            return None
        generator = torch.Generator(device)
        generator.manual_seed(int(np.random.SeedSequence(batch.key).generate_state(4, np.uint32)[3]))
        noise = torch.empty(len(batch), 3, *batch.size, device=device) if into is None else into
        return noise.normal_(generator=generator)

    def change(
        self, pixels: torch.Tensor, packed: torch.Tensor, noise: torch.Tensor | None, layout: "Layout"
    ) -> torch.Tensor:
        """
        All that happens to the single images.

        Args:
            pixels: uint8 (B, 3, height, width), in the order of `DrawnBatch.data`.
            packed: what was drawn, as `Layout.pack` has it.
            noise: of erased parts, or `None`.
            layout: of `packed`.

        Returns:
            fp32 (B, 3, height, width), normalised.
        """
        places, flips, boxes, operations = layout.unpack(packed)
        images = pixels.index_select(0, places)
        # And one that nobody sees, which is worked on where there is room for more images than drew an operation.
        images = torch.cat([torch.where(flips[:, None, None, None], images.flip(-1), images), images[:1]])
        for name, which, numbers in operations:
            images.index_copy_(0, which, self.apply(name, images.index_select(0, which), numbers))
        images = images[:-1].float()
        # By numbers: a tensor of them would have to be sent, and torchvision's `normalize` waits for the device.
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(255 * mean).div_(255 * std)
        return self._erase(images, boxes, noise)

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


@dataclass(frozen=True)
class Layout:
    """
    How what was drawn for a batch lies in one fp32 vector: one copy to the device in place of many.

    Args:
        images: B.
        parts: erased parts of each image.
        operations: for each layer, how many images there is room for in each operation, as (name, count).
    """

    images: int
    parts: int
    operations: tuple[tuple[tuple[str, int], ...], ...]

    @classmethod
    def of(cls, batch: DrawnBatch) -> "Layout":
        """That which has no room to spare."""
        operations = tuple(tuple((name, end - begin) for name, begin, end in runs) for runs in batch.runs)
        return cls(len(batch), len(batch.boxes), operations)

    def holds(self, other: "Layout") -> bool:
        if (self.images, self.parts) != (other.images, other.parts) or len(self.operations) < len(other.operations):
            return False
        return all(
            dict(own).get(name, 0) >= count
            for own, theirs in zip(self.operations, other.operations, strict=False)
            for name, count in theirs
        )

    def with_room(self) -> "Layout":
        """For batches like this one: the numbers of images in an operation vary, and layers draw alike."""
        most: dict[str, int] = {}
        for layer in self.operations:
            for name, count in layer:
                most[name] = max(most.get(name, 0), count)
        room = tuple((name, min(self.images, 8 * math.ceil((count + 8) / 8))) for name, count in sorted(most.items()))
        return dataclasses.replace(self, operations=(room,) * len(self.operations))

    def enlarged(self, other: "Layout") -> "Layout":
        """Holds both."""
        if (self.images, self.parts) != (other.images, other.parts):
            return other.with_room()
        if self.holds(other):
            return self
        layers = max(self.operations, other.operations, key=len)
        room = dict(self.operations[0] if self.operations else ())
        for name, count in other.with_room().operations[0]:
            room[name] = max(room.get(name, 0), count)
        return dataclasses.replace(self, operations=(tuple(sorted(room.items())),) * len(layers))

    def pack(self, batch: DrawnBatch) -> np.ndarray:
        """
        fp32: places and flips (B), boxes (parts, B, 7), then for each layer and operation image indices and numbers.
        (Indices are whole in fp32 up to 2^24.)
        """
        pieces = [batch.places, batch.flips, batch.boxes.ravel()]
        for layer, counts in enumerate(self.operations):
            runs = batch.runs[layer] if layer < len(batch.runs) else []
            given = {name: (begin, end) for name, begin, end in runs}
            for name, count in counts:
                begin, end = given.get(name, (0, 0))
                # Where there is room left: on the image that nobody sees.
                which, numbers = np.full(count, self.images), np.zeros((count, 6))
                if end > begin:
                    which[: end - begin] = batch.order[layer, begin:end]
                    numbers[: end - begin] = batch.numbers[layer, begin:end]
                pieces += [which, numbers.ravel()]
        return np.concatenate(pieces, dtype=np.float32)

    def unpack(self, packed: torch.Tensor):
        """-> places (B,), flips (B,), boxes (parts, B, 7), and (name, image indices (n,), numbers (n, 6)) in order."""
        named = [item for layer in self.operations for item in layer]
        sizes = [self.images, self.images, self.parts * self.images * 7]
        places, flips, boxes, *rest = packed.split([*sizes, *(size for _, n in named for size in (n, 6 * n))])
        operations = [(name, rest[2 * i].long(), rest[2 * i + 1].view(n, 6)) for i, (name, n) in enumerate(named)]
        return places.long(), flips.bool(), boxes.view(self.parts, self.images, 7), operations


class _Graph:
    """
    A CUDA graph of `DeviceAugmentation.change` for one layout: `replay` takes `pixels`, `packed` and `noise` as they
    are then, and leaves `images`.
    """

    def __init__(self, change, layout: Layout, pixels: torch.Tensor, packed: np.ndarray, noise: torch.Tensor | None):
        device = pixels.device
        self.layout, self.noise = layout, noise
        self.pixels = pixels.contiguous()
        self.packed = torch.from_numpy(packed).to(device)
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            change(self.pixels, self.packed, noise, layout)  # Libraries set themselves up in a first call.
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The data loader's thread works beside it.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.images = change(self.pixels, self.packed, noise, layout)
        self.replay = graph.replay


# Operations on uint8 images (n, 3, height, width), as Pillow does them; `number` is (n, 1, 1, 1).


def auto_contrast(images: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    low = images.amin((2, 3), keepdim=True).double()
    high = images.amax((2, 3), keepdim=True).double()
    scale = 255 / (high - low)
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
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=-1)
    moved = F.grid_sample(images.float(), grid, interpolation, "border", align_corners=False)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
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
# timm's names; `Increasing` and the like only say how a magnitude becomes the operation's number.
TIMM_OPERATIONS = {name: name for name in (*OPERATIONS, *MATRICES)} | {
    f"{name}{suffix}": name
    for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    for suffix in ("Increasing", "Original")
}
