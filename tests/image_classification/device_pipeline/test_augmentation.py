# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: Pillow's operations, what was drawn, images that are resident and ones that are not."""

import json
import multiprocessing
import types

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment as timm_operations

from image_classification import main as script
from image_classification.data.dataset import ImageDataset
from image_classification.data.images import decode
from image_classification.data.sources import ImageData
from image_classification.data.transforms import EvalTransform, TrainTransform, build_image_processor
from image_classification.device_pipeline import augmentation, resident
from image_classification.device_pipeline.augmentation import DeviceAugmentation, build_augmentation
from image_classification.device_pipeline.draws import BOX, CODES, FLIP, LAYERS, MATRICES, MIX, WORDS
from image_classification.device_pipeline.resident import (
    CropTransform,
    ResidentDataset,
    ResidentEvaluation,
    ResidentImages,
    collate_for_device,
    load_resident,
    read,
)
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments
from image_classification.settings.parser import parse_settings
from tests.images import encode, make_image_folder
from tests.system.processes import in_two_forks


SIZE = (40, 48)
CPU = torch.device("cpu")
RECIPE = {
    "auto_augment": "rand-m15-n2-mstd1.0-inc1",
    "random_erasing": 0.5,
    "random_erasing_mode": "rand",
    "mixup": 0.8,
    "cutmix": 1.0,
}
NOTHING = {"auto_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


def photo(seed: int, height: int = 60, width: int = 90) -> Image.Image:
    """Smooth colours with some noise: what interpolations can be compared on."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def make_split(images: list[bytes]) -> Dataset:
    features = Features({"image": ImageFeature(decode=False), "label": Value("int64")})
    rows = [{"bytes": content, "path": None} for content in images]
    return Dataset.from_dict({"image": rows, "label": [i % 3 for i in range(len(rows))]}, features=features)


def pipeline(images: list[bytes], is_resident: bool, device: torch.device = CPU, share: float = 0.5, **options):
    """A data set, and what makes training batches of its batches."""
    args = DataArguments(**{**RECIPE, **options})
    split = make_split(images)
    kept = load_resident(split, "training", device, share)[0] if is_resident else None
    items = len(split) * (3 if args.repeated_aug else 1)
    processor = build_image_processor(DataArguments(eval_crop_ratio=1.0), SIZE)
    augment = DeviceAugmentation(args, SIZE, 3, processor, 3, items, kept)
    if is_resident:
        return ResidentDataset(split, "training", args.repeated_aug), augment
    return ImageDataset(split, CropTransform(args, SIZE), "training", 3, read=read, collate=collate_for_device), augment


def to(batch: dict, device: torch.device = CPU) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def batch(images: list[bytes], is_resident: bool = True, epoch: int = 0, indices=None, device=CPU, **options):
    data, augment = pipeline(images, is_resident, device, **options)
    data.set_epoch(epoch)
    indices = list(range(len(images))) if indices is None else indices
    return augment(to(data.collate(data.__getitems__(indices)), device))


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


def matrix(name: str, number: float, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """The six numbers of an affine operation."""
    return torch.tensor([float(x) for x in MATRICES[name](torch.tensor(number, dtype=torch.float64), *size)])


@pytest.mark.parametrize("name", LEVELS)
def test_operation_is_pillows(name):
    flat = Image.new("RGB", (48, 40), (90, 90, 91))
    dark = Image.fromarray((np.asarray(photo(5, *SIZE)) // 3 + 20).astype(np.uint8))
    # One whose contrast is stretched to whole numbers.
    few = Image.fromarray(np.resize(np.array([66, 199], dtype=np.uint8), (*SIZE, 3)))
    images = [photo(1, *SIZE), photo(2, *SIZE), dark, flat, few]
    resample = {"resample": Image.BICUBIC, "fillcolor": (124, 116, 104)}
    _, augment = pipeline([encode(photo(0))], True)
    for level in LEVELS[name]:
        expected = torch.stack(
            [to_tensor(timm_operations.NAME_TO_OP[name](image, *level, **resample)) for image in images]
        )
        numbers = matrix(name, *level) if name in MATRICES else torch.tensor([*level, 0.0])
        kind = "Affine" if name in MATRICES else name
        planes = torch.stack([to_tensor(image) for image in images])
        actual = augment.apply(kind, planes, numbers.expand(len(images), -1))
        difference = (actual.int() - expected.int()).abs()
        if name in MATRICES:
            # The two cubics differ, most at the rim, where a pixel may also be just inside.
            assert difference.float().mean() < 0.5 and (difference > 6).float().mean() < 0.01, (level, difference.max())
        else:
            assert difference.max() == 0, level


def expected_image(image: Image.Image, row: np.ndarray, augment: DeviceAugmentation) -> torch.Tensor:
    """What Pillow makes of an image and a row of numbers: fp32 (3, height, width), normalised."""
    top, left, tall, wide = row[BOX:FLIP].tolist()
    image = image.resize(SIZE[::-1], Image.BICUBIC, (left, top, left + wide, top + tall))
    image = image.transpose(Image.FLIP_LEFT_RIGHT) if row[FLIP] else image
    for layer in range(augment.draws.layers):
        code, *numbers = row[LAYERS + layer * WORDS :][:WORDS].tolist()
        if code == CODES["Affine"]:
            image = image.transform(image.size, Image.AFFINE, numbers, Image.BICUBIC, fillcolor=(124, 116, 104))
        elif code:
            name = next(name for name in CODES if CODES[name] == code)
            number = [int(numbers[0])] if name in ("Posterize", "Solarize", "SolarizeAdd") else numbers[:1]
            image = timm_operations.NAME_TO_OP[name](image, *(number if LEVELS[name] != [()] else []))
    pixels = (to_tensor(image) / 255 - torch.tensor(augment.mean)[:, None, None]) / torch.tensor(augment.std)[
        :, None, None
    ]
    for part in range(augment.draws.parts):
        top, bottom, left, right, *colour = row[augment.draws.begin_of_parts + part * WORDS :][:WORDS].tolist()
        pixels[:, int(top) : int(bottom), int(left) : int(right)] = torch.tensor(colour)[:, None, None]
    return pixels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.0, "mixup_mode": "elem"},
        {"cutmix": 0.0, "mixup_mode": "pair", "random_erasing_mode": "const", "random_erasing_count": 3},
        {"auto_augment": "original-mstd0.5", "mixup": 0.0, "cutmix": 0.0},
        {"auto_augment": None, "horizontal_flip": 1.0, "cutmix_minmax": [0.3, 0.6], "mixup": 0.0},
    ],
)
@pytest.mark.parametrize("count", [12, 7])
def test_batches_are_what_was_drawn(options, count):
    """Pillow's images, mixed by hand as timm does it."""
    images = [photo(seed, 60 + 10 * (seed % 3), 90) for seed in range(count)]
    contents = [encode(image, "PNG") for image in images]
    data, augment = pipeline(contents, True, **options)
    for epoch in range(2):
        data.set_epoch(epoch)
        made = data.collate(data.__getitems__(list(range(count))))
        rows, actual = augment.drawn(made).numpy(), augment(made)
        whole = torch.stack([expected_image(*pair, augment) for pair in zip(images, rows, strict=True)])
        expected, labels, targets = whole.clone(), torch.eye(3)[torch.arange(count) % 3], torch.zeros(count, 3)
        even = count - count % 2
        for index in range(count):
            partner = even - 1 - index if index < even else index
            leader = {"batch": 0, "pair": min(index, partner), "elem": index}[augment.mode or "batch"]
            share, *box, own = rows[leader][MIX:LAYERS].tolist()
            top, bottom, left, right = map(int, box)
            if augment.mode is not None and partner != index:
                expected[index] = share * whole[index] + (1 - share) * whole[partner]
                expected[index][:, top:bottom, left:right] = whole[partner][:, top:bottom, left:right]
            targets[index] = own * labels[index] + (1 - own) * labels[partner]
        if augment.mode is None:
            assert actual["labels"].tolist() == [index % 3 for index in range(count)]
        else:
            torch.testing.assert_close(actual["labels"], targets if count % 2 == 0 else actual["labels"])
            torch.testing.assert_close(actual["labels"][:even], targets[:even])
            assert torch.equal(actual["labels"][even:], labels[even:])
        # In steps of a pixel value; solarising and the like turn rounding into jumps at single pixels.
        difference = (actual["pixel_values"] - expected).abs() * 255 * 0.22
        assert actual["pixel_values"].dtype == torch.float32
        assert (difference > 8).float().mean() < 0.01 and difference.mean() < 0.6


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_workers_crop_as_torchvision_does(interpolation):
    """By the random numbers of the way that leaves everything to the workers."""
    images = [encode(photo(seed, *((30, 44), (180, 130))[seed % 2])) for seed in range(8)]
    options = {**NOTHING, "train_interpolation": interpolation, "horizontal_flip": 0.0}
    data, _ = pipeline(images, False, **options)
    args = DataArguments(**options)
    processor = build_image_processor(DataArguments(eval_crop_ratio=1.0), SIZE)
    expected = ImageDataset(data.split, TrainTransform(args, SIZE, processor), "training", 3)
    for epoch in range(2):
        data.set_epoch(epoch), expected.set_epoch(epoch)
        made = batch(images, False, epoch, **options)
        for index in range(8):
            difference = (made["pixel_values"][index] - expected[index]["pixel_values"]).abs() * 255 * 0.22
            # Where two pixels are equally near, Pillow and torch may each take another one.
            assert (difference > 2.5).float().mean() <= (0.1 if interpolation == "nearest" else 0)
            assert difference.mean() < 0.5


@pytest.mark.system
@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_batches_of_workers(start, workers):
    """The device's part is drawn for the index, whatever worker has read the image."""
    images = [encode(photo(seed)) for seed in range(8)]
    data, augment = pipeline(images, False, random_erasing_mode="pixel")
    loader = torch.utils.data.DataLoader(
        data,
        4,
        num_workers=workers,
        collate_fn=data.collate,
        multiprocessing_context=start,
        persistent_workers=True,
        timeout=120,
    )
    for epoch in range(2):
        data.set_epoch(epoch)  # Which workers that run get to know.
        for number, actual in enumerate(loader):
            assert actual["pixels"].shape == (4, *SIZE, 3) and actual["pixels"].dtype == torch.uint8
            here = batch(images, False, epoch, range(4 * number, 4 * number + 4), random_erasing_mode="pixel")
            for name, expected in here.items():
                assert torch.equal(augment(actual)[name], expected)


def test_noise_of_erasing():
    images = [encode(Image.new("RGB", (60, 60), (124, 116, 104)))] * 16
    options = {**NOTHING, "random_erasing": 0.7}
    noisy = batch(images, random_erasing_mode="pixel", **options)["pixel_values"]
    erased = batch(images, random_erasing_mode="rand", **options)["pixel_values"].abs().amax(1) > 0.05
    assert 0 < erased.float().mean() < 0.5
    values = noisy.permute(1, 0, 2, 3)[:, erased]
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert noisy.permute(1, 0, 2, 3)[:, ~erased].abs().max() < 0.05


@pytest.mark.parametrize("is_resident", [True, False])
def test_seed_epoch_and_index_decide_and_nothing_else(is_resident):
    images = [encode(photo(seed)) for seed in range(6)]
    options = {"random_erasing_mode": "pixel", "mixup": 0.0, "cutmix": 0.0}
    first = batch(images, is_resident, **options)["pixel_values"]
    torch.randn(5), np.random.rand(5)
    assert torch.equal(first, batch(images, is_resident, **options)["pixel_values"])
    assert torch.equal(first[[4, 1, 5]], batch(images, is_resident, indices=[4, 1, 5], **options)["pixel_values"])
    assert not torch.equal(first, batch(images, is_resident, 1, **options)["pixel_values"])


def test_numbers_of_several_blocks_and_repetitions(monkeypatch):
    """An index has the row of its block; under repeated augmentation it is one image with several rows."""
    monkeypatch.setattr(augmentation, "BLOCK", 4)
    images = [encode(photo(seed)) for seed in range(5)]
    data, augment = pipeline(images, True, repeated_aug=True, **NOTHING)
    made = data.collate(data.__getitems__([1, 6, 11, 14]))
    assert augment.blocks == 4
    rows, sides = augment.drawn(made), augment.images.sides
    for row, index in zip(rows, (1, 6, 11, 14), strict=True):
        block, place = divmod(index, 4)
        items = torch.arange(4 * block, 4 * block + 4) % 5
        assert torch.equal(row, augment.draws.draw(CPU, 0, block, 4, sides[items])[place])
    assert augment(made)["labels"].tolist() == [1, 1, 1, 1]
    assert len(torch.unique(rows, dim=0)) == 4


def test_numbers_of_a_stream():
    """Blocks are drawn as they are reached, and some are kept; an epoch begins again."""
    args = DataArguments(**NOTHING | {"color_jitter": 0.4})
    processor = build_image_processor(DataArguments(eval_crop_ratio=1.0), SIZE)
    augment = DeviceAugmentation(args, SIZE, 3, processor, 3, 10**9, in_order=True)
    for epoch, first in [(0, 0), (0, 65_530), (0, 400_000), (0, 399_000), (1, 0), (0, 9 * 10**8)]:
        index = torch.arange(first, first + 12)
        rows = augment.drawn({"index": index, "epoch": epoch, "first": first, "last": first + 11})
        needed = {first // 65_536, (first + 11) // 65_536}
        blocks = {block: augment.draws.draw(CPU, epoch, block, 65_536) for block in needed}
        assert torch.equal(rows, torch.stack([blocks[int(i) // 65_536][int(i) % 65_536] for i in index]))
    assert len(augment.table) == 4 * 65_536


def test_what_fits_is_resident():
    images = [encode(photo(seed, 60 + seed, 90), "PNG") for seed in range(5)]
    kept, how = load_resident(make_split(images), "training", CPU, 0.5)
    assert "decoded once" in how and "in memory" in how
    assert kept.tallest == 64 and kept.labels.tolist() == [0, 1, 2, 0, 1]
    for index in range(5):
        expected = to_tensor(photo(index, 60 + index, 90)).permute(1, 2, 0)
        assert torch.equal(kept.crop(index, [0, 0, 60 + index, 90]), expected)
        assert torch.equal(kept.crop(index, [3, 5, 20, 30]), expected[3:23, 5:35])
    kept, how = load_resident(make_split(images), "training", CPU, 1e-9)
    assert kept is None and "resident_share" in how


@pytest.mark.system
def test_processes_decide_alike(capfd):
    """By the least memory that one of them sees free: the ways draw different crops."""
    split = make_split([encode(photo(seed), "PNG") for seed in range(3)])

    def fits() -> int:
        PartialState._reset_state()
        state = PartialState(cpu=True)
        free = 10**9 if state.process_index == 0 else 1000
        resident.psutil.virtual_memory = lambda: types.SimpleNamespace(available=free)
        return int(load_resident(split, "training", CPU, 1.0, processes=2)[0] is not None)

    assert in_two_forks(fits) == [0, 0], capfd.readouterr()


@pytest.mark.parametrize("share, fits", [(0.5, True), (0.3, False)])
def test_one_share_is_for_training_and_evaluation(share, fits, monkeypatch):
    images, processor = 100, build_image_processor(DataArguments(), 10)
    properties = types.SimpleNamespace(total_memory=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    pixels = types.SimpleNamespace(numel=lambda: 10_000, device=torch.device("cuda"))
    of_training = ResidentImages(pixels, *[torch.zeros(1)] * 3, tallest=1)
    how = images, (10, 10), processor, torch.device("cuda"), share
    assert ResidentEvaluation.fits(*how) and ResidentEvaluation.fits(*how, of_training) == fits


@pytest.mark.system
def test_workers_that_are_started_anew_decode():
    """As Python 3.14 starts them: what they need is sent to them."""
    images = [encode(photo(seed, 60 + seed, 90), "PNG") for seed in range(5)]
    split, processor = make_split(images), build_image_processor(DataArguments(eval_crop_ratio=1.0), SIZE)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        kept, _ = load_resident(split, "training", CPU, 0.5, workers=1)
        held = ResidentEvaluation(split, "validation", processor, CPU, 1)
        made = held.finish({"index": torch.arange(5)})
    finally:
        multiprocessing.set_start_method(before, force=True)
    here, _ = load_resident(split, "training", CPU, 0.5)
    assert torch.equal(kept.pixels, here.pixels)
    expected = ResidentEvaluation(split, "validation", processor, CPU, 0).finish({"index": torch.arange(5)})
    assert torch.equal(made["pixel_values"], expected["pixel_values"])


def test_what_is_larger_than_it_seemed(monkeypatch):
    """The estimate is by some images; what counts is all of them."""
    sizes = (20, 200, 200, 20)
    split = make_split([encode(photo(seed, size, size), "PNG") for seed, size in enumerate(sizes)])
    monkeypatch.setattr(resident, "SAMPLE", 2)
    monkeypatch.setattr(resident, "AT_ONCE", 1)
    monkeypatch.setattr(resident, "BYTES_AT_ONCE", 1)
    for available, fits in ((10_000, False), (200_000, False), (300_000, True)):
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr(resident.psutil, "virtual_memory", lambda memory=memory: memory)
        kept, how = load_resident(split, "training", CPU, 1.0)
        assert (kept is not None) == fits and ("resident_share" in how) != fits
    for index, size in enumerate(sizes):
        expected = to_tensor(photo(index, size, size)).permute(1, 2, 0)
        assert torch.equal(kept.crop(index, [0, 0, size, size]), expected)


@pytest.mark.parametrize("size, parts", [(8, 1), (64, 2)])
def test_small_images_are_handed_over_together(size, parts, monkeypatch):
    """As many as have so many bytes, but never fewer than so many."""
    monkeypatch.setattr(resident, "AT_ONCE", 3)
    monkeypatch.setattr(resident, "BYTES_AT_ONCE", 3 * 5 * 8 * 8)
    split, loaders = make_split([encode(photo(seed, size, size), "PNG") for seed in range(5)]), []
    in_workers = resident.in_workers
    monkeypatch.setattr(
        resident, "in_workers", lambda decoded, *told: (loaders.append(decoded), in_workers(decoded, *told))[1]
    )
    kept, _ = load_resident(split, "training", CPU, 1.0)
    assert len(loaders[0]) == parts and len(kept) == 5
    expected = to_tensor(photo(4, size, size)).permute(1, 2, 0)
    assert torch.equal(kept.crop(4, [0, 0, size, size]), expected)


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
        expected = to_tensor(decode(item, "image")).permute(1, 2, 0)
        actual = read(item, "image")
        assert actual.shape == expected.shape and actual.dtype == torch.uint8, name
        assert (actual.int() - expected.int()).abs().max() <= 2, name


@pytest.mark.parametrize("is_resident", [True, False])
def test_broken_images_are_named(tmp_path, is_resident):
    whole = encode(photo(1))
    for content, message in ((whole[: len(whole) // 2], "cannot be read"), (b"text", "cannot be read")):
        with pytest.raises(InputError, match=f"training image.* {message}"):
            batch([whole, content, whole], is_resident)
    path = tmp_path / "gone.jpg"
    with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
        read({"path": str(path), "bytes": None}, "image")
    path.write_bytes(whole)
    assert torch.equal(read({"path": str(path), "bytes": None}, "image"), read({"path": None, "bytes": whole}, "image"))


def test_who_augments(monkeypatch, caplog):
    """By default the device, where it has kernels that know the operations; the log says why not."""
    caplog.set_level("INFO")
    split = make_split([encode(photo(seed)) for seed in range(3)])
    processor = build_image_processor(DataArguments(eval_crop_ratio=1.0), SIZE)

    def choose(*words: str, device: str = "cuda", kernels: object = "some") -> tuple[DeviceAugmentation | None, str]:
        settings = parse_settings(["--use_cpu", "--output_dir", "out", *words])
        data = ImageData("test", split, split, list("abc"), None, [])
        for name, value in (("device", torch.device(device)), ("world_size", 1)):
            monkeypatch.setattr(type(settings.training), name, value)
        monkeypatch.setattr(augmentation, "kernels_on", lambda device: kernels)
        monkeypatch.setattr(augmentation, "load_resident", lambda *_: load_resident(split, "training", CPU, 0.1))
        caplog.clear()
        return build_augmentation(settings.data, settings.training, SIZE, data, processor), caplog.text

    augment, note = choose()
    assert augment.images is not None and "on the device" in note and "decoded once" in note
    augment, note = choose("--resident_share", "0")
    assert augment.images is None and "workers decode" in note
    assert choose(device="cpu") == (None, "") and choose("--augment_on", "workers") == (None, "")
    for why, chosen in (("Triton", choose(kernels=None)), ("3a", choose("--aa", "3a"))):
        assert chosen[0] is None and why in chosen[1]
    assert choose("--augment_on", "device", device="cpu", kernels=None)[0] is not None
    with pytest.raises(InputError, match="GaussianBlurRand"):
        choose("--augment_on", "device", "--aa", "3a")


@pytest.mark.system
@pytest.mark.parametrize("share", ["0.2", "0"])
def test_run_through_the_script_goes_on_exactly(tmp_path, small, share, capsys):
    """Also where the batches come from another process, and where training goes on within an epoch."""
    images = make_image_folder(tmp_path / "images", (("train", 14), ("validation", 1)))
    words = [*small, "--data_path", str(images), "--augment_on", "device", "--resident_share", share]
    words += ["--model", "karat_digits", "--image_size", "16", "--patch_size", "8", "--num_train_epochs", "2"]
    words += ["--save_strategy", "steps", "--save_steps", "1"]  # Three steps an epoch.
    words += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--mixup", "0.8", "--save_total_limit", "0"]
    words = [*words, "--eval_strategy", "no", "--learning_rate", "1e-2"]
    whole, part, by_worker = (tmp_path / name for name in ("whole", "part", "by_worker"))
    assert script.main([*words, "--output_dir", str(whole)]) == 0
    assert ("decoded once" in capsys.readouterr().out) == (share != "0")
    again = [word if word != "0" or words[i - 1] != "--dataloader_num_workers" else "1" for i, word in enumerate(words)]
    assert again != words
    checkpoint = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    assert script.main([*again, *checkpoint, "--output_dir", str(part)]) == 0
    assert script.main([*again, "--output_dir", str(by_worker)]) == 0
    weights = [load_file(folder / "model.safetensors") for folder in (whole, part, by_worker)]
    before = load_file(whole / "checkpoint-2" / "model.safetensors")
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor) and torch.equal(weights[2][name], tensor), name
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights[0].items())


def mixed_files() -> list[bytes]:
    """Sizes, kinds and modes side by side."""
    images = [photo(seed, 50 + 3 * seed, 70 - 5 * seed) for seed in range(5)]
    modes = [images[3].convert("L"), images[4].convert("P")]
    return [encode(images[0]), encode(images[1], "PNG"), encode(images[2]), *(encode(image, "PNG") for image in modes)]


@pytest.mark.system
@pytest.mark.parametrize("workers", [0, 2])
def test_resident_evaluation_sees_what_the_pipeline_sees(workers):
    """Bit for bit, in any order."""
    split, processor = make_split(mixed_files()), build_image_processor(DataArguments(), 32)
    held = ResidentEvaluation(split, "validation", processor, CPU, workers)
    plain = ImageDataset(split, EvalTransform(processor), "validation")
    for indices in ([0, 1, 2, 3, 4], [4, 2]):
        expected = plain.collate(plain.__getitems__(indices))
        found = held.finish(held.collate(held.__getitems__(indices)))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert held.pixels.dtype == torch.uint8 and len(held) == 5


def test_resident_evaluation_names_a_broken_image():
    split = make_split([*mixed_files()[:2], encode(photo(9))[:200]])
    held = ResidentEvaluation(split, "validation", build_image_processor(DataArguments(), 32), CPU, 0)
    with pytest.raises(InputError, match="validation image 2"):
        held.finish({"index": torch.tensor([0])})


def test_a_run_evaluates_resident_images(tmp_path, small, monkeypatch):
    """As with images that are read each time: every figure of the log."""
    images = make_image_folder(tmp_path / "images")
    logs = []
    for fits in (False, True):
        monkeypatch.setattr(ResidentEvaluation, "fits", staticmethod(lambda *_, fits=fits: fits))
        words = [*small, "--model", "vit_tiny_patch16_224", "--image_size", "32", "--patch_size", "8"]
        words += ["--data_path", str(images), "--augment_on", "device", "--num_train_epochs", "2", "--model_ema"]
        words += ["--repeated_aug"]
        assert script.main([*words, "--output_dir", str(tmp_path / str(fits))]) == 0
        history = json.loads((tmp_path / str(fits) / "history.json").read_text())
        timeless = [
            {key: value for key, value in row.items() if "runtime" not in key and "second" not in key}
            for row in history
        ]
        logs.append(timeless)
    assert logs[0] == logs[1] and len(logs[0]) == 2 and "eval_ema_loss" in logs[0][0]


@pytest.mark.system
@pytest.mark.parametrize("share", ["0.2", "0"])
def test_two_processes_train_as_one(tmp_path, small, share, capfd):
    """An item's numbers are the same in whichever process it is."""
    images = make_image_folder(tmp_path / "images", (("train", 8), ("validation", 1)))
    words = [*small, "--data_path", str(images), "--augment_on", "device", "--resident_share", share]
    words += ["--model", "karat_digits", "--image_size", "16", "--patch_size", "8", "--num_train_epochs", "2"]
    words += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--eval_strategy", "no", "--learning_rate", "1e-2"]
    size = words.index("--per_device_train_batch_size") + 1
    one, two = ([*words[:size], batch, *words[size + 1 :]] for batch in ("8", "4"))
    assert script.main([*one, "--output_dir", str(tmp_path / "one")]) == 0
    statuses = in_two_forks(lambda: script.main([*two, "--output_dir", str(tmp_path / "two")]))
    assert statuses == [0, 0], capfd.readouterr()
    losses = [json.loads((tmp_path / name / "all_results.json").read_text())["train_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
