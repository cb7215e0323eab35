# SPDX-License-Identifier: Apache-2.0
"""
Training on JPEG files beside training on tensors that lie on the device: does the input pipeline keep up?

The run is the project's own: recipe, Trainer, data loader. The files are made for it: photo-like (1/f noise in three
correlated colours, and shapes with edges), 500x375 and 375x500, quality 90.
"""

import contextlib
import functools
import gc
import io
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from image_classification import main, models
from image_classification.arguments import CONFIGURATION, parse_settings
from image_classification.data import decode, load_data
from image_classification.device_augmentation import DrawnBatch, read
from image_classification.errors import InputError
from image_classification.trainer import ImageClassificationTrainer
from image_classification.transforms import build_image_processor

from .common import Table


CLASSES = 8
RECIPE = CONFIGURATION / "imagenet1k" / "vit_tiny_patch16_224_karat.yaml"
# DeiT's erasing, which the paper's recipe leaves open, so that every step of the pipeline runs.
FULL = ["--random_erasing", "0.25"]
# Mean difference of a batch by the two ways to augment, in pixel values, above which a way is not timed. The colours of
# nvJPEG are not libjpeg's to the last bit.
LIMIT = 2.0


def make_photo(seed: int) -> bytes:
    """A photo-like JPEG."""
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
    """`count` JPEGs for training and a few for evaluation; the mean size in bytes."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=_one_thread) as pool:
        sizes = list(pool.map(functools.partial(write_photo, folder / "train"), range(count), chunksize=16))
        list(pool.map(functools.partial(write_photo, folder / "validation"), range(count, count + CLASSES)))
    return float(np.mean(sizes))


def _one_thread() -> None:
    torch.set_num_threads(1)


class Clock(TrainerCallback):
    """Images per second between two steps, when the device has done them."""

    def __init__(self, begin: int, end: int, images: int):
        self.begin, self.end, self.images, self.per_second, self.times = begin, end, images, None, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.begin, self.end):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.times[state.global_step] = time.perf_counter()
        if state.global_step == self.end:
            seconds = self.times[self.end] - self.times[self.begin]
            self.per_second = self.images * (self.end - self.begin) / seconds


class SyntheticTrainer(ImageClassificationTrainer):
    """Every batch is the same one, which lies on the device; no data worker starts."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if not hasattr(self, "batch"):
            size, classes = self.args.per_device_train_batch_size, self.bare_model.config.num_labels
            images = torch.randn(size, 3, *[self.bare_model.config.image_size] * 2, device=device)
            self.batch = {"pixel_values": images, "labels": torch.rand(size, classes, device=device).softmax(-1)}
        batches = [self.batch] * num_batches
        return batches, self._get_num_items_in_batch(batches, device)


class Pipeline:
    """Trainers of the recipe on the same files."""

    def __init__(self, folder: Path, device: str, batch: int):
        self.folder, self.device, self.batch = folder, device, batch
        self.data = None

    def trainer(self, name: str, workers: int, steps: int, flags=(), kind=ImageClassificationTrainer):
        words = [str(RECIPE), *FULL, "--data_path", str(self.folder)]
        words += ["--per_device_train_batch_size", str(self.batch), "--dataloader_num_workers", str(workers)]
        words += ["--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no", "--warmup_epochs", "0"]
        words += ["--logging_strategy", "no", "--output_dir", str(self.folder / "runs" / name)]
        words += ["--bf16", "true"] if self.device == "cuda" else ["--use_cpu"]
        settings = parse_settings([*words, *flags])
        if self.data is None:
            with contextlib.redirect_stdout(io.StringIO()):
                self.data = load_data(settings.data, settings.training.seed)
            # An epoch longer than any run here: its beginning, when the workers start, is not what is measured.
            copies = 1 + 400 * self.batch // len(self.data.train)
            self.data.train = concatenate_datasets([self.data.train] * copies)
        torch.manual_seed(0)
        model = models.build_model(settings.model, self.data.labels)
        processor = build_image_processor(settings.data, model.config.image_size)
        return main.build_trainer(settings, model, self.data, processor, kind)

    def images_per_second(self, name: str, workers: int, begin: int, end: int, **options) -> float:
        trainer = self.trainer(name, workers, end, **options)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "EpochLines":
                trainer.remove_callback(callback)
        clock = Clock(begin, end, self.batch)
        trainer.add_callback(clock)
        trainer.train()
        del trainer
        gc.collect()  # Its data workers end now, and not beside the next run.
        return clock.per_second

    def difference(self, share: float) -> float:
        """Mean difference of a batch that workers augment and one that the device does, in pixel values."""
        batches = []
        for way in (["--augment_on", "workers"], ["--augment_on", "device", "--device_decode", str(share)]):
            trainer = self.trainer("check", 0, 1, [*way, "--random_erasing_mode", "const"])
            rows = [trainer.train_dataset[index] for index in range(64)]
            made = trainer.data_collator(rows)
            batches.append(made if isinstance(made, dict) else self.on_device(made))
        workers, device = (batch["pixel_values"].cpu() for batch in batches)
        labels = (batches[0]["labels"] - batches[1]["labels"].cpu()).abs().max()
        return float((workers - device).abs().mean()) * 255 * 0.226 if labels < 1e-5 else float("inf")

    def on_device(self, drawn: DrawnBatch) -> dict[str, torch.Tensor]:
        """As the data loader and accelerate do it."""
        return (drawn.pin_memory() if self.device == "cuda" else drawn).to(torch.device(self.device))


def parts(pipeline: Pipeline, table: Table, row: dict, repeats: int) -> None:
    """What the pieces take on their own."""
    contents = [path.read_bytes() for path in sorted(pipeline.folder.glob("train/*/*.jpg"))[:128]]

    def per_second(what: str, function, images: int, **more) -> None:
        function()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        if pipeline.device == "cuda":
            torch.cuda.synchronize()
        table.add(**row, what=what, images_per_second=images * repeats / (time.perf_counter() - began), **more)

    items = [{"bytes": content, "path": None} for content in contents]
    per_second("decode, Pillow, one core", lambda: [decode(item, "") for item in items], len(items))
    per_second("decode, torchvision, one core", lambda: [read(item, "") for item in items], len(items))
    for way in ("workers", "device"):
        dataset = pipeline.trainer("part", 0, 1, ["--augment_on", way]).train_dataset
        per_second(f"a worker's part, {way}, one core", lambda dataset=dataset: [dataset[i] for i in range(128)], 128)
    trainer = pipeline.trainer("part", 0, 1, ["--augment_on", "device"])
    drawn = trainer.data_collator([trainer.train_dataset[index] for index in range(pipeline.batch)])
    per_second("the device's part", lambda: pipeline.on_device(drawn), pipeline.batch)
    if pipeline.device == "cuda":
        from torchvision.io import decode_jpeg

        encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        try:
            per_second("decode, nvJPEG", lambda: decode_jpeg(encoded, device="cuda"), len(encoded))
        except RuntimeError as error:
            print(f"nvJPEG: {str(error).splitlines()[0]}", flush=True)
            return
        flags = ["--augment_on", "device", "--device_decode", "1"]
        trainer = pipeline.trainer("part", 0, 1, flags)
        rows = [trainer.train_dataset[i] for i in range(pipeline.batch)]
        per_second("a worker's part, device decodes", lambda: [trainer.train_dataset[i] for i in range(128)], 128)
        drawn = trainer.data_collator(rows)
        per_second("the device's part, with decoding", lambda: pipeline.on_device(drawn), pipeline.batch)


def run(device: str, table: Table, batch: int, count: int, begin: int, end: int, ways: list[tuple[int, float]]) -> None:
    """
    Args:
        count: of JPEG files.
        begin, end: steps between which training is timed.
        ways: to augment on the device: how many workers, and the share of the JPEGs that the device decodes. The first
            number of workers is that of the workers' own way, too.
    """
    torch.set_num_threads(1)
    workers, shorter = ways[0][0], max(begin + 1, (begin + end) // 2)
    folder = Path(tempfile.mkdtemp(prefix="karat-input-"))
    try:
        began = time.perf_counter()
        size = write_photos(folder, count)
        print(f"{count:,} JPEGs, {size / 1e3:.0f} kB each, in {time.perf_counter() - began:.0f} s", flush=True)
        pipeline = Pipeline(folder, device, batch)
        row = {"benchmark": "input-pipeline", "model": "tiny", "basis": "fourier G=3", "batch": batch, "mode": "eager"}
        row |= {"dtype": "bfloat16" if device == "cuda" else "float32"}
        for share in sorted({share for _, share in ways}):
            try:
                wrong = pipeline.difference(share)
                found = f"{wrong:.2f} of 255 apart"
            except InputError as error:  # No decoder on the device.
                wrong, found = float("inf"), str(error)
            table.add(
                **row, provider=f"device, {share:.0%} of JPEGs decoded", what="same as the workers' way", error=found
            )
            if not wrong < LIMIT:
                print("Not as the workers' way, so not timed.", flush=True)
                ways = [way for way in ways if way[1] != share]
        synthetic = pipeline.images_per_second("synthetic", 0, begin, end, kind=SyntheticTrainer)
        table.add(**row, provider="synthetic", what="train", images_per_second=synthetic)
        for number, share in ways:
            name, flags = f"device, {number} workers, {share:.0%} decoded", ["--augment_on", "device"]
            rate = pipeline.images_per_second(name, number, begin, end, flags=[*flags, "--device_decode", str(share)])
            table.add(**row, provider=name, what="train", images_per_second=rate, ratio=rate / synthetic)
        rate = pipeline.images_per_second("workers", workers, begin, shorter)
        name = f"workers, {workers} workers"
        table.add(**row, provider=name, what="train", images_per_second=rate, ratio=rate / synthetic)
        parts(pipeline, table, row | {"provider": "part"}, 2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
