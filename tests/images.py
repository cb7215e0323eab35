# SPDX-License-Identifier: Apache-2.0
"""Small image data for tests, and what keeps the script's settings of the libraries from reaching other tests."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


COLOURS = ("blue", "green", "red")


def colour_image(colour: str, seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    """A noisy image (height, width) in which one channel is bright."""
    pixels = np.random.default_rng(seed).integers(0, 80, (*size, 3), dtype=np.uint8)
    pixels[..., ("red", "green", "blue").index(colour)] += 150
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def make_image_folder(root: Path, splits=(("train", 4), ("validation", 2)), classes=COLOURS, suffix=".jpg") -> Path:
    """An ImageNet-style folder: root/split/class/number.jpg."""
    for split_index, (split, count) in enumerate(splits):
        for class_index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 1000 * split_index + 100 * class_index + number
                colour_image(COLOURS[class_index % 3], seed).save(folder / f"{number}{suffix}")
    return root


@pytest.fixture
def own_library_settings():
    """Put back what the scripts set in Transformers, datasets, accelerate and PyTorch."""
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    verbosity, theirs = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.logging.set_verbosity(theirs)
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    torch.set_num_threads(threads)
