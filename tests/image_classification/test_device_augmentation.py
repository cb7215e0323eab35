# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: Pillow's and timm's operations, the draws of the workers' way, every kind of image."""

import importlib.util
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment as timm_operations

from image_classification import device_augmentation
from image_classification import main as script
from image_classification.arguments import DataArguments
from image_classification.augmentation import make_collate
from image_classification.data import decode
from image_classification.device_augmentation import CollateDrawn, DrawTransform
from image_classification.errors import InputError
from image_classification.transforms import ImageDataset, TrainTransform, build_image_processor
from tests.images import make_image_folder


SIZE = (40, 48)
RECIPE = {
    "auto_augment": "rand-m15-n2-mstd1.0-inc1",
    "random_erasing": 0.5,
    "random_erasing_mode": "rand",
    "mixup": 0.8,
    "cutmix": 1.0,
}


def photo(seed: int, height: int = 60, width: int = 90) -> Image.Image:
    """Smooth colours with some noise: what interpolations can be compared on."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def dataset(
    device: bool, images: list[bytes], size=SIZE, device_resize: bool = False, **options
) -> tuple[ImageDataset, object]:
    """A data set, and what makes batches of it."""
    args = DataArguments(**{**RECIPE, **options})
    processor = build_image_processor(DataArguments(eval_crop_ratio=1.0), size)
    features = Features({"image": ImageFeature(decode=False), "label": Value("int64")})
    rows = [{"bytes": content, "path": None} for content in images]
    split = Dataset.from_dict({"image": rows, "label": [i % 3 for i in range(len(rows))]}, features=features)
    transform = DrawTransform(args, size, processor, device_resize) if device else TrainTransform(args, size, processor)
    collate = CollateDrawn(args, size, 3, processor, device_resize) if device else make_collate(args, 3)
    return ImageDataset(split, transform, "training", seed=3), collate


def batch(device: bool, images: list[bytes], epoch: int = 0, **options) -> dict[str, torch.Tensor]:
    data, collate = dataset(device, images, **options)
    data.set_epoch(epoch)
    made = collate([data[index] for index in range(len(data))])
    return made.to(torch.device("cpu")) if device else made


LEVELS = {
    "AutoContrast": [()],
    "Equalize": [()],
    "Invert": [()],
    "Posterize": [(1,), (4,), (7,), (8,)],
    "Solarize": [(0,), (100,), (256,)],
    "SolarizeAdd": [(0,), (60,), (110,)],
    "Color": [(0.1,), (0.7,), (1.0,), (1.9,)],
    "Contrast": [(0.1,), (0.7,), (1.0,), (1.9,)],
    "Brightness": [(0.1,), (0.7,), (1.0,), (1.9,)],
    "Sharpness": [(0.1,), (0.7,), (1.0,), (1.9,)],
    "Rotate": [(0.0,), (-30.0,), (17.0,)],
    "ShearX": [(0.3,), (-0.12,)],
    "ShearY": [(0.3,), (-0.12,)],
    "TranslateX": [(0.0,), (7.0,), (-4.5,)],
    "TranslateY": [(5.0,), (-30.5,)],
    "TranslateXRel": [(0.45,), (-0.1,)],
    "TranslateYRel": [(0.31,)],
}


def finish(**options) -> device_augmentation.DeviceAugmentation:
    return dataset(True, [encode(photo(0))], **options)[1].finish


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("device_kernel_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[2])
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


@pytest.mark.parametrize("name", LEVELS)
def test_operation_is_pillows(name):
    flat = Image.new("RGB", (48, 40), (90, 90, 91))
    dark = Image.fromarray((np.asarray(photo(5, *SIZE)) // 3 + 20).astype(np.uint8))
    # One whose contrast is stretched to whole numbers.
    few = Image.fromarray(np.resize(np.array([66, 199], dtype=np.uint8), (*SIZE, 3)))
    images = [photo(1, *SIZE), photo(2, *SIZE), dark, flat, few]
    resample = {"resample": Image.BICUBIC, "fillcolor": (124, 116, 104)}
    for level in LEVELS[name]:
        expected = torch.stack(
            [to_tensor(timm_operations.NAME_TO_OP[name](image, *level, **resample)) for image in images]
        )
        lowered, numbers = device_augmentation._lowered(name, *level, SIZE)
        six = torch.zeros(len(images), 6)
        six[:, : len(numbers)] = torch.tensor(numbers)
        actual = finish().apply(lowered, torch.stack([to_tensor(image) for image in images]), six)
        difference = (actual.int() - expected.int()).abs()
        if lowered == "Affine":
            # The two cubics differ, most at the rim, where a pixel may also be just inside.
            assert difference.float().mean() < 0.5 and (difference > 6).float().mean() < 0.01, (level, difference.max())
        else:
            assert difference.max() == 0, level


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auto_augment": None, "mixup": 0.0, "cutmix": 0.0},
        {"auto_augment": "original-mstd0.5", "random_erasing_count": 3, "random_erasing_mode": "const"},
        {"auto_augment": "rand-m9-n3-tweights", "random_erasing": 0.0, "cutmix": 0.0},
        {"auto_augment": None, "color_jitter": 0.0, "horizontal_flip": 0.0, "mixup_mode": "elem"},
        {"auto_augment": None, "mixup": 0.0, "cutmix_minmax": [0.3, 0.6]},
    ],
)
def test_same_draws_as_in_the_workers(options):
    images = [encode(photo(seed, 60 + 10 * (seed % 3), 90)) for seed in range(12)]
    expected, actual = batch(False, images, **options), batch(True, images, **options)
    assert torch.equal(actual["labels"], expected["labels"])
    # In steps of a pixel value; solarising and the like turn rounding into jumps at single pixels.
    difference = (actual["pixel_values"] - expected["pixel_values"]).abs() * 255 * 0.22
    assert actual["pixel_values"].dtype == torch.float32
    assert (difference > 8).float().mean() < 0.01
    assert difference.mean() < 0.6


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_jpegs_may_be_left_to_the_device(interpolation):
    """The CPU is a device, too: the same files, crops and resizes, by matrices in place of torchvision's."""
    images = [encode(photo(seed, *((30, 44) if seed % 2 else (180, 130))), subsampling=2) for seed in range(12)]
    images[3] = encode(photo(3), "PNG")
    options = {"auto_augment": None, "color_jitter": 0.0, "train_interpolation": interpolation}
    data, collate = dataset(True, images, device_decode=1.0, **options)
    drawn = collate([data[index] for index in range(len(data))])
    assert drawn.names == [f"training image {index}" for index in range(12) if index != 3]
    expected, actual = batch(True, images, **options), drawn.to(torch.device("cpu"))
    difference = (actual["pixel_values"] - expected["pixel_values"]).abs() * 255 * 0.22
    assert difference.max() < 1.5
    assert torch.equal(actual["labels"], expected["labels"])
    data, collate = dataset(True, images, device_decode=0.5, **options)
    chosen = collate([data[index] for index in range(len(data))]).names
    data.set_epoch(4)
    assert 0 < len(chosen) < 11
    assert chosen == collate([data[index] for index in range(len(data))]).names


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_crops_may_be_left_to_the_device(interpolation):
    """Those that are not much larger than what they become; beside files that are not decoded."""
    sizes = [(30, 44), (180, 130), (60, 90)]
    images = [encode(photo(seed, *sizes[seed % 3]), "PNG" if seed % 2 else "JPEG") for seed in range(12)]
    options = {"auto_augment": None, "color_jitter": 0.0, "train_interpolation": interpolation}
    data, collate = dataset(True, images, device_resize=True, device_decode=0.5, **options)
    drawn = collate([data[index] for index in range(len(data))])
    assert 0 < len(drawn.sides) < 12 - len(drawn.lengths) and 0 < len(drawn.lengths)
    assert (drawn.sides.prod(1) <= device_augmentation.LARGER_CROPS * SIZE[0] * SIZE[1]).all()
    expected, actual = batch(True, images, **options), drawn.to(torch.device("cpu"))
    difference = (actual["pixel_values"] - expected["pixel_values"]).abs() * 255 * 0.22
    # The workers' resize rounds between its two passes.
    assert difference.max() < 2.5 and difference.mean() < 0.2
    assert torch.equal(actual["labels"], expected["labels"])


def test_what_the_device_cannot_decode():
    """Turned, of four colours or cut off: the workers' decoder; damaged inside: named, or read as Pillow reads it."""
    image = photo(1)
    turned = image.getexif()
    turned[0x0112] = 3
    for content in (encode(image, exif=turned), encode(image.convert("CMYK")), encode(image, "PNG")):
        assert torch.is_tensor(device_augmentation.read({"bytes": content, "path": None}, "image", 1.0))
    whole = encode(image)
    with pytest.raises(InputError, match="training image 1 cannot be read"):
        dataset(True, [whole, whole[:-100]], device_decode=1.0)[0][1]
    broken = whole[:200] + b"\xff\xd9"
    with pytest.raises(InputError, match="training image 1"):
        batch(True, [whole, broken, whole], device_decode=1.0)


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_batches_come_from_workers_as_one_tensor(start, workers):
    images = [encode(photo(seed)) for seed in range(8)]
    options = {"device_decode": 0.5, "random_erasing_mode": "pixel"}
    data, collate = dataset(True, images, **options)
    loader = torch.utils.data.DataLoader(
        data,
        4,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=start,
        persistent_workers=True,
        timeout=120,
    )
    for epoch in range(2):
        data.set_epoch(epoch)  # Which workers that run get to know.
        for number, drawn in enumerate(loader):
            kinds = [kind for kind, value in vars(drawn).items() if torch.is_tensor(value)]
            assert kinds == ["data"] and drawn.data.is_shared() and drawn.lengths
            here = collate([data[index] for index in range(4 * number, 4 * number + 4)])
            assert drawn.key == (3, epoch, 4 * number)
            for actual, expected in zip(*(one.to(torch.device("cpu")).values() for one in (drawn, here)), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_batches_lie_in_memory_that_is_shared_once(start, workers):
    """Whatever is taken at once is whole, in epoch after epoch; what does not fit has memory of its own."""
    images = [encode(photo(seed, *((240, 320) if seed < 8 else (60, 90)))) for seed in range(24)]
    data, collate = dataset(True, images, device_decode=1.0)
    assert not collate.share(4, workers, 2, torch.device("cpu"))  # Pinned.
    memory = collate.shared.memory
    loader = torch.utils.data.DataLoader(
        data,
        4,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=start,
        persistent_workers=start == "spawn",
        timeout=120,
    )
    fitted = []
    for epoch in range(2):
        data.set_epoch(epoch)
        for number, drawn in enumerate(loader):
            begin = drawn.data.data_ptr() - memory.data_ptr()
            fitted.append(0 <= begin < len(memory))
            assert fitted[-1] == (len(drawn.data) <= collate.shared.length)
            here = collate([data[index] for index in range(4 * number, 4 * number + 4)])
            for actual, expected in zip(*(one.to(torch.device("cpu")).values() for one in (drawn, here)), strict=True):
                assert torch.equal(actual, expected)
    assert fitted == ([False] * 2 + [True] * 4) * 2


def test_two_iterators_share_no_place():
    """A callback may look into the loader that the training goes through."""
    images = [encode(photo(seed)) for seed in range(24)]
    data, collate = dataset(True, images)
    collate.share(4, 1, 2, torch.device("cpu"))
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, collate_fn=collate, timeout=120)
    first, held = iter(loader), []
    for _ in range(3):
        for drawn in (next(first), *itertools.islice(loader, 4)):
            held.append(drawn.place.held)
            begin = drawn.key[2]
            here = collate([data[index] for index in range(begin, begin + 4)])
            for actual, expected in zip(*(one.to(torch.device("cpu")).values() for one in (drawn, here)), strict=True):
                assert torch.equal(actual, expected)
    assert held == [True, False, False, False, False] * 3


def test_no_place_is_written_to_before_it_is_copied():
    """By when a loader asks a worker for the batch that will lie in a place, the one that lay there has been copied."""
    workers, ahead, log = 3, 2, []

    class Copy:
        def __init__(self, batch):
            self.batch = batch

        def synchronize(self):
            log.append(self.batch)

    shared = device_augmentation.SharedBatches(workers, ahead, 64, torch.device("cpu"))
    for batch in range(20):
        # The loader hands over `batch`, and asks its worker for another one, `ahead` of its own later.
        overwritten = batch + workers * ahead - workers * shared.places
        assert overwritten < 0 or overwritten in log
        shared.taken(Copy(batch))
    assert log == sorted(log)


def test_little_shared_memory_is_told(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(device_augmentation, "SYSTEM_MEMORY", tmp_path)
    monkeypatch.setattr(device_augmentation.shutil, "disk_usage", lambda path: mock.Mock(free=1000))
    _, collate = dataset(True, [])
    assert not collate.share(256, 15, 2, torch.device("cpu"))
    assert collate.shared is None
    assert "--dataloader_num_workers" in caplog.text and "--shm-size" in caplog.text


def test_noise_of_erasing():
    images = [encode(Image.new("RGB", (60, 60), (124, 116, 104)))] * 16
    options = {"auto_augment": None, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.7}
    noisy = batch(True, images, random_erasing_mode="pixel", **options)["pixel_values"]
    erased = batch(False, images, random_erasing_mode="pixel", **options)["pixel_values"].abs().amax(1) > 0.05
    assert 0 < erased.float().mean() < 0.5
    values = noisy.permute(1, 0, 2, 3)[:, erased]
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert noisy.permute(1, 0, 2, 3)[:, ~erased].abs().max() < 0.05


def test_a_key_and_nothing_else_decides():
    images = [encode(photo(seed)) for seed in range(6)]
    first = batch(True, images, random_erasing_mode="pixel")
    torch.randn(5), np.random.rand(5)
    again, other = batch(True, images, random_erasing_mode="pixel"), batch(True, images, 1, random_erasing_mode="pixel")
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_reads_every_image_as_pillow_does():
    image = photo(1)
    rotated = image.getexif()
    rotated[0x0112] = 6
    cases = {
        "JPEG": encode(image),
        "progressive, all chroma": encode(image, progressive=True, subsampling=0),
        "grey": encode(image.convert("L")),
        "CMYK": encode(image.convert("CMYK")),
        "lying on its side": encode(image, exif=rotated),
        "PNG": encode(image, "PNG"),
        "palette": encode(image.convert("P"), "PNG"),
        "transparent": encode(image.convert("RGBA"), "PNG"),
    }
    for name, content in cases.items():
        item = {"bytes": content, "path": None}
        expected = to_tensor(decode(item, "image"))
        actual = device_augmentation.read(item, "image")
        assert actual.shape == expected.shape and actual.dtype == torch.uint8, name
        assert (actual.int() - expected.int()).abs().max() <= 2, name


def test_broken_images_are_named(tmp_path):
    whole = encode(photo(1))
    for content, message in ((whole[: len(whole) // 2], "cannot be read"), (b"text", "cannot be read")):
        with pytest.raises(InputError, match=f"training image 0 {message}"):
            dataset(True, [content])[0][0]
    path = tmp_path / "gone.jpg"
    with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
        device_augmentation.read({"path": str(path), "bytes": None}, "image")
    path.write_bytes(whole)
    assert torch.equal(
        device_augmentation.read({"path": str(path), "bytes": None}, "image"),
        device_augmentation.read({"path": None, "bytes": whole}, "image"),
    )


@pytest.mark.parametrize("policy, named", [("augmix-m5-w4-d2", "chains"), ("3a", "GaussianBlurRand")])
def test_what_only_workers_do_is_refused(policy, named):
    with pytest.raises(InputError, match=f"{named}.*--augment_on workers"):
        dataset(True, [], auto_augment=policy)


def test_run_through_the_script_goes_on_exactly(tmp_path, small):
    """Also where the batches come from another process, and where training goes on within an epoch."""
    images = make_image_folder(tmp_path / "images", (("train", 14), ("validation", 1)))
    words = [*small, "--data_path", str(images), "--augment_on", "device", "--device_decode", "0.5"]
    words += ["--model", "karat_digits", "--image_size", "16", "--patch_size", "8", "--num_train_epochs", "2"]
    words += ["--save_strategy", "steps", "--save_steps", "1"]  # Three steps an epoch.
    words += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--mixup", "0.8", "--save_total_limit", "0"]
    words = [*words, "--eval_strategy", "no", "--learning_rate", "1e-2"]
    whole, part, by_worker = (tmp_path / name for name in ("whole", "part", "by_worker"))
    assert script.main([*words, "--output_dir", str(whole)]) == 0
    checkpoint = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    assert script.main([*words, *checkpoint, "--output_dir", str(part)]) == 0
    again = [word if word != "0" or words[i - 1] != "--dataloader_num_workers" else "1" for i, word in enumerate(words)]
    assert again != words
    assert script.main([*again, "--output_dir", str(by_worker)]) == 0
    weights = [load_file(folder / "model.safetensors") for folder in (whole, part, by_worker)]
    before = load_file(whole / "checkpoint-2" / "model.safetensors")
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor) and torch.equal(weights[2][name], tensor), name
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights[0].items())


def test_decoder_of_the_device_is_for_its_pipeline(image_folder, tmp_path, small, capsys):
    words = [*small, "--data_path", str(image_folder), "--output_dir", str(tmp_path / "run")]
    assert script.main([*words, "--device_decode", "1"]) == 2
    assert "augment_on" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"device_decode.*xpu"):
        device_augmentation.check_device_decode(torch.device("xpu"))
