# SPDX-License-Identifier: Apache-2.0
"""Reader of whatever image a visitor has, which it refuses in words if it must."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from image_classification.data.images import upright_rgb
from image_classification.errors import InputError


# Images of more pixels are shrunk to this many as they are read.
SHRINK_ABOVE = 2**24
# What is read. Pillow knows more, and hands some, such as EPS, to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


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
        image: Image.Image = Image.open(path, formats=FORMATS)
        megapixels = image.width * image.height / 1e6
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError
        if getattr(image, "is_animated", False):
            notes.append("The file holds several pictures: this is the first.")
        if image.mode.startswith("I;16"):
            image = _eight_bits(image)
            notes.append("16 bits a pixel were reduced to 8.")
        if image.width * image.height > SHRINK_ABOVE:
            factor = (SHRINK_ABOVE / (image.width * image.height)) ** 0.5
            # A JPEG is decoded at the smaller size to begin with.
            image.thumbnail((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
            notes.append(f"The image has {megapixels:.0f} megapixels and was shrunk as it was read.")
        image.load()
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            notes.append("Transparency is ignored, as in training.")
    except FileNotFoundError as error:
        raise InputError("The image is not kept any longer. Please upload it again.") from error
    except Image.DecompressionBombError as error:
        limit = (Image.MAX_IMAGE_PIXELS or math.inf) / 1e6
        raise InputError(f"The image is too large: at most {limit:.0f} megapixels. Shrink it first.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others for broken files.
        raise InputError(
            "This file cannot be read: it is damaged, cut short, or no image of a known kind. Try PNG, JPEG, WebP, "
            "GIF, BMP, TIFF or AVIF."
        ) from error
    return upright_rgb(image, Path(path).name), notes


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce a 16-bit grey image to the upper 8 of them; it keeps its orientation."""
    reduced = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    reduced.getexif().update(image.getexif())
    return reduced
