# SPDX-License-Identifier: Apache-2.0
"""
Image processors of KArAt-ViT: ViT's, which take images as they are. Transformers' own turn no image upright, and from
one release to another drop what is transparent or lay it on white; the pipeline drops it, and training does.
"""

from typing import Any

from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.vit.image_processing_vit import ViTImageProcessor


def has_eight_bits(image: Image.Image) -> bool:
    """Whether a channel has 8 bits or fewer: of more, Pillow would cut some off."""
    return image.mode not in ("F", "I") and not image.mode.startswith("I;")


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An image as its EXIF data say that it is to be held, in RGB, without transparency."""
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    upright = image.convert("RGB")
    # Nobody need stumble over damaged EXIF data, turn it once more, or take a colour for transparent.
    upright.info = {}
    return upright


def three_channels(pixels: Any, input_data_format: str | ChannelDimension | None) -> Any:
    """The red, green and blue of an array or a tensor of an image: (channels, H, W) or (H, W, channels)."""
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(pixels, num_channels=(1, 2, 3, 4))
    axis = -1 if input_data_format == ChannelDimension.LAST else 0
    # Grey, grey with transparency, and RGBA.
    channels = {1: [0, 0, 0], 2: [0, 0, 0], 4: [0, 1, 2]}.get(pixels.shape[axis])
    if channels is None:
        return pixels
    return pixels[..., channels] if axis else pixels[channels]


class RGBMixin(BaseImageProcessor):
    """What both image processors add to ViT's."""

    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls):
        # By Pillow, as the pipeline reads files: torchvision decodes some to other pixels.
        return BaseImageProcessor.fetch_images(self, image_url_or_urls)

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs):
        if do_convert_rgb:
            if not isinstance(image, Image.Image):
                image = three_channels(image, input_data_format)
            elif has_eight_bits(image):
                image = to_upright_rgb(image)
            else:
                raise ValueError(f"An image has pixels of mode {image.mode}, expected 8 bits a channel: convert it.")
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
        )

    def to_dict(self) -> dict[str, Any]:
        # Both, whichever is saved: who loads them may or may not have torchvision.
        kinds = KArAtViTImageProcessorPil, KArAtViTImageProcessor
        names = [f"image_processing_karat_vit.{kind.__name__}" for kind in kinds]
        return super().to_dict() | {"auto_map": {"AutoImageProcessor": names}}


class KArAtViTImageProcessor(RGBMixin, ViTImageProcessor):
    """`ViTImageProcessor` of images as they are: grey, of a palette, with transparency (dropped), or to be turned."""


class KArAtViTImageProcessorPil(RGBMixin, ViTImageProcessorPil):
    """`KArAtViTImageProcessor` without torchvision."""


for _kind in (KArAtViTImageProcessor, KArAtViTImageProcessorPil):
    _kind.register_for_auto_class()
