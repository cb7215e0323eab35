# SPDX-License-Identifier: Apache-2.0
"""
The reader of images, for every command. Images are read as Transformers' image-classification pipeline reads them:
upright, in RGB, the first of several frames, without transparency.

Needs nothing of the training side.
"""

import io
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_karat_vit.image_processing_karat_vit import has_eight_bits, to_upright_rgb

from ..errors import InputError, reason_of


# How many times longer one side may be than the other: resizing the shorter one to a model's size, as image processors
# do, would make gigabytes of more.
LONGEST = 1000


def decode(item: dict[str, Any], where: str) -> Image.Image:
    """
    Decode one image, `{"path": ..., "bytes": ...}` as `datasets` keeps it; errors call one without a path `where`.

    Raises:
        InputError: the file is missing, no image, truncated, too large, far longer than wide, or of more than 8 bits a
            channel.
    """
    return _read(item, where, quick=False)


def read_image(path: str | Path) -> Image.Image:
    """`decode` the image in a file."""
    return decode({"path": str(path)}, str(path))


def check_image(path: str | Path) -> None:
    """Raise what `read_image` would. The whole file is read, a JPEG at an eighth of its size."""
    _read({"path": str(path)}, str(path), quick=True)


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """
    An image as its EXIF data say that it is to be held, in RGB. Raises `InputError`, which calls it by `name`, where it
    has more than 8 bits a channel, or cannot be converted.
    """
    if not has_eight_bits(image):
        finite = bool(np.isfinite(np.asarray(image)).all())
        kind = f"has pixels of mode {image.mode}" if finite else "has pixels that are NaN or infinite"
        raise InputError(f"The image {name} {kind}. Expected 8 bits a channel: convert it first.")
    if max(image.size) > LONGEST * min(image.size):
        raise InputError(f"The image {name} has one side more than {LONGEST} times the other: crop or remove it.")
    try:
        return to_upright_rgb(image)
    except Exception as error:  # Damaged EXIF data, or colours that Pillow does not convert, such as CIE Lab.
        raise InputError(f"The image {name} cannot be made upright RGB ({reason_of(error)}): convert it.") from error


def _read(item: dict[str, Any], where: str, quick: bool) -> Image.Image:
    path, content = item.get("path") or "", item.get("bytes")
    name = path if content is None else where + (f" ({path})" if path else "")
    if content is None and not os.path.isfile(path):
        if not os.path.exists(path):
            raise InputError(f"The image {name} does not exist.")
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise InputError(f"The image {name} is {what}, expected an image file.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            image = Image.open(path if content is None else io.BytesIO(content))
            if quick:
                image.draft(image.mode, (1, 1))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = (Image.MAX_IMAGE_PIXELS or math.inf) / 1e6
        raise InputError(f"The image {name} has more than {limit:.0f} megapixels. Shrink it first.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others for broken files.
        raise InputError(
            f"The image {name} cannot be read: it is truncated, damaged or no image ({reason_of(error)}). Replace or "
            "remove it."
        ) from error
    return upright_rgb(image, name)


def made_size(processor) -> tuple[int, int] | None:
    """Height and width of the images that an image processor makes of any image; `None` where they vary."""
    if getattr(processor, "do_center_crop", None):
        size = dict(processor.crop_size or {})
    else:
        size = dict(processor.size or {}) if processor.do_resize else {}
    return (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None
