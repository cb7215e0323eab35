# SPDX-License-Identifier: Apache-2.0
"""
Training on JPEG files beside training on tensors that lie on the device: does the input pipeline keep up?

The run is the project's own: recipe, Trainer, data loader. The files are made for it: photo-like (1/f noise in three
correlated colours, and shapes with edges), 500x375 and 375x500, quality 90.

Beside synthetic tensors there are three ways: `resident`, where all images are decoded before training; `cropped`,
where workers decode and crop and the device does the rest; and `workers`, which do everything.
"""

import contextlib
import dataclasses
import functools
import gc
import io
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image, ImageDraw

from image_classification.data.sources import load_data
from image_classification.data.transforms import build_image_processor
from image_classification.models.building import build_model
from image_classification.paths import CONFIGURATION
from image_classification.settings.parser import parse_settings
from image_classification.training.building import build_trainer
from image_classification.training.trainer import ImageClassificationTrainer

from .common import Clock, Rates


CLASSES = 8
RECIPES = {
    "fourier G=3": CONFIGURATION / "imagenet1k" / "vit_tiny_patch16_224_karat.yaml",
    "": CONFIGURATION / "imagenet1k" / "vit_tiny_patch16_224.yaml",  # softmax
}
# Flags of training by what the benchmarks call modes.
MODES = {"eager": ["--record_step", "false"], "recorded": []}
# Flags of the ways to augment.
WAYS = {
    "resident": ["--augment_on", "device"],
    "cropped": ["--augment_on", "device", "--resident_share", "0"],
    "workers": ["--augment_on", "workers"],
}
# Images of a data set that is to fit.
RESIDENT = {"cuda": 8192, "cpu": 64}  # 5 GB and 36 MB.


def make_photo(seed: int) -> bytes:
    """Make a photo-like JPEG."""
    rng = np.random.default_rng(seed)
    width, height = (500, 375) if seed % 4 else (375, 500)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(4, height, width))) / frequency, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 40 * (planes[:1] + 0.4 * planes[1:]).transpose(1, 2, 0)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers([0, 0, 20, 20], [width, height, width // 3, height // 3])
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_photo(folder: Path, seed: int) -> int:
    content = make_photo(seed)
    path = folder / f"class{seed % CLASSES}" / f"{seed}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return len(content)


def write_photos(folder: Path, count: int) -> float:
    """Write `count` JPEGs for training and a few for evaluation; returns their mean size in bytes."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=_one_thread) as pool:
        sizes = list(pool.map(functools.partial(write_photo, folder / "train"), range(count), chunksize=16))
        list(pool.map(functools.partial(write_photo, folder / "validation"), range(count, count + CLASSES)))
    return float(np.mean(sizes))


def _one_thread() -> None:
    torch.set_num_threads(1)


class SyntheticTrainer(ImageClassificationTrainer):
    """Trainer whose every batch is the same one, which lies on the device; no data worker starts."""

    def take_batches(self, batches, count):
        size = self.args.per_device_train_batch_size
        if not hasattr(self, "batch"):
            device, classes = self.args.device, self.bare_model.config.num_labels
            images = torch.randn(size, 3, *[self.bare_model.config.image_size] * 2, device=device)
            self.batch = {"pixel_values": images, "labels": torch.rand(size, classes, device=device).softmax(-1)}
        return [self.batch] * count, size * count * self.args.world_size


def images_per_second(
    folder: Path, device: str, batch: int, recipe: Path, workers: int, steps: tuple[int, int], flags, kind
) -> float:
    """Measure training between two steps, on the images of `folder`, by a kind of Trainer."""
    # DeiT's erasing, which the paper's recipe leaves open, so that every step of the pipeline runs.
    words: list = [recipe, "--random_erasing", 0.25, "--data_path", folder, "--output_dir", folder / "run"]
    words += ["--per_device_train_batch_size", batch, "--dataloader_num_workers", workers, "--max_steps", steps[1]]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--warmup_epochs", 0, "--logging_strategy", "no"]
    words += ["--bf16", "true"] if device == "cuda" else ["--use_cpu"]
    settings = parse_settings([*map(str, words), *flags])
    with contextlib.redirect_stdout(io.StringIO()):
        data = load_data(settings.data, settings.training.seed)
    # An epoch longer than any run here: its beginning, when the workers start, is not what is measured.
    resident = settings.data.augment_on == "device" and settings.data.resident_share
    once: Any = data.train
    train = concatenate_datasets([once] * (1 + (RESIDENT[device] if resident else 400 * batch) // len(once)))
    data = dataclasses.replace(data, train=train, notes=[])
    torch.manual_seed(0)
    model = build_model(settings.model, data.labels)
    processor = build_image_processor(settings.data, model.config.image_size)
    trainer = build_trainer(settings.data, settings.training, model, data, processor, kind=kind)
    clock = Clock(batch, device, *steps)
    trainer.add_callback(clock)
    trainer.train()
    del trainer
    gc.collect()  # Its data workers end now, and not beside the next run.
    return clock.per_second


def run(
    device: str,
    table: Rates,
    batch: int,
    count: int,
    steps: tuple[int, int],
    workers: int,
    ways=tuple(WAYS),
    basis: str = "fourier G=3",
    mode: str = "recorded",
) -> None:
    """
    Measure training by each way to augment, beside training on synthetic tensors before and after it.

    Args:
        count: of JPEG files.
        steps: between which training is timed.
        workers: processes that read data.
        ways: to augment, of `WAYS`.
        basis: of `RECIPES`.
        mode: of `MODES`.
    """
    torch.set_num_threads(1)
    begin, end = steps
    row = {"benchmark": "input-pipeline", "model": "tiny", "basis": basis, "batch": batch, "mode": mode}
    row |= {"dtype": "bfloat16" if device == "cuda" else "float32", "what": "train"}
    with tempfile.TemporaryDirectory(prefix="karat-input-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        size = write_photos(folder, count)
        print(f"{count:,} JPEGs, {size / 1e3:.0f} kB each")

        def measured(workers: int, end: int, flags, kind=ImageClassificationTrainer) -> float:
            recipe, flags = RECIPES[basis], [*flags, *MODES[mode]]
            return images_per_second(folder, device, batch, recipe, workers, (begin, end), flags, kind)

        def synthetic() -> float:
            rate = measured(0, end, [], SyntheticTrainer)
            table.add(**row, provider="synthetic", images_per_second=rate)
            return rate

        before = synthetic()
        for way in ways:
            rate = measured(workers, max(begin + 1, (begin + end) // 2) if way == "workers" else end, WAYS[way])
            # A host's speed drifts: beside the mean of before and after.
            after = synthetic()
            beside, before = (before + after) / 2, after
            provider = way if way == "resident" else f"{way}, {workers} workers"
            table.add(**row, provider=provider, images_per_second=rate, ratio=rate / beside)
