# SPDX-License-Identifier: Apache-2.0
"""Transforms: the evaluation's is the saved processor's, the training's is random."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

from image_classification.data.transforms import EvalTransform, TrainTransform, build_image_processor
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments
from modeling_karat_vit import KArAtViTImageProcessor
from tests.images import colour_image


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_evaluation_resizes_and_crops_as_the_recipe_says(tmp_path, backend):
    build_image_processor(DataArguments(), 224).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    image = colour_image("red", 0, (300, 400))
    ours = EvalTransform(processor)(image)
    resized = image.resize((int(400 * 248 / 300), 248), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), (248 - 224) // 2
    crop = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    expected = (crop - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert ours.shape == (3, 224, 224)
    # Backends round differently, by one of 256 levels or two.
    assert np.abs(ours.permute(1, 2, 0).numpy() - expected).max() < 3 / 255 / 0.224


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_images_of_the_models_size_are_only_normalised(tmp_path, backend):
    args = DataArguments(eval_crop_ratio=1.0, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    build_image_processor(args, 8).save_pretrained(tmp_path)
    image = colour_image("red", 0, (8, 8))
    pixels = EvalTransform(AutoImageProcessor.from_pretrained(tmp_path, backend=backend))(image)
    expected = (np.asarray(image, dtype=np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_unset_arguments_are_the_checkpoints():
    checkpoint = build_image_processor(DataArguments(eval_crop_ratio=0.8, image_mean=[0.1] * 3), 224)
    same = build_image_processor(DataArguments(), 224, checkpoint)
    assert (same.size, same.crop_size) == (checkpoint.size, checkpoint.crop_size)
    assert list(same.image_mean) == [0.1] * 3
    whole = build_image_processor(DataArguments(eval_crop_ratio=1.0), 64, checkpoint)
    assert not whole.do_center_crop and whole.size == {"height": 64, "width": 64}


def test_images_that_are_not_square():
    with pytest.raises(InputError, match="not square"):
        build_image_processor(DataArguments(), [16, 8])
    args = DataArguments(eval_crop_ratio=1.0)
    processor = build_image_processor(args, [16, 8])
    assert EvalTransform(processor)(colour_image("red", 0)).shape == (3, 16, 8)
    assert TrainTransform(args, [16, 8], processor)(colour_image("red", 0)).shape == (3, 16, 8)


def test_training_is_random_and_normalised_alike():
    processor = build_image_processor(DataArguments(), 16)
    image = Image.new("RGB", (40, 40), (255, 0, 0))
    transform = TrainTransform(DataArguments(color_jitter=0.0), 16, processor)
    torch.testing.assert_close(transform(image), EvalTransform(processor)(image), atol=1e-5, rtol=0)
    busy = colour_image("red", 0, (40, 40))
    torch.manual_seed(0)
    first, second = transform(busy), transform(busy)
    torch.manual_seed(0)
    assert torch.equal(first, transform(busy)) and not torch.equal(first, second)


def test_whose_class_the_processor_is(tmp_path):
    """Beside a softmax ViT, Transformers' own, which nobody has to trust; it gives the same pixels of RGB images."""
    own, theirs = (build_image_processor(DataArguments(), 16, None, kind) for kind in ("karat_vit", "vit"))
    assert (type(own), type(theirs)) == (KArAtViTImageProcessor, ViTImageProcessor)
    theirs.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    image = colour_image("red", 0)
    assert torch.equal(EvalTransform(own)(image), EvalTransform(theirs)(image))
