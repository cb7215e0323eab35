# SPDX-License-Identifier: Apache-2.0
"""
Training on JPEG files beside training on tensors that lie on the device: does the input pipeline keep up?

The run is the project's own: recipe, Trainer, data loader. The files are made for it: photo-like (1/f noise in three
correlated colours, and shapes with edges), 500x375 and 375x500, quality 90.

Beside synthetic tensors there are three ways: `resident`, where all images are decoded before training; `cropped`,
where workers decode and crop and the device does the rest; and `workers`, which do everything.

What the limit is shows in the parts, each measured with and without the others beside it: the data workers alone; the
whole pipeline without training; and in training what a batch takes of the main process's time and of the GPU. Where
wall time is far above CPU time, a thread waits: for data, for the GPU, or for Python's lock.
"""

import contextlib
import dataclasses
import functools
import gc
import io
import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import concatenate_datasets
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from image_classification.data.images import decode
from image_classification.data.sources import ImageData, load_data
from image_classification.data.transforms import build_image_processor
from image_classification.device_pipeline.resident import read
from image_classification.models.building import build_model
from image_classification.paths import CONFIGURATION
from image_classification.settings.parser import parse_settings
from image_classification.training.building import build_trainer
from image_classification.training.trainer import ImageClassificationTrainer

from .common import Rates


CLASSES = 8
RECIPES = {
    "fourier G=3": CONFIGURATION / "imagenet1k" / "vit_tiny_patch16_224_karat.yaml",
    "": CONFIGURATION / "imagenet1k" / "vit_tiny_patch16_224.yaml",  # softmax
}
# Flags of training by what the benchmarks call modes.
MODES = {"eager": ["--record_step", "false"], "recorded": []}
# DeiT's erasing, which the paper's recipe leaves open, so that every step of the pipeline runs.
FULL = ["--random_erasing", "0.25"]
SECONDS = {"cuda": 2.5, "cpu": 1.0}  # In which workers are counted.
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


class Stopwatch:
    """Wall and CPU time in functions, in ms a call, and how often they were called."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, name: str, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall[name] += 1e3 * (time.perf_counter() - wall)
                self.cpu[name] += 1e3 * (time.thread_time() - cpu)
                self.calls[name] += 1

        return wrapper


class Clock(TrainerCallback):
    """Images per second between two steps, when the device has done them, and what the stopwatch has for them."""

    def __init__(self, begin: int, end: int, images: int, stopwatch: Stopwatch):
        self.begin, self.end, self.images, self.stopwatch = begin, end, images, stopwatch
        self.per_second, self.times = math.nan, dict[int, float]()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.begin, self.end):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.times[state.global_step] = time.perf_counter()
            if state.global_step == self.begin:
                self.stopwatch.clear()
        if state.global_step == self.end:
            seconds = self.times[self.end] - self.times[self.begin]
            self.per_second = self.images * (self.end - self.begin) / seconds


class SyntheticTrainer(ImageClassificationTrainer):
    """Trainer whose every batch is the same one, which lies on the device; no data worker starts."""

    def take_batches(self, batches, count):
        size = self.args.per_device_train_batch_size
        if not hasattr(self, "batch"):
            device, classes = self.args.device, self.bare_model.config.num_labels
            images = torch.randn(size, 3, *[self.bare_model.config.image_size] * 2, device=device)
            self.batch = {"pixel_values": images, "labels": torch.rand(size, classes, device=device).softmax(-1)}
        return [self.batch] * count, size * count * self.args.world_size


@dataclass(frozen=True)
class Way:
    """Way of `WAYS`, and how many data workers there are."""

    name: str
    workers: int

    @property
    def flags(self) -> list[str]:
        return WAYS[self.name]

    def __str__(self) -> str:
        return self.name if self.name == "resident" else f"{self.name}, {self.workers} workers"


class Pipeline:
    """Trainers of a basis' recipe on the same files."""

    def __init__(self, folder: Path, device: str, batch: int, basis: str):
        self.folder, self.device, self.batch, self.recipe = folder, device, batch, RECIPES[basis]
        self.data: ImageData | None = None

    def trainer(self, name: str, workers: int, steps: int, flags=(), kind=ImageClassificationTrainer):
        words = [str(self.recipe), *FULL, "--data_path", str(self.folder)]
        words += ["--per_device_train_batch_size", str(self.batch), "--dataloader_num_workers", str(workers)]
        words += ["--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no", "--warmup_epochs", "0"]
        words += ["--logging_strategy", "no", "--output_dir", str(self.folder / "runs" / name)]
        words += ["--bf16", "true"] if self.device == "cuda" else ["--use_cpu"]
        settings = parse_settings([*words, *flags])
        if self.data is None:
            with contextlib.redirect_stdout(io.StringIO()):
                self.data = load_data(settings.data, settings.training.seed)
        # An epoch longer than any run here: its beginning, when the workers start, is not what is measured.
        resident = settings.data.augment_on == "device" and settings.data.resident_share
        images = RESIDENT[self.device] if resident else 400 * self.batch
        once: Any = self.data.train
        train = concatenate_datasets([once] * (1 + images // len(once)))
        data = dataclasses.replace(self.data, train=train, notes=[])
        torch.manual_seed(0)
        model = build_model(settings.model, self.data.labels)
        processor = build_image_processor(settings.data, model.config.image_size)
        return build_trainer(settings.data, settings.training, model, data, processor, kind=kind)

    def images_per_second(self, name: str, workers: int, begin: int, end: int, **options) -> tuple[float, Stopwatch]:
        """Measure images per second of training, and what its parts take."""
        trainer = self.trainer(name, workers, end, **options)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "EpochLines":
                trainer.remove_callback(callback)
        stopwatch = Stopwatch()
        clock = Clock(begin, end, self.batch, stopwatch)
        trainer.add_callback(clock)
        trainer.training_step = stopwatch.timed("training: forward and backward", trainer.training_step)
        trainer.take_batches = stopwatch.timed("training: get batches", trainer.take_batches)
        if trainer.augment is not None:
            trainer.augment = stopwatch.timed("training: of it augment", trainer.augment)
        trainer.train()
        del trainer
        gc.collect()  # Its data workers end now, and not beside the next run.
        return clock.per_second, stopwatch

    def workers_alone(self, workers: int, flags: list[str], seconds: float) -> float:
        """Measure the images per second that the data workers hand over to a process that does nothing with them."""
        trainer = self.trainer("alone", workers, 1, flags)
        loader = DataLoader(
            trainer.train_dataset, self.batch, True, num_workers=workers, collate_fn=trainer.train_dataset.collate
        )
        return self._rate(iter(loader), workers, seconds)

    def without_training(self, workers: int, flags: list[str], seconds: float) -> float:
        """Measure the images per second that reach the device as training batches, where nothing is trained on them."""
        trainer = self.trainer("pipeline", workers, 1, flags)
        augment = trainer.augment or (lambda batch: batch)
        return self._rate(map(augment, trainer.get_train_dataloader()), workers, seconds)

    def _rate(self, batches, workers: int, seconds: float) -> float:
        for _ in range(max(2, workers)):  # Each worker's first one.
            next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            count += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        rate = self.batch * count / (time.perf_counter() - began)
        del batches
        gc.collect()
        return rate


def parts(pipeline: Pipeline, table: Rates, row: dict, repeats: int) -> None:
    """Time the pieces on their own."""
    contents = [path.read_bytes() for path in sorted(pipeline.folder.glob("train/*/*.jpg"))[:128]]

    def per_second(what: str, function, images: int) -> None:
        function()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        if pipeline.device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / repeats
        table.add(**row, what=what, images_per_second=images / seconds)

    items = [{"bytes": content, "path": None} for content in contents]
    per_second("decode, Pillow, one core", lambda: [decode(item, "") for item in items], len(items))
    per_second("decode, torchvision, one core", lambda: [read(item, "") for item in items], len(items))
    indices = list(range(len(contents)))
    for name, flags in WAYS.items():
        trainer = pipeline.trainer("part", 0, 1, flags)
        images = trainer.train_dataset
        if name != "resident":
            per_second(f"a worker's part, {name}", lambda images=images: images.__getitems__(indices), len(indices))
        if trainer.augment is None:
            continue
        batch = images.collate(images.__getitems__(list(range(pipeline.batch))))
        batch = send_to_device(batch, torch.device(pipeline.device))

        def augment(trainer=trainer, batch=batch):
            return trainer.augment(batch)

        per_second(f"the device's part, {name}", augment, pipeline.batch)
        if pipeline.device == "cuda":
            ms, calls = gpu_time_and_calls(augment)
            table.add(**row, what=f"the device's part, {name}: GPU time", ms=ms, error=f"{calls:.0f} calls to CUDA")


def gpu_time_and_calls(function, repeats: int = 3) -> tuple[float, float]:
    """Profile the GPU time in ms, and count calls that launch or copy something."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    launches = ("cudaLaunch", "cudaGraphLaunch", "cudaMemcpy")
    calls = sum(event.count for event in events if event.key.startswith(launches))
    return sum(event.self_device_time_total for event in events) / repeats / 1e3, calls / repeats


def hyperthreads() -> str:
    """Tell whether two of the cores that the system counts share one."""
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    return f"on the first core: CPU {siblings.read_text().strip()}" if siblings.is_file() else "cores not known"


def run(
    device: str,
    table: Rates,
    batch: int,
    count: int,
    begin: int,
    end: int,
    ways: list[Way],
    basis: str = "fourier G=3",
    mode: str = "recorded",
    alone: bool = True,
) -> None:
    """
    Measure training by each way to augment, beside training on synthetic tensors before and after it.

    Args:
        count: of JPEG files.
        begin, end: steps between which training is timed.
        ways: to augment.
        basis: of `RECIPES`.
        mode: of `MODES`.
        alone: also measure what has nothing to do with the model: the workers, the pipeline, and its parts alone.
    """
    torch.set_num_threads(1)
    shorter = max(begin + 1, (begin + end) // 2)
    folder = Path(tempfile.mkdtemp(prefix="karat-input-"))
    try:
        began = time.perf_counter()
        size = write_photos(folder, count)
        print(f"{count:,} JPEGs, {size / 1e3:.0f} kB each, in {time.perf_counter() - began:.0f} s; {hyperthreads()}")
        pipeline = Pipeline(folder, device, batch, basis)
        row = {"benchmark": "input-pipeline", "model": "tiny", "basis": basis, "batch": batch, "mode": mode}
        row |= {"dtype": "bfloat16" if device == "cuda" else "float32"}
        flags = MODES[mode]

        def synthetic() -> float:
            rate, times = pipeline.images_per_second("synthetic", 0, begin, end, flags=flags, kind=SyntheticTrainer)
            table.add(**row, provider="synthetic", what="train", images_per_second=rate)
            table.add_times(row | {"provider": "synthetic"}, times, batch / rate * 1e3)
            return rate

        before = synthetic()
        for way in ways:
            this = row | {"provider": str(way)}
            last = shorter if way.name == "workers" else end
            rate, times = pipeline.images_per_second(str(way), way.workers, begin, last, flags=[*way.flags, *flags])
            # A host's speed drifts: beside the mean of before and after.
            after = synthetic()
            beside, before = (before + after) / 2, after
            table.add(**this, what="train", images_per_second=rate, ratio=rate / beside)
            table.add_times(this, times, batch / rate * 1e3)
            if alone:
                if way.name != "resident":
                    rate = pipeline.workers_alone(way.workers, way.flags, SECONDS[device])
                    table.add(**this, what="workers alone", images_per_second=rate, ratio=rate / beside)
                rate = pipeline.without_training(way.workers, way.flags, SECONDS[device])
                table.add(**this, what="pipeline without training", images_per_second=rate, ratio=rate / beside)
        if alone:
            parts(pipeline, table, row | {"provider": "part"}, 2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
