# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of augmentation: a few launches for a batch, whatever was drawn for its images.

`augmentation.py` has the same in PyTorch: what runs without these kernels, and what they are tested against.
Operations in whole numbers are equal bit for bit. A launch is for all images; each program reads what was drawn for its
own from the batch's rows of numbers (`draws.py`), fp32 (B, `words`). Nothing that varies from batch to batch is
compiled in, or known to the host, so that a CUDA graph may hold the launches.

Importing this file needs Triton. With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import os

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels of augmentation need Triton.") from error

from .draws import BOX, CODES, FLIP, MIX, SEED, WORDS


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

BOX, FLIP, SEED, MIX, WORDS = map(tl.constexpr, (BOX, FLIP, SEED, MIX, WORDS))
AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, *_codes = map(tl.constexpr, CODES.values())
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, AFFINE = _codes
# As many pixels as an interpolation takes in each direction; by it the kernels know which one it is.
TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
# Of a program. With 1,024 pixels, the bicubic one would not get along with its registers.
ROWS, COLUMNS, PIXELS = 16, 32, 512
# Of what lies between the two steps of a resize, in bytes. A batch that needs more takes several launches.
BETWEEN = 2**29
# Whose row says how an image is mixed.
MODES = {None: 0, "batch": 1, "pair": 2, "elem": 3}
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


@triton.jit(do_not_specialize=["begin"])
def _resize_rows(
    pixels, offsets, sides, items, drawn, between, begin, words, tallest, width, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the crops of the images from `begin` on, to `width` pixels: `between` is fp32 (images, tallest, 3, width)."""
    image = begin + tl.program_id(0)
    box = drawn + image * words + BOX
    high, wide = tl.load(box + 2).to(tl.int32), tl.load(box + 3).to(tl.int32)
    begin_row = tl.program_id(1) * ROWS
    if begin_row < high:
        item = tl.load(items + image)
        pitch = tl.load(sides + 2 * item + 1).to(tl.int64) * 3
        top, left = tl.load(box).to(tl.int32), tl.load(box + 1).to(tl.int32)
        row = begin_row + tl.arange(0, ROWS)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        first, distance, inverse, taps = _support(tl.minimum(column, width - 1), wide, width, TAPS)
        line = pixels + tl.load(offsets + item) + (tl.minimum(row, high - 1) + top) * pitch + left * 3
        total = tl.zeros((COLUMNS,), tl.float32)
        red = tl.zeros((ROWS, COLUMNS), tl.float32)
        green = tl.zeros((ROWS, COLUMNS), tl.float32)
        blue = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tap in range(taps):
            place = first + tap
            weight = _weight(tl.abs(distance + tap) * inverse, TAPS)
            weight = tl.where((place >= 0) & (place < wide), weight, 0.0)
            pointer = line[:, None] + (tl.minimum(tl.maximum(place, 0), wide - 1) * 3)[None, :]
            red += weight[None, :] * tl.load(pointer).to(tl.float32)
            green += weight[None, :] * tl.load(pointer + 1).to(tl.float32)
            blue += weight[None, :] * tl.load(pointer + 2).to(tl.float32)
            total += weight
        target = between + (tl.program_id(0) * tallest + row[:, None]) * 3 * width + column[None, :]
        mask = (row < high)[:, None] & (column < width)[None, :]
        tl.store(target, red / total[None, :], mask)
        tl.store(target + width, green / total[None, :], mask)
        tl.store(target + 2 * width, blue / total[None, :], mask)


@triton.jit(do_not_specialize=["begin"])
def _resize_columns(
    between, drawn, out, begin, words, tallest, height, width, TAPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """From `between` to planes, flipped."""
    image = begin + tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < height)[:, None] & (column < width)[None, :]
    high = tl.load(drawn + image * words + BOX + 2).to(tl.int32)
    first, distance, inverse, taps = _support(tl.minimum(row, height - 1), high, height, TAPS)
    source = between + tl.program_id(0) * tallest * 3 * width + tl.minimum(column, width - 1)
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
    area = height * width
    column = tl.where(tl.load(drawn + image * words + FLIP) != 0, width - 1 - column, column)
    target = out + image.to(tl.int64) * 3 * area + row[:, None] * width + column[None, :]
    tl.store(target, _byte(red / total[:, None] + 0.5), mask)
    tl.store(target + area, _byte(green / total[:, None] + 0.5), mask)
    tl.store(target + 2 * area, _byte(blue / total[:, None] + 0.5), mask)


# Images are planes (B, 3, height, width) from here on, uint8.


@triton.jit
def _arrange(pixels, drawn, out, words, height, width, PIXELS: tl.constexpr):
    """From (B, height, width, 3), flipped."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    area = height * width
    mask = pixel < area
    flipped = pixel + width - 1 - 2 * (pixel % width)
    source = pixels + image.to(tl.int64) * 3 * area
    source += 3 * tl.where(tl.load(drawn + image * words + FLIP) != 0, flipped, pixel)
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


@triton.jit(do_not_specialize=["layer"])
def _make_tables(images, drawn, tables, words, layer, area, PIXELS: tl.constexpr):
    """What becomes of each of the 256 values, for one channel of one image, where its operation goes by values."""
    image, channel = tl.program_id(0), tl.program_id(1)
    drawn += image * words + layer
    code, number = tl.load(drawn).to(tl.int32), tl.load(drawn + 1)
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


@triton.jit(do_not_specialize=["layer"])
def _operate(
    images, drawn, tables, out, words, layer, height, width, red, green, blue, TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """One operation of each image. `red`, `green`, `blue`: what comes from outside of it."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    area = height * width
    mask = pixel < area
    source = images + image.to(tl.int64) * 3 * area
    target = out + image.to(tl.int64) * 3 * area + pixel
    numbers = drawn + image * words + layer + 1
    code, number = tl.load(numbers - 1).to(tl.int32), tl.load(numbers)
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
    images, drawn, image, begin, words, first_part, parts, height, width, mean, inverse, CHANNEL: tl.constexpr,
    NOISE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One channel of some pixels of an image, normalised, with the erased parts."""
    pixel = begin + tl.arange(0, PIXELS)
    area = height * width
    row, column = pixel // width, pixel % width
    value = tl.load(images + (image.to(tl.int64) * 3 + CHANNEL) * area + pixel, pixel < area, other=0).to(tl.float32)
    value = (value - mean) * inverse
    drawn += image * words
    for part in range(parts):
        box = drawn + first_part + part * WORDS
        top, bottom = tl.load(box), tl.load(box + 1)
        # Noise is only drawn where there may be some.
        if (bottom * width > begin) & (top * width < begin + PIXELS):
            inside = (row >= top) & (row < bottom) & (column >= tl.load(box + 2)) & (column < tl.load(box + 3))
            if NOISE:
                seed = tl.load(drawn + SEED).to(tl.int32)
                value = tl.where(inside, tl.randn(seed, CHANNEL * area + pixel), value)
            else:
                value = tl.where(inside, tl.load(box + 4 + CHANNEL), value)
    return value


@triton.jit(do_not_specialize=["batch", "first_part", "parts"])
def _finish(
    images, drawn, out, batch, words, first_part, parts, height, width,
    red_mean, green_mean, blue_mean, red_inverse, green_inverse, blue_inverse,
    NOISE: tl.constexpr, MODE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    begin = tl.program_id(1) * PIXELS
    pixel = begin + tl.arange(0, PIXELS)
    area = height * width
    row, column = pixel // width, pixel % width
    # The last image of an odd number has no partner.
    partner = batch - batch % 2 - 1 - image
    partner = tl.where(partner < 0, image, partner)
    mix = drawn + MIX
    if MODE == 2:
        mix += tl.minimum(image, partner) * words
    elif MODE == 3:
        mix += image * words
    for channel in tl.static_range(3):
        mean = red_mean if channel == 0 else green_mean if channel == 1 else blue_mean
        inverse = red_inverse if channel == 0 else green_inverse if channel == 1 else blue_inverse
        value = _finished(
            images, drawn, image, begin, words, first_part, parts, height, width, mean, inverse, channel, NOISE, PIXELS
        )
        if MODE != 0:
            share, top, bottom = tl.load(mix), tl.load(mix + 1), tl.load(mix + 2)
            if (partner != image) & ((share < 1) | (bottom > top)):
                other = _finished(
                    images, drawn, partner, begin, words, first_part, parts, height, width, mean, inverse, channel,
                    NOISE, PIXELS,
                )  # fmt: skip
                pasted = (row >= top) & (row < bottom) & (column >= tl.load(mix + 3)) & (column < tl.load(mix + 4))
                value = tl.where(pasted, other, value * share + other * (1 - share))
        tl.store(out + (image.to(tl.int64) * 3 + channel) * area + pixel, value, pixel < area)


def crop_and_resize(images, items: torch.Tensor, drawn: torch.Tensor, size: tuple[int, int], interpolation: str):
    """
    Resident images, cropped, resized to `size` (height and width) and flipped as was drawn; to within a rounding as
    torchvision does it.

    Args:
        images: `resident.ResidentImages`.
        items: which ones, int64 (B,).
        drawn: fp32 (B, words).
        interpolation: bicubic, bilinear or nearest.

    Returns:
        uint8 (B, 3, height, width).
    """
    (height, width), (count, words), tallest, taps = size, drawn.shape, images.tallest, TAPS[interpolation]
    out = torch.empty(count, 3, height, width, dtype=torch.uint8, device=drawn.device)
    most = max(1, BETWEEN // (tallest * 3 * width * 4))
    between = torch.empty(min(most, count), tallest, 3, width, device=drawn.device)
    columns = triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(out):
        for begin in range(0, count, most):
            some = min(most, count - begin)
            _resize_rows[(some, triton.cdiv(tallest, ROWS), columns)](
                images.pixels, images.offsets, images.sides, items, drawn, between, begin, words, tallest, width, taps,
                ROWS, COLUMNS, **FUSED,
            )  # fmt: skip
            _resize_columns[(some, triton.cdiv(height, ROWS), columns)](
                between, drawn, out, begin, words, tallest, height, width, taps, ROWS, COLUMNS, **FUSED
            )
    return out


def arrange(pixels: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """uint8 (B, height, width, 3) -> (B, 3, height, width), flipped as was drawn."""
    count, height, width, _ = pixels.shape
    out = pixels.new_empty(count, 3, height, width)
    with torch.cuda.device_of(out):
        _arrange[_grid(out)](pixels, drawn, out, drawn.shape[1], height, width, PIXELS, **EXACT)
    return out


def operate(images: torch.Tensor, drawn: torch.Tensor, layer: int, fill: list[int], interpolation: str) -> torch.Tensor:
    """
    One operation of each image, uint8 (B, 3, height, width). In what was drawn, fp32 (B, words), it begins at `layer`:
    its code, 0 for none, and its numbers. `fill` and `interpolation` are of affine ones.
    """
    count, _, height, width = images.shape
    out, words = torch.empty_like(images), drawn.shape[1]
    tables = images.new_empty(count, 3, 256)
    with torch.cuda.device_of(out):
        _make_tables[(count, 3)](images, drawn, tables, words, layer, height * width, 8 * PIXELS, num_warps=8, **EXACT)
        _operate[_grid(out)](
            images, drawn, tables, out, words, layer, height, width, *map(float, fill), TAPS[interpolation], PIXELS,
            **EXACT,
        )  # fmt: skip
    return out


def finish(
    images: torch.Tensor, drawn: torch.Tensor, first_part: int, parts: int, mean: list[float], std: list[float],
    noise: bool = False, mode: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    Normalisation, random erasing, and mixup or CutMix of the batch with itself in reverse order.

    Args:
        images: uint8 (B, 3, height, width).
        drawn: fp32 (B, words).
        first_part, parts: where the parts to erase begin in them, and how many there are.
        mean, std: that normalise, of colours from 0 to 1.
        noise: in place of the parts' colours.
        mode: batch, pair or elem; `None`: nothing is mixed.

    Returns:
        fp32 (B, 3, height, width).
    """
    count, _, height, width = images.shape
    out = torch.empty(images.shape, device=images.device)
    with torch.cuda.device_of(out):
        _finish[_grid(out)](
            images, drawn, out, count, drawn.shape[1], first_part, parts, height, width,
            *(255 * x for x in mean), *(1 / (255 * x) for x in std), noise, MODES[mode], PIXELS, **EXACT,
        )  # fmt: skip
    return out


def _grid(images: torch.Tensor) -> tuple[int, int]:
    return len(images), triton.cdiv(images.shape[2] * images.shape[3], PIXELS)
