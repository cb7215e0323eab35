# SPDX-License-Identifier: Apache-2.0
"""
Programs that a user would train a ViT-Tiny with instead, on the same files and card, beside the script's runs: a loop
of one's own around timm's model, loader and mixup, and Transformers' plain Trainer with the transforms of its example
script.

Both leave out what the recipe has beside: the average of the weights, clipping and evaluation for the loop, and strong
augmentation for the Trainer, too. That is to their advantage.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from torchvision import transforms
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from image_classification.data.sources import load_data
from image_classification.paths import CONFIGURATION
from image_classification.settings.arguments import Settings
from image_classification.settings.parser import parse_settings
from image_classification.training.throughput import peak_memory

from . import runs
from .common import Clock


BATCHES = (32, 256)
WARMUP = 50  # Steps that are not timed: compilation, and the batches that the workers have made ahead.
SECONDS = 30


class Images(torch.utils.data.Dataset):
    """Images as timm's loader takes them, which sets `transform`."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows
        self.transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        return self.transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")), row["label"]


def timm_loop(settings: Settings, clock: Clock, workers: int, compiled: bool = False) -> None:
    """Train by a loop of one's own until the clock stops it."""
    data: Any = settings.data
    run: Any = settings.training
    images, device = Images(load_data(data, run.seed).train), torch.device(clock.device)
    loader = create_loader(
        images,  # type: ignore[arg-type]  # timm's annotation knows its own data sets only.
        (3, 224, 224),
        clock.images,
        is_training=True,
        scale=data.train_crop_scale,
        ratio=data.train_crop_ratio,
        hflip=data.horizontal_flip,
        auto_augment=data.auto_augment,
        interpolation=data.train_interpolation,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    mixup = Mixup(data.mixup, data.cutmix, label_smoothing=run.label_smoothing_factor, num_classes=10)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=run.weight_decay, fused=True)
    function, criterion = torch.compile(model) if compiled else model, SoftTargetCrossEntropy()
    done = False
    while not done:
        for images, labels in loader:
            images, targets = mixup(images, labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = criterion(function(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if done := clock.step():
                break


def plain_trainer(settings: Settings, clock: Clock, workers: int) -> None:
    """Train by Transformers' Trainer until the clock stops it."""
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])

    def prepare(rows):
        images = [transform(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": images, "labels": rows["label"]}

    rows: Any = load_data(settings.data, settings.training.seed).train
    rows = rows.cast_column("image", datasets.Image())
    rows.set_transform(prepare)
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=clock.images,
            dataloader_num_workers=workers,
            max_steps=1_000_000,  # The clock stops it.
            bf16=clock.device == "cuda",
            use_cpu=clock.device == "cpu",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = ViTForImageClassification(ViTConfig(**shape, num_labels=10))
        Trainer(model, args, train_dataset=rows, callbacks=[clock]).train()


RIVALS: dict[str, Callable[[Settings, Clock, int], None]] = {
    "timm loop": timm_loop,
    "timm loop, compiled": partial(timm_loop, compiled=True),
    "transformers.Trainer": plain_trainer,
}


def settings_of(data: Path, device: str) -> Settings:
    recipe = CONFIGURATION / "cifar10" / "vit_tiny_patch16_224.yaml"
    words = [recipe, "--data_set", "CIFAR10", "--data_path", data, *(["--use_cpu"] if device == "cpu" else [])]
    return parse_settings([*map(str, words)])


def launch(name: str, folder: Path, device: str, batch: int, data: Path) -> dict:
    """Measure a rival in a process of its own."""
    printed, found = runs.execute(
        [sys.executable, "-m", "benchmarks.rivals", name, data, device, batch], folder / "cache"
    )
    return found if "error" in found else found | json.loads(printed.strip().splitlines()[-1])


def run(
    device: str, table: runs.Runs, data: Path | None = None, images: int = 50_000, epochs: float | None = None
) -> None:
    """Measure ViT-Tiny by the script, recorded, and by the rivals; the arguments are those of `runs.run`."""
    with runs.workspace(data, images) as (folder, data):
        for batch in BATCHES:
            row = {"benchmark": "rivals", "model": "tiny", "batch": batch, "dtype": runs.DTYPES[device]}
            asked = row | {"mode": "recorded", "epochs": epochs or runs.EPOCHS["recorded"]}
            for way in ("softmax", "karat"):
                table.add(**row, provider=way, **runs.train(folder, device, way, asked, data))
            for name in RIVALS:
                table.add(**row, provider=name, **launch(name, folder, device, batch, data))


def main(words: list[str]) -> None:
    """Measure one, and print what was found: its name, the data's folder, the device, the batch size."""
    name, data, device, batch = words
    clock = Clock(int(batch), device, WARMUP, seconds=SECONDS)
    RIVALS[name](settings_of(Path(data), device), clock, os.cpu_count() or 1)
    print(json.dumps({"images_per_second": clock.per_second, "peak_gib": peak_memory(torch.device(device))}))


if __name__ == "__main__":
    main(sys.argv[1:])
