# SPDX-License-Identifier: Apache-2.0
"""
What happens to images: random crops, flips and colours in training, the saved image processor in evaluation.

Evaluation goes through the image processor that is saved with the model, so a pipeline loaded from the checkpoint sees
the pixels that the evaluation saw.
"""

import copy
from typing import Any

import torch
from transformers import ViTImageProcessor, ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

from modeling_karat_vit import KArAtViTImageProcessor, KArAtViTImageProcessorPil
from modeling_karat_vit.configuration_karat_vit import height_and_width

from ..errors import InputError
from ..settings.arguments import DataArguments
from .augmentation import auto_augment, random_erasing
from .images import made_size


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BICUBIC = 3  # PIL's number


def build_image_processor(
    args: DataArguments, image_size, checkpoint: BaseImageProcessor | None = None, model_type: str = "karat_vit"
) -> BaseImageProcessor:
    """
    The image processor of the evaluation, by the backend that Transformers' auto class takes here (torchvision's where
    it is installed, else Pillow's; they differ by rounding where an image is resized).

    Args:
        image_size: the model's, in pixels or as (height, width).
        checkpoint: the processor that came with the weights, if any, for what the data arguments leave unset.
        model_type: the model's. Beside one that Transformers loads without any code of ours lies a class of its own.

    Returns:
        A `KArAtViTImageProcessor`, or where there are no KArAt heads the checkpoint's, if it `serves`, or a
        `ViTImageProcessor`. It resizes and crops as the checkpoint's, if that serves; else it resizes the shorter side
        to image size / crop ratio (bicubic) and crops the centre, or for a ratio of 1 resizes all. Then it rescales and
        normalises.
    """
    height, width = height_and_width(image_size)
    has_karat = model_type.startswith("karat_")
    as_theirs = checkpoint is not None and serves(checkpoint, args, (height, width))
    if as_theirs and not has_karat:
        theirs: Any = copy.deepcopy(checkpoint)
        theirs.do_convert_rgb = True
        return theirs
    as_it_is = checkpoint is not None and not checkpoint.do_normalize
    mean = args.image_mean or ([0.0] * 3 if as_it_is else getattr(checkpoint, "image_mean", None)) or IMAGENET_MEAN
    std = args.image_std or ([1.0] * 3 if as_it_is else getattr(checkpoint, "image_std", None)) or IMAGENET_STD
    ratio = args.eval_crop_ratio or _crop_ratio_of(checkpoint) or 0.9
    geometry: dict[str, Any] = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    if as_theirs:
        kept = ("size", "do_resize", "do_center_crop", "crop_size")
        geometry = {name: getattr(checkpoint, name, None) for name in kept}
    elif ratio < 1:
        if height != width:
            raise InputError(f"`eval_crop_ratio` {ratio:g} crops squares, and {height}x{width} is not square. Use 1.")
        shorter = int(height / ratio)
        crop = {"height": height, "width": width}
        geometry |= {"size": {"shortest_edge": shorter}, "do_center_crop": True, "crop_size": crop}
    kinds = ViTImageProcessorPil, ViTImageProcessor
    if has_karat:
        kinds = KArAtViTImageProcessorPil, KArAtViTImageProcessor
    return kinds[is_torchvision_available()](
        do_convert_rgb=True,
        resample=getattr(checkpoint, "resample", None) or BICUBIC,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
        **geometry,
    )


def serves(checkpoint: BaseImageProcessor, args: DataArguments, size: tuple[int, int]) -> bool:
    """
    Whether a checkpoint's image processor prepares the images of a run as it is: no setting asks for another
    preparation, it makes images of that size, and of pixels from 0 to 1 what training makes of them.
    """
    given = args.image_mean, args.image_std, args.eval_crop_ratio
    as_training = checkpoint.do_rescale and checkpoint.do_normalize and abs(255 * checkpoint.rescale_factor - 1) < 1e-6
    return given == (None, None, None) and bool(as_training) and made_size(checkpoint) == size


def _crop_ratio_of(processor: BaseImageProcessor | None) -> float | None:
    if processor is None:
        return None
    size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
    shorter = size.get("shortest_edge")
    if getattr(processor, "do_center_crop", None) and shorter and crop.get("height"):
        # The ratio whose rounded resize is this one.
        return crop["height"] / (shorter + 0.5)
    return 1.0


def torchvision_transforms():
    """Torchvision's module of them. Raises `InputError` where it is missing."""
    if not is_torchvision_available():
        raise InputError("Training augments images with torchvision, which is not installed: pip install torchvision.")
    from torchvision.transforms import v2

    return v2


class TrainTransform:
    """
    PIL image -> normalised tensor (3, height, width): random resized crop, flip, RandAugment or colour jitter (as in
    timm, not both), random erasing. The processor's mean and standard deviation normalise.
    """

    def __init__(self, args: DataArguments, image_size, processor: BaseImageProcessor):
        v2 = torchvision_transforms()
        size = height_and_width(image_size)
        steps = [
            v2.RandomResizedCrop(
                size,
                scale=tuple(args.train_crop_scale),
                ratio=tuple(args.train_crop_ratio),
                interpolation=v2.InterpolationMode(args.train_interpolation),
            )
        ]
        if args.horizontal_flip > 0:
            steps.append(v2.RandomHorizontalFlip(args.horizontal_flip))
        steps += auto_augment(args, size, processor.image_mean)
        if args.color_jitter > 0 and args.auto_augment is None:
            steps.append(v2.ColorJitter(*[args.color_jitter] * 3))
        steps += [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
            *random_erasing(args),
        ]
        self.steps = v2.Compose(steps)

    def __call__(self, image):
        return self.steps(image)


class EvalTransform:
    """PIL image -> normalised tensor (3, height, width), by the image processor."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image):
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
