# SPDX-License-Identifier: Apache-2.0
"""
The kernels of augmentation against the formulas in PyTorch. `tests/system/test_kernels.py` runs this file in a process
of its own, because Triton reads TRITON_INTERPRET when it is imported; on a machine with an NVIDIA GPU it can be run
directly:

    python -m pytest tests/image_classification/device_pipeline/kernel_cases.py
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from image_classification.device_pipeline import augmentation, kernels, resident
from image_classification.device_pipeline.draws import BOX, CODES, FLIP, LAYERS, MIX, SEED, WORDS
from image_classification.device_pipeline.resident import ResidentImages
from tests.image_classification.device_pipeline.test_augmentation import NOTHING, matrix, photo, pipeline, to, to_tensor
from tests.images import encode


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
FILL = [124, 116, 104]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Whatever a kernel leaves unwritten is not what it should be."""
    new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty

    def poisoned(make):
        return lambda *args, **kwargs: made.fill_(77) if (made := make(*args, **kwargs)).numel() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch, "empty", poisoned(empty))


def pictures(height: int, width: int) -> torch.Tensor:
    """Smooth, noise, flat, dark, two values only, and one value but for a pixel: uint8 (6, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    smooth = to_tensor(photo(1, height, width))
    noise = torch.randint(0, 256, smooth.shape, dtype=torch.uint8, generator=generator)
    flat = torch.tensor([90, 90, 91], dtype=torch.uint8)[:, None, None].expand_as(smooth)
    dot = flat.clone()
    dot[:, 0, 0] = 7
    return torch.stack([smooth, noise, flat, smooth // 3 + 20, noise // 128 * 255, dot]).to(DEVICE)


LEVELS = {
    "Posterize": [0, 1, 4, 7.9, 8],
    "Solarize": [0, 100, 100.5, 256],
    "SolarizeAdd": [0, 60, 110.7],
    **{name: [0.1, 0.7, 1.0, 1.9, -0.3] for name in ("Color", "Contrast", "Brightness", "Sharpness")},
}


@pytest.mark.parametrize("height, width", [(23, 37), (3, 4)])
def test_operations_in_whole_numbers(height, width):
    """All of them side by side in one launch, and images that nothing happens to."""
    images, expected, drawn = [], [], []
    for name in (None, *augmentation.OPERATIONS):
        for place, level in enumerate(LEVELS.get(name, [0])):
            # Each level has two of the pictures: the interpreter runs a program for each.
            these = pictures(height, width)[place % 3 :: 3] if name in LEVELS else pictures(height, width)
            number = torch.full((len(these), 1, 1, 1), float(level), device=DEVICE)
            images.append(these)
            expected.append(these if name is None else augmentation.OPERATIONS[name](these, number))
            drawn += [[77.0, CODES.get(name, 0), *[level] * 6]] * len(these)
    drawn = torch.tensor(drawn, device=DEVICE)
    actual = kernels.operate(torch.cat(images), drawn, 1, FILL, "bicubic")
    different = (actual != torch.cat(expected)).flatten(1).any(1)
    assert not different.any(), drawn[different]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_affine(interpolation):
    size = height, width = 16, 31
    matrices = [
        matrix(name, number, size)
        for name, number in [
            *(("Rotate", degrees) for degrees in (0.0, 90.0, -30.0)),
            *(("ShearX", 0.3), ("ShearY", -0.12), ("TranslateX", -4.5), ("TranslateY", 40.0)),
        ]
    ]
    numbers = torch.stack(matrices).to(DEVICE)
    images = pictures(height, width)[:2].repeat(4, 1, 1, 1)[: len(matrices)]
    drawn = F.pad(numbers, (1, 0), value=CODES["Affine"])
    expected = augmentation.affine(images, numbers, FILL, interpolation)
    actual = kernels.operate(images, drawn, 0, FILL, interpolation)
    difference = (actual.int() - expected.int()).abs()
    # What is a whole number but for fp32 is rounded down to that number or the one below.
    assert difference.max() <= (0 if interpolation == "nearest" else 1)
    assert (difference > 0).float().mean() < 0.1
    # The kernel's cubics are exact on equal pixels.
    flat = torch.tensor(FILL, dtype=torch.uint8, device=DEVICE)[:, None, None].expand(2, 3, height, width)
    actual = kernels.operate(flat.contiguous(), drawn[2:4].contiguous(), 0, FILL, interpolation)
    assert (actual == flat).all()


def drawn_at_random(images: int, layers: int, parts: int, size: tuple[int, int], affine: bool) -> torch.Tensor:
    """Rows such as any policy might draw."""
    rng, (height, width) = np.random.default_rng(5), size
    drawn = torch.zeros(images, LAYERS + (layers + parts) * WORDS)
    for row in drawn:
        row[FLIP], row[SEED] = float(rng.integers(0, 2)), float(rng.integers(0, 2**24))
        top, left = rng.integers(0, [height, width])
        share = rng.random()
        row[MIX:LAYERS] = torch.tensor([share, top, height, left, width, share])
        for layer in range(layers):
            code = int(rng.integers(0, len(CODES) + affine))
            numbers = row[LAYERS + layer * WORDS :][:WORDS]
            numbers[0] = code
            if code == CODES["Affine"]:
                numbers[1:] = matrix("Rotate", float(rng.uniform(-30, 30)), size)
            elif code:
                name = next(name for name in CODES if CODES[name] == code)
                numbers[1] = float(rng.choice(LEVELS.get(name, [0])))
        for part in range(parts):
            box = row[LAYERS + (layers + part) * WORDS :][:WORDS]
            top, left = rng.integers(0, [height, width])
            if rng.random() < 0.7:
                box[:4] = torch.tensor([top, rng.integers(top + 1, height + 1), left, rng.integers(left, width) + 1])
                box[4:] = torch.from_numpy(rng.normal(size=3))
    return drawn.to(DEVICE)


@pytest.mark.parametrize(
    "images, layers, parts, affine, mode",
    [
        (2, 0, 0, False, None),
        (7, 3, 0, False, "batch"),
        (5, 2, 3, False, "elem"),
        (6, 2, 1, True, "pair"),
        (1, 1, 1, False, "batch"),
    ],
)
def test_sequences(images, layers, parts, affine, mode):
    size = height, width = 25, 34
    drawn = drawn_at_random(images, layers, parts, size, affine)
    _, augment = pipeline([encode(photo(0))], False, random_erasing_mode="const")
    augment.mode, augment.draws.layers, augment.draws.parts = mode, layers, parts
    augment.draws.begin_of_parts = LAYERS + layers * WORDS
    pixels = pictures(height, width).permute(0, 2, 3, 1).repeat(2, 1, 1, 1)[:images].contiguous()
    expected = augment.change(augment.flipped(pixels, None, drawn), drawn)
    actual = augment.change_by_kernels(kernels, pixels, None, drawn)
    difference = (actual - expected).abs() * 255 * 0.22
    if affine:
        assert (difference > 2).float().mean() < 0.02
    else:
        assert difference.max() < 1e-3


def cropped(image: torch.Tensor, box, size, interpolation: str) -> torch.Tensor:
    """As torchvision does it, rounded once: uint8 (3, *size)."""
    top, left, height, width = box
    crop = image.cpu()[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    mode = "nearest-exact" if interpolation == "nearest" else interpolation
    resized = F.interpolate(crop, size, mode=mode, antialias=interpolation != "nearest")[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def resident_images(images: list[torch.Tensor], pinned: bool = False) -> ResidentImages:
    pixels = torch.cat([image.flatten() for image in images])
    sides = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
    lengths = 3 * sides.long().prod(1)
    offsets = (lengths.cumsum(0) - lengths).to(DEVICE)
    labels = torch.arange(len(images), device=DEVICE)
    pixels = pixels.pin_memory() if pinned else pixels.to(DEVICE)
    return ResidentImages(pixels, offsets, sides.to(DEVICE), labels, int(sides[:, 0].max()))


@pytest.mark.parametrize(
    "interpolation, size, between",
    [("bicubic", (17, 40), 2**29), ("bilinear", (20, 24), 2**29), ("nearest", (20, 24), 3 * 100 * 3 * 24 * 4)],
)
def test_crops(interpolation, size, between, monkeypatch):
    """Up, down, far down, to the borders, one pixel; in one launch and in several, and flipped."""
    monkeypatch.setattr(kernels, "BETWEEN", between)
    rng = np.random.default_rng(0)
    shapes = [(60, 45), (12, 9), (100, 20), (25, 150), (20, 24), (7, 7)]
    boxes = [(0, 0, 60, 45), (5, 2, 7, 7), (20, 3, 80, 11), (3, 0, 22, 150), (0, 0, 20, 24), (6, 6, 1, 1)]
    images = [torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    order = [3, 0, 5, 5, 1, 2, 4]
    drawn = torch.full((len(order), LAYERS + 1), 77.0)
    drawn[:, BOX:FLIP] = torch.tensor([boxes[item] for item in order])
    drawn[:, FLIP] = torch.tensor([0.0, 1, 0, 1, 1, 0, 1])
    for pinned in {False, DEVICE.type == "cuda"}:  # From the host's memory, too.
        kept = resident_images(images, pinned)
        items = torch.tensor(order, device=DEVICE)
        actual = kernels.crop_and_resize(kept, items, drawn.to(DEVICE), size, interpolation).cpu()
        expected = torch.stack([cropped(images[item], boxes[item], size, interpolation) for item in order])
        expected = torch.where(drawn[:, FLIP, None, None, None] != 0, expected.flip(-1), expected)
        difference = (actual.int() - expected.int()).abs()
        if interpolation == "nearest":  # Of two that are equally near, either.
            assert (difference > 0).float().mean() < 0.03
        else:
            assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_noise():
    images = pictures(40, 50)[2:3].repeat(5, 1, 1, 1)
    drawn = torch.zeros(5, LAYERS + WORDS, device=DEVICE)
    drawn[:, SEED] = torch.arange(5) * 1001
    drawn[:, LAYERS : LAYERS + 4] = torch.tensor([5.0, 35, 3, 48])
    others = drawn.clone()
    others[:, SEED] += 9000

    def finish(rows):
        return kernels.finish(images, rows, LAYERS, 1, [0.5] * 3, [0.5] * 3, True)

    first, again, other = finish(drawn), finish(drawn), finish(others)
    assert torch.equal(first, again)
    inside = first[:, :, 5:35, 3:48]
    assert abs(inside.mean()) < 0.02 and abs(inside.std() - 1) < 0.02
    several = torch.stack([inside.flatten(), other[:, :, 5:35, 3:48].flatten(), inside.roll(1, 0).flatten()])
    several = torch.cat([several, inside.roll(1, 1).reshape(1, -1)])
    assert (several.corrcoef() - torch.eye(4, device=DEVICE)).abs().max() < 0.03
    # An image's noise is its own, wherever it is in a batch.
    assert torch.equal(finish(drawn.flip(0)).flip(0), first)
    first[:, :, 5:35, 3:48] = 0
    assert first.abs().amax((0, 1)).gt(0).sum() == 40 * 50 - 30 * 45 and first.abs().max() < 1


@pytest.mark.parametrize(
    "is_resident, options",
    [(True, {}), (False, {"mixup_mode": "pair", "random_erasing_mode": "const"}), (True, NOTHING)],
)
def test_batches(is_resident, options, monkeypatch):
    """The whole way from a data set, twice the same."""
    images = [encode(photo(seed, *((30, 44) if seed % 2 else (180, 130)))) for seed in range(8)]
    data, augment = pipeline(images, is_resident, DEVICE, **options)
    made = to(data.collate(data.__getitems__([5, 2])), DEVICE)
    first, again = augment(made), augment(made)
    for name in first:
        assert torch.equal(first[name], again[name])
    monkeypatch.setattr(augmentation, "kernels_on", lambda device: None)
    if is_resident:
        augment.images.pixels = augment.images.pixels.cpu()
    expected = augment(made)
    assert torch.equal(first["labels"], expected["labels"])
    difference = (first["pixel_values"] - expected["pixel_values"]).abs() * 255 * 0.22
    assert difference.mean() < 0.6 and (difference > 8).float().mean() < 0.01


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
@pytest.mark.parametrize("is_resident", [True, False])
def test_nothing_waits_for_the_device(is_resident):
    """And a CUDA graph holds a batch's launches, with whatever rows and items come."""
    images = [encode(photo(seed, *((30, 44) if seed % 2 else (180, 130)))) for seed in range(8)]
    data, augment = pipeline(images, is_resident, DEVICE, random_erasing_mode="pixel")
    batches = [to(data.collate(data.__getitems__(indices)), DEVICE) for indices in ([5, 3, 0, 1], [2, 6, 7, 4])]
    expected = [augment(made) for made in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = {key: value.clone() if torch.is_tensor(value) else value for key, value in batches[0].items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = augment(static)
    for made, wanted in zip(batches, expected, strict=True):
        for key, value in made.items():
            if torch.is_tensor(value):
                static[key].copy_(value)
        graph.replay()
        for name, value in wanted.items():
            assert torch.equal(out[name], value), name


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_where_images_lie(monkeypatch):
    """On the device, else in pinned memory: the same batches."""
    images = [encode(photo(seed, *((30, 44) if seed % 2 else (180, 130)))) for seed in range(8)]
    made = []
    for in_use in (False, True):
        if in_use:
            small = type("Properties", (), {"total_memory": 0})
            monkeypatch.setattr(resident.torch.cuda, "get_device_properties", lambda device, small=small: small)
        data, augment = pipeline(images, True, DEVICE)
        assert augment.images.pixels.is_cuda != in_use and augment.images.pixels.is_pinned() == in_use
        made.append(augment(to(data.collate(data.__getitems__([5, 2, 0])), DEVICE)))
    assert torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_draws_on_the_device():
    """Moments are those of a CPU's numbers."""
    _, augment = pipeline([encode(photo(0))], True, DEVICE)
    sides = torch.tensor([[60, 90]]).expand(65_536, 2)
    first, second = (augment.draws.draw(device, 0, 0, 65_536, sides.to(device)) for device in (DEVICE, "cpu"))
    assert torch.equal(first, augment.draws.draw(DEVICE, 0, 0, 65_536, sides.to(DEVICE)))
    first, second = first.double().cpu(), second.double()
    error = (first.var(0) + second.var(0)).div(65_536).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() <= 6 * error + 1e-9).all()
    assert ((first.std(0) - second.std(0)).abs() <= 0.15 * second.std(0) + 1e-3).all()
