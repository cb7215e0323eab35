# SPDX-License-Identifier: Apache-2.0
"""The image processors: of an image as it is they make the pixels of training and of the pipeline."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import ViTImageProcessor
from transformers.image_utils import load_image

# Under its top-level name, the lowest supported Transformers demands torchvision of it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from image_classification.data.images import read_image
from modeling_karat_vit import KArAtViTImageProcessor, KArAtViTImageProcessorPil


BACKENDS = {"torchvision": KArAtViTImageProcessor, "pil": KArAtViTImageProcessorPil}
GREY = Image.radial_gradient("L").resize((40, 30))


def half_transparent(mode: str) -> Image.Image:
    image = GREY.convert(mode)
    image.putalpha(GREY.rotate(90).resize(GREY.size))
    return image


def turned() -> Image.Image:
    image = GREY.convert("RGB")
    image.getexif()[ExifTags.Base.Orientation] = 6
    return image


IMAGES = {
    **{mode: lambda mode=mode: GREY.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK")},
    "LA": lambda: half_transparent("LA"),
    "RGBA": lambda: half_transparent("RGBA"),
    "transparent-colour": lambda: GREY.convert("P"),
    "turned": turned,
}


@pytest.fixture(params=BACKENDS)
def processor(request, tmp_path):
    """A saved one, loaded by the auto class."""
    kind = BACKENDS[request.param]
    kind(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "saved")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend=request.param)
    assert type(loaded) is kind
    return lambda image: loaded(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", IMAGES)
def test_images_as_they_are_give_the_pixels_of_training_and_of_the_pipeline(name, processor, tmp_path):
    path = tmp_path / ("image.png" if name == "transparent-colour" else "image.tiff")
    made = IMAGES[name]()
    # A tag, and not a channel: Pillow keeps it beside an RGB image, too.
    how = {"transparency": int(np.asarray(made)[15, 20])} if name == "transparent-colour" else {}
    made.save(path, exif=made.getexif(), **how)
    image = Image.open(path)
    assert ("transparency" in image.info, image.getexif().get(ExifTags.Base.Orientation)) == (
        bool(how),
        6 if name == "turned" else None,
    )
    expected = processor(read_image(path))
    assert torch.equal(processor(image), expected)
    assert torch.equal(processor(load_image(str(path))), expected)
    assert torch.equal(processor(str(path)), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_arrays_and_tensors_give_the_pixels_of_their_image(mode, processor):
    image = half_transparent(mode) if "A" in mode else GREY.convert(mode)
    array = np.atleast_3d(np.array(image))
    expected = processor(image)
    assert torch.equal(processor(array), expected)
    assert torch.equal(processor(torch.from_numpy(array).permute(2, 0, 1)), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused(mode, processor):
    with pytest.raises(ValueError, match=rf"mode {mode}.*8 bits"):
        processor(Image.new(mode, (9, 9)))


def test_the_processors_of_earlier_checkpoints_are_vits(tmp_path):
    ViTImageProcessor().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ViTImageProcessor
