# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of the device's part of augmentation: a few launches for a batch, whatever was drawn for its images.

`device_augmentation.py` has the same in PyTorch: what runs without these kernels, and what they are tested against.
Operations in whole numbers are equal bit for bit. A launch is for all images; each program reads what was drawn for its
own. No argument that varies from batch to batch is compiled in.

Importing this file needs Triton. With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import os

import numpy as np
import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels of augmentation need Triton.") from error

from .device_augmentation import CODES, Mixing


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

AUTO_CONTRAST = tl.constexpr(CODES["AutoContrast"])
EQUALIZE = tl.constexpr(CODES["Equalize"])
INVERT = tl.constexpr(CODES["Invert"])
POSTERIZE = tl.constexpr(CODES["Posterize"])
SOLARIZE = tl.constexpr(CODES["Solarize"])
SOLARIZE_ADD = tl.constexpr(CODES["SolarizeAdd"])
CONTRAST = tl.constexpr(CODES["Contrast"])
BRIGHTNESS = tl.constexpr(CODES["Brightness"])
COLOR = tl.constexpr(CODES["Color"])
SHARPNESS = tl.constexpr(CODES["Sharpness"])
AFFINE = tl.constexpr(CODES["Affine"])
# As many pixels as an interpolation takes in each direction; by it the kernels know which one it is.
TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
# Of a program. With 1,024 pixels, the bicubic one would not get along with its registers.
ROWS, COLUMNS, PIXELS = 16, 32, 512
# A contracted multiply-add would change what is rounded down. Either is said, because Triton 3.9 warns of its default,
# and 3.10 will have another.
EXACT, FUSED = {"enable_fp_fusion": False}, {"enable_fp_fusion": True}


# Crop and resize: first every row of a crop, then the columns of the result. The weights of Pillow's filters, which
# widen with the scale, are computed where they are needed.


@triton.jit
def _weight(x, TAPS: tl.constexpr):
    """Of the filter at x >= 0."""
    if TAPS == 4:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    elif TAPS == 2:
        weight = tl.maximum(1 - x, 0.0)
    else:
        weight = x * 0 + 1
    return weight


@triton.jit
def _support(index, side, size, TAPS: tl.constexpr):
    """
    For each `index` of `size` numbers that `side` numbers become: the first of these that may count, how far from the
    centre it is, by how much the filter is stretched (inverse), and how many may count.
    """
    # In fp64, until only the distance is left: a crop may begin where fp32 no longer tells pixels apart.
    scale = side.to(tl.float64) / size.to(tl.float64)
    center = (index.to(tl.float64) + 0.5) * scale
    stretch = tl.maximum(scale, 1.0)
    if TAPS == 1:
        first = tl.floor(center)
        taps = tl.full((), 1, tl.int32)
    else:
        first = tl.floor(center - (TAPS // 2) * stretch)
        taps = (TAPS * stretch).to(tl.int32) + 2
    distance = (first + 0.5 - center).to(tl.float32)
    return first.to(tl.int32), distance, (1 / stretch).to(tl.float32), taps


@triton.jit
def _byte(x):
    """Rounded down."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit(do_not_specialize=["base"])
def _resize_rows(
    crops, base, between, width, STEP: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """
    Of a crop, to `width` pixels. `crops` (n, 8) as `_resize` has it, with images from `base` on whose pixels are `STEP`
    bytes apart; `between` fp32 (rows of all, 3, width).
    """
    entry = crops + tl.program_id(0) * 8
    high, wide = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    begin_row = tl.program_id(1) * ROWS
    if begin_row < high:
        source = base + tl.load(entry)
        plane, pitch = tl.load(entry + 1), tl.load(entry + 2)
        top, left = tl.load(entry + 3), tl.load(entry + 4)
        row = begin_row + tl.arange(0, ROWS)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        first, distance, inverse, taps = _support(tl.minimum(column, width - 1), wide, width, TAPS)
        line = source + (tl.minimum(row, high - 1) + top) * pitch + left * STEP
        total = tl.zeros((COLUMNS,), tl.float32)
        red = tl.zeros((ROWS, COLUMNS), tl.float32)
        green = tl.zeros((ROWS, COLUMNS), tl.float32)
        blue = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tap in range(taps):
            place = first + tap
            weight = _weight(tl.abs(distance + tap) * inverse, TAPS)
            weight = tl.where((place >= 0) & (place < wide), weight, 0.0)
            pointer = line[:, None] + (tl.minimum(tl.maximum(place, 0), wide - 1) * STEP)[None, :]
            red += weight[None, :] * tl.load(pointer).to(tl.float32)
            green += weight[None, :] * tl.load(pointer + plane).to(tl.float32)
            blue += weight[None, :] * tl.load(pointer + 2 * plane).to(tl.float32)
            total += weight
        target = between + (tl.load(entry + 7) + row[:, None]) * 3 * width + column[None, :]
        mask = (row < high)[:, None] & (column < width)[None, :]
        tl.store(target, red / total[None, :], mask)
        tl.store(target + width, green / total[None, :], mask)
        tl.store(target + 2 * width, blue / total[None, :], mask)


@triton.jit(do_not_specialize=["out"])
def _resize_columns(crops, between, out, height, width, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """From `between` to uint8 (n, height, width, 3)."""
    image = tl.program_id(0)
    entry = crops + image * 8
    high = tl.load(entry + 5).to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < height)[:, None] & (column < width)[None, :]
    first, distance, inverse, taps = _support(tl.minimum(row, height - 1), high, height, TAPS)
    source = between + tl.load(entry + 7) * 3 * width + tl.minimum(column, width - 1)
    total = tl.zeros((ROWS,), tl.float32)
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in range(taps):
        place = first + tap
        weight = _weight(tl.abs(distance + tap) * inverse, TAPS)
        weight = tl.where((place >= 0) & (place < high), weight, 0.0)
        pointer = source[None, :] + (tl.minimum(tl.maximum(place, 0), high - 1) * 3 * width)[:, None]
        red += weight[:, None] * tl.load(pointer)
        green += weight[:, None] * tl.load(pointer + width)
        blue += weight[:, None] * tl.load(pointer + 2 * width)
        total += weight
    target = out + (image.to(tl.int64) * height * width + row[:, None] * width + column[None, :]) * 3
    tl.store(target, _byte(red / total[:, None] + 0.5), mask)
    tl.store(target + 1, _byte(green / total[:, None] + 0.5), mask)
    tl.store(target + 2, _byte(blue / total[:, None] + 0.5), mask)


# What was drawn. Images are planes (B, 3, height, width) from here on, uint8, in the order of the batch.


@triton.jit(do_not_specialize=["pixels", "places", "flips"])
def _arrange(pixels, places, flips, out, height, width, PIXELS: tl.constexpr):
    """From (B, height, width, 3)."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    area = height * width
    mask = pixel < area
    flipped = pixel + width - 1 - 2 * (pixel % width)
    source = pixels + tl.load(places + image).to(tl.int64) * 3 * area
    source += 3 * tl.where(tl.load(flips + image) != 0, flipped, pixel)
    target = out + image.to(tl.int64) * 3 * area + pixel
    for channel in tl.static_range(3):
        tl.store(target + channel * area, tl.load(source + channel, mask), mask)


@triton.jit
def _blend(other, value, factor):
    """From `other` (at factor 0) to `value` (at 1) and beyond."""
    return _byte(other + factor * (value - other))


@triton.jit
def _gray(red, green, blue):
    return (red.to(tl.int32) * 19595 + green.to(tl.int32) * 38470 + blue.to(tl.int32) * 7471 + 0x8000) >> 16


@triton.jit(do_not_specialize=["codes", "numbers"])
def _make_tables(images, codes, numbers, tables, area, PIXELS: tl.constexpr):
    """What becomes of each of the 256 values, for one channel of one image, where its operation goes by values."""
    image, channel = tl.program_id(0), tl.program_id(1)
    code, number = tl.load(codes + image), tl.load(numbers + 6 * image)
    value = tl.arange(0, 256)
    target = tables + (image * 3 + channel) * 256 + value
    source = images + image.to(tl.int64) * 3 * area
    if (code == AUTO_CONTRAST) | (code == EQUALIZE):
        counts = tl.zeros((256,), tl.int32)
        for begin in range(0, area, PIXELS):
            pixel = begin + tl.arange(0, PIXELS)
            found = tl.load(source + channel * area + pixel, pixel < area, other=0)
            counts += tl.histogram(found.to(tl.int32), 256)
        # What the last round counted beyond the image.
        counts -= tl.where(value == 0, tl.cdiv(area, PIXELS) * PIXELS - area, 0)
        high = tl.max(tl.where(counts > 0, value, 0), 0)
        if code == AUTO_CONTRAST:
            low = tl.min(tl.where(counts > 0, value, 255), 0)
            scale = 255 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = value.to(tl.float64) * scale - low.to(tl.float64) * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            table = tl.where(high > low, stretched, value)
        else:
            # All but the pixels of the largest value that occurs.
            step = (area - tl.sum(tl.where(value == high, counts, 0), 0)) // 255
            below = tl.cumsum(counts, 0) - counts
            table = tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255)
            table = tl.where(step > 0, table, value)
        tl.store(target, table.to(tl.uint8))
    elif code == CONTRAST:
        total = tl.zeros((), tl.int64)
        for begin in range(0, area, PIXELS):
            pixel = begin + tl.arange(0, PIXELS)
            mask = pixel < area
            red = tl.load(source + pixel, mask, other=0)
            green = tl.load(source + area + pixel, mask, other=0)
            blue = tl.load(source + 2 * area + pixel, mask, other=0)
            total += tl.sum(_gray(red, green, blue), 0)
        mean = tl.floor(total.to(tl.float64) / area.to(tl.float64) + 0.5).to(tl.float32)
        tl.store(target, _blend(mean, value.to(tl.float32), number))
    elif code == BRIGHTNESS:
        tl.store(target, _byte(number * value.to(tl.float32)))
    elif code == INVERT:
        tl.store(target, (255 - value).to(tl.uint8))
    elif code == POSTERIZE:
        bits = tl.minimum(tl.maximum(number, 0.0), 8.0).to(tl.int32)
        tl.store(target, (value & (0xFF00 >> bits)).to(tl.uint8))
    elif code == SOLARIZE:
        tl.store(target, tl.where(value.to(tl.float32) < number, value, 255 - value).to(tl.uint8))
    elif code == SOLARIZE_ADD:
        added = tl.minimum(value.to(tl.float32) + number, 255.0).to(tl.int32)
        tl.store(target, tl.where(value < 128, added, value).to(tl.uint8))


@triton.jit
def _pixel(plane, row, column, height, width):
    """Beyond the border, the one at it."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    return tl.load(plane + row * width + tl.minimum(tl.maximum(column, 0), width - 1)).to(tl.float32)


@triton.jit
def _linear(first, second, t):
    return first + t * (second - first)


@triton.jit
def _cubic(first, second, third, fourth, t):
    """
    At t from `second` to `third`; torch's cubics (a = -0.75). By differences, for numbers that are equal come out as
    they are, and the result is rounded down.
    """
    change = (-0.75 * t * (1 - t) * (1 - t)) * (first - second)
    change += (((-1.25 * t + 1.5) * t + 0.75) * t) * (third - second)
    return second + (change + (-0.75 * t * t * (1 - t)) * (fourth - second))


@triton.jit
def _linear_row(plane, row, column, t, height, width):
    first = _pixel(plane, row, column, height, width)
    return _linear(first, _pixel(plane, row, column + 1, height, width), t)


@triton.jit
def _cubic_row(plane, row, column, t, height, width):
    first, second = _pixel(plane, row, column - 1, height, width), _pixel(plane, row, column, height, width)
    third, fourth = _pixel(plane, row, column + 1, height, width), _pixel(plane, row, column + 2, height, width)
    return _cubic(first, second, third, fourth, t)


@triton.jit
def _interpolate(plane, y, x, height, width, TAPS: tl.constexpr):
    """An image's plane at y and x, with the centres of pixels at halves."""
    if TAPS == 1:
        value = _pixel(plane, tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32), height, width)
    else:
        top, left = tl.floor(y - 0.5), tl.floor(x - 0.5)
        of_y, of_x = y - 0.5 - top, x - 0.5 - left
        row, column = top.to(tl.int32), left.to(tl.int32)
        if TAPS == 2:
            first = _linear_row(plane, row, column, of_x, height, width)
            value = _linear(first, _linear_row(plane, row + 1, column, of_x, height, width), of_y)
        else:
            first = _cubic_row(plane, row - 1, column, of_x, height, width)
            second = _cubic_row(plane, row, column, of_x, height, width)
            third = _cubic_row(plane, row + 1, column, of_x, height, width)
            fourth = _cubic_row(plane, row + 2, column, of_x, height, width)
            value = _cubic(first, second, third, fourth, of_y)
    return value


@triton.jit(do_not_specialize=["codes", "numbers"])
def _operate(
    images, codes, numbers, tables, out, height, width, red, green, blue, TAPS: tl.constexpr, PIXELS: tl.constexpr
):
    """One operation of each image. `red`, `green`, `blue`: what comes from outside of it."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    area = height * width
    mask = pixel < area
    source = images + image.to(tl.int64) * 3 * area
    target = out + image.to(tl.int64) * 3 * area + pixel
    code = tl.load(codes + image)
    numbers += 6 * image
    number = tl.load(numbers)
    row, column = pixel // width, pixel % width
    if code == AFFINE:
        x, y = column.to(tl.float32) + 0.5, row.to(tl.float32) + 0.5
        from_x = number * x + tl.load(numbers + 1) * y + tl.load(numbers + 2)
        from_y = tl.load(numbers + 3) * x + tl.load(numbers + 4) * y + tl.load(numbers + 5)
        inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        for channel in tl.static_range(3):
            value = _interpolate(source + channel * area, from_y, from_x, height, width, TAPS)
            outside = red if channel == 0 else green if channel == 1 else blue
            tl.store(target + channel * area, _byte(tl.where(inside, value, outside)), mask)
    elif code == SHARPNESS:
        inner = mask & (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
        for channel in tl.static_range(3):
            center = source + channel * area + pixel
            value = tl.load(center, mask, other=0).to(tl.int32)
            total = 4 * value
            for i in tl.static_range(-1, 2):
                for j in tl.static_range(-1, 2):
                    total += tl.load(center + i * width + j, inner, other=0).to(tl.int32)
            # Rounded: of 13 there is no half. The border stays.
            smooth = tl.where(inner, (2 * total + 13) // 26, value)
            tl.store(target + channel * area, _blend(smooth.to(tl.float32), value.to(tl.float32), number), mask)
    elif code == COLOR:
        first = tl.load(source + pixel, mask, other=0)
        second = tl.load(source + area + pixel, mask, other=0)
        third = tl.load(source + 2 * area + pixel, mask, other=0)
        gray = _gray(first, second, third).to(tl.float32)
        tl.store(target, _blend(gray, first.to(tl.float32), number), mask)
        tl.store(target + area, _blend(gray, second.to(tl.float32), number), mask)
        tl.store(target + 2 * area, _blend(gray, third.to(tl.float32), number), mask)
    elif code == 0:
        for channel in tl.static_range(3):
            tl.store(target + channel * area, tl.load(source + channel * area + pixel, mask), mask)
    else:
        for channel in tl.static_range(3):
            value = tl.load(source + channel * area + pixel, mask, other=0).to(tl.int32)
            table = tables + (image * 3 + channel) * 256
            tl.store(target + channel * area, tl.load(table + value), mask)


@triton.jit
def _finished(
    images, boxes, image, begin, batch, parts, seed, height, width, mean, inverse, CHANNEL: tl.constexpr,
    NOISE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One channel of some pixels of an image, normalised, with the erased parts."""
    pixel = begin + tl.arange(0, PIXELS)
    area = height * width
    row, column = pixel // width, pixel % width
    value = tl.load(images + (image.to(tl.int64) * 3 + CHANNEL) * area + pixel, pixel < area, other=0).to(tl.float32)
    value = (value - mean) * inverse
    for part in range(parts):
        box = boxes + (part * batch + image) * 7
        top, bottom = tl.load(box), tl.load(box + 1)
        # Noise is only drawn where there may be some.
        if (bottom * width > begin) & (top * width < begin + PIXELS):
            inside = (row >= top) & (row < bottom) & (column >= tl.load(box + 2)) & (column < tl.load(box + 3))
            if NOISE:
                value = tl.where(inside, tl.randn(seed + image, CHANNEL * area + pixel), value)
            else:
                value = tl.where(inside, tl.load(box + 4 + CHANNEL), value)
    return value


@triton.jit(do_not_specialize=["boxes", "batch", "parts", "seed", "top", "bottom", "left", "right"])
def _finish(
    images, boxes, out, batch, parts, seed, height, width, share, rest, top, bottom, left, right,
    red_mean, green_mean, blue_mean, red_inverse, green_inverse, blue_inverse,
    NOISE: tl.constexpr, MIX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    begin = tl.program_id(1) * PIXELS
    pixel = begin + tl.arange(0, PIXELS)
    area = height * width
    row, column = pixel // width, pixel % width
    for channel in tl.static_range(3):
        mean = red_mean if channel == 0 else green_mean if channel == 1 else blue_mean
        inverse = red_inverse if channel == 0 else green_inverse if channel == 1 else blue_inverse
        value = _finished(
            images, boxes, image, begin, batch, parts, seed, height, width, mean, inverse, channel, NOISE, PIXELS
        )
        if MIX:
            # The last image of an odd number has no partner.
            even = batch - batch % 2
            if image < even:
                other = _finished(
                    images, boxes, even - 1 - image, begin, batch, parts, seed, height, width, mean, inverse,
                    channel, NOISE, PIXELS,
                )  # fmt: skip
                pasted = (row >= top) & (row < bottom) & (column >= left) & (column < right)
                value = tl.where(pasted, other, value * share + other * rest)
        tl.store(out + (image.to(tl.int64) * 3 + channel) * area + pixel, value, pixel < area)


def resize_crops(images: list[torch.Tensor], crops, out: torch.Tensor, interpolation: str) -> None:
    """
    `device_augmentation.crop_and_resize` into `out`, to within a rounding. Nothing waits for the device: the images
    must outlive the work.

    Args:
        images: uint8 (3, height, width) each.
        crops: top, left, height, width of each crop, int64 (n, 4) of NumPy.
        out: uint8 (n, height, width, 3), contiguous.
        interpolation: bicubic, bilinear or nearest.
    """
    images = [image.contiguous() for image in images]
    base = images[0]
    table = np.empty((len(images), 8), dtype=np.int64)
    table[:, :3] = [(image.data_ptr() - base.data_ptr(), image[0].numel(), image.shape[2]) for image in images]
    table[:, 3:7] = crops
    _resize(base, 1, table, out, interpolation)


def resize_whole(data: torch.Tensor, sides, out: torch.Tensor, interpolation: str) -> None:
    """`device_augmentation.resize_whole`, to within a rounding. Nothing waits for the device."""
    table = np.zeros((len(sides), 8), dtype=np.int64)
    lengths = 3 * sides.prod(1)
    table[:, 0] = lengths.cumsum() - lengths
    table[:, 1], table[:, 2] = 1, 3 * sides[:, 1]
    table[:, 5:7] = sides
    _resize(data, 3, table, out, interpolation)


def _resize(base: torch.Tensor, step: int, table, out: torch.Tensor, interpolation: str) -> None:
    """
    Args:
        base, step: where the images begin, and how many bytes are between two pixels of a row.
        table: int64 (n, 8) of NumPy: from the base to the image, from one colour to the next and from one row to the
            next, in bytes; top, left, height and width of the crop. The last column is written here.
    """
    size, device = out.shape[1:3], out.device
    # Behind the rows of the images before.
    ends = table[:, 5].cumsum()
    table[:, 7] = ends - table[:, 5]
    entries = torch.empty(table.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    entries.numpy()[:] = table
    entries = entries.to(device, non_blocking=True)
    between = torch.empty(int(ends[-1]), 3, size[1], device=device)
    columns, taps = triton.cdiv(size[1], COLUMNS), TAPS[interpolation]
    with torch.cuda.device_of(out):
        grid = (len(table), triton.cdiv(int(table[:, 5].max()), ROWS), columns)
        _resize_rows[grid](entries, base, between, size[1], step, taps, ROWS, COLUMNS, **FUSED)
        grid = (len(table), triton.cdiv(size[0], ROWS), columns)
        _resize_columns[grid](entries, between, out, *size, taps, ROWS, COLUMNS, **FUSED)


def arrange(pixels: torch.Tensor, places: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, height, width, 3) -> (B, 3, height, width), in the order of `places` (B,) and flipped."""
    count, height, width, _ = pixels.shape
    out = pixels.new_empty(count, 3, height, width)
    with torch.cuda.device_of(out):
        _arrange[_grid(out)](pixels, places, flips, out, height, width, PIXELS, **EXACT)
    return out


def operate(
    images: torch.Tensor, codes: torch.Tensor, numbers: torch.Tensor, fill: list[int], interpolation: str
) -> torch.Tensor:
    """
    One operation of each image.

    Args:
        images: uint8 (B, 3, height, width).
        codes: int32 (B,), of `CODES`; 0 for none.
        numbers: of the operations, fp32 (B, 6).
        fill, interpolation: of affine ones.
    """
    count, _, height, width = images.shape
    out = torch.empty_like(images)
    tables = images.new_empty(count, 3, 256)
    with torch.cuda.device_of(out):
        _make_tables[(count, 3)](images, codes, numbers, tables, height * width, 8 * PIXELS, num_warps=8, **EXACT)
        _operate[_grid(out)](
            images, codes, numbers, tables, out, height, width, *map(float, fill), TAPS[interpolation], PIXELS, **EXACT
        )
    return out


def finish(
    images: torch.Tensor,
    boxes: torch.Tensor,
    mean: list[float],
    std: list[float],
    seed: int | None = None,
    mixed: Mixing | None = None,
) -> torch.Tensor:
    """
    Normalisation, random erasing, and mixup or CutMix of the batch with itself in reverse order.

    Args:
        images: uint8 (B, 3, height, width).
        boxes: erased parts, fp32 (parts, B, 7), as `DrawnBatch` has them.
        mean, std: that normalise, of colours from 0 to 1.
        seed: of noise in place of the boxes' colours.
        mixed: as `DrawnBatch` has it.

    Returns:
        fp32 (B, 3, height, width).
    """
    count, _, height, width = images.shape
    out = torch.empty(images.shape, device=images.device)
    share, pasted = (1.0, (0, 0, 0, 0)) if mixed is None else mixed
    with torch.cuda.device_of(out):
        _finish[_grid(out)](
            images, boxes, out, count, len(boxes), seed or 0, height, width, share, 1 - share, *pasted,
            *(255 * x for x in mean), *(1 / (255 * x) for x in std), seed is not None, mixed is not None, PIXELS,
            **EXACT,
        )  # fmt: skip
    return out


def _grid(images: torch.Tensor) -> tuple[int, int]:
    return len(images), triton.cdiv(images.shape[2] * images.shape[3], PIXELS)
