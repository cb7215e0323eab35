# SPDX-License-Identifier: Apache-2.0
"""
The kernels of augmentation against the formulas in PyTorch. `test_device_augmentation.py` runs this file in a process
of its own, because Triton reads TRITON_INTERPRET when it is imported; on a machine with an NVIDIA GPU it can be run
directly:

    python -m pytest tests/image_classification/device_kernel_cases.py
"""

import numpy as np
import pytest
import torch

from image_classification import device_augmentation, device_kernels
from image_classification.device_augmentation import CODES, DrawnBatch, DrawnNumbers
from tests.image_classification.test_device_augmentation import SIZE, batch, dataset, encode, photo, to_tensor


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
KEY = (3, 0, 0)
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


def finish(**options) -> device_augmentation.DeviceAugmentation:
    return dataset(True, [encode(photo(0))], **options)[1].finish


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


@pytest.mark.parametrize("height, width", [(23, 37), (3, 4), (16, 32)])
def test_operations_in_whole_numbers(height, width):
    """All of them side by side in one launch, and images that nothing happens to."""
    images, expected, codes, numbers = [], [], [], []
    for name in (None, *device_augmentation.OPERATIONS):
        for level in LEVELS.get(name, [0]):
            number = torch.full((6, 1, 1, 1), float(level), device=DEVICE)
            these = pictures(height, width)
            images.append(these)
            expected.append(these if name is None else device_augmentation.OPERATIONS[name](these, number))
            codes += [CODES.get(name, 0)] * 6
            numbers += [[level] * 6] * 6
    codes = torch.tensor(codes, dtype=torch.int32, device=DEVICE)
    numbers = torch.tensor(numbers, dtype=torch.float32, device=DEVICE)
    actual = device_kernels.operate(torch.cat(images), codes, numbers, FILL, "bicubic")
    different = (actual != torch.cat(expected)).flatten(1).any(1)
    assert not different.any(), codes[different]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_affine(interpolation):
    height, width = 16, 31
    make = device_augmentation.MATRICES
    matrices = [
        make[name](number, height, width)
        for name, number in [
            *(("Rotate", degrees) for degrees in (0.0, 90.0, -30.0, 17.0)),
            *((f"Shear{axis}", factor) for axis in "XY" for factor in (0.3, -0.12)),
            *((f"Translate{axis}", pixels) for axis in "XY" for pixels in (7.0, -4.5, 40.0)),
            ("TranslateXRel", 0.31),
        ]
    ]
    numbers = torch.tensor(matrices, dtype=torch.float32, device=DEVICE).repeat_interleave(2, 0)
    images = pictures(height, width)[:2].repeat(len(matrices), 1, 1, 1)
    codes = torch.full((len(images),), CODES["Affine"], dtype=torch.int32, device=DEVICE)
    expected = device_augmentation.affine(images, numbers, FILL, interpolation)
    actual = device_kernels.operate(images, codes, numbers, FILL, interpolation)
    difference = (actual.int() - expected.int()).abs()
    # What is a whole number but for fp32 is rounded down to that number or the one below.
    assert difference.max() <= (0 if interpolation == "nearest" else 1)
    assert (difference > 0).float().mean() < 0.1
    # The kernel's cubics are exact on equal pixels.
    flat = torch.tensor(FILL, dtype=torch.uint8, device=DEVICE)[:, None, None].expand(len(matrices), 3, height, width)
    actual = device_kernels.operate(flat.contiguous(), codes[::2], numbers[::2].contiguous(), FILL, interpolation)
    assert (actual == flat).all()


def drawn_at_random(images: int, layers: int, parts: int, seed: int, height: int, width: int, affine: bool):
    """Numbers on the device, such as any policy might draw."""
    rng = np.random.default_rng(seed)
    data = torch.zeros(DrawnNumbers.length(images, layers, parts), dtype=torch.uint8)
    numbers, rest = DrawnNumbers.split(data, images, layers, parts)
    assert len(rest) == 0
    numbers.labels[:] = torch.from_numpy(rng.integers(0, 3, images))
    numbers.places[:] = torch.from_numpy(rng.permutation(images))
    numbers.flips[:] = torch.from_numpy(rng.integers(0, 2, images))
    numbers.codes[:] = torch.from_numpy(rng.integers(0, len(CODES) + affine, (layers, images)))
    for layer in range(layers):
        for index in range(images):
            code = int(numbers.codes[layer, index])
            if code == CODES["Affine"]:
                matrix = device_augmentation.MATRICES["Rotate"](rng.uniform(-30, 30), height, width)
                numbers.numbers[layer, index] = torch.tensor(matrix)
            elif code:
                name = next(name for name in CODES if CODES[name] == code)
                numbers.numbers[layer, index] = float(rng.choice(LEVELS.get(name, [0])))
    for box in numbers.boxes.view(-1, 7):
        top, left = rng.integers(0, [height, width])
        if rng.random() < 0.7:
            box[:4] = torch.tensor([top, rng.integers(top + 1, height + 1), left, rng.integers(left + 1, width + 1)])
            box[4:] = torch.from_numpy(rng.normal(size=3))
    return DrawnNumbers.split(data.to(DEVICE), images, layers, parts)[0]


@pytest.mark.parametrize(
    "images, layers, parts, affine",
    [(7, 0, 0, False), (12, 3, 0, False), (9, 2, 3, False), (12, 2, 1, True)],
)
def test_sequences(images, layers, parts, affine):
    height, width = 25, 34
    drawn = drawn_at_random(images, layers, parts, 5, height, width, affine)
    augmentation = finish(random_erasing_mode="const")
    pixels = pictures(height, width).permute(0, 2, 3, 1).repeat(2, 1, 1, 1)[:images].contiguous()
    counts, nothing = (images, layers, parts), np.zeros((0, 4))
    whole = DrawnBatch(pixels, None, (height, width), counts, nothing, [], nothing, [], None, KEY, "")
    expected = augmentation.change(pixels, drawn, whole)
    actual = augmentation.change_by_kernels(device_kernels, pixels, drawn, whole)
    difference = (actual - expected).abs() * 255 * 0.22
    if affine:
        assert (difference > 2).float().mean() < 0.02
    else:
        assert difference.max() < 1e-3


@pytest.mark.parametrize("options", [{"cutmix": 0.0}, {"mixup": 0.0}, {"mixup": 0.0, "cutmix_minmax": [0.3, 0.6]}])
@pytest.mark.parametrize("count", [6, 5, 1])
def test_mixing(options, count, monkeypatch):
    """Folded into the last kernel, as timm does it on the images; an odd one out stays as it is."""
    images = [encode(photo(seed)) for seed in range(count)]
    options = {"auto_augment": None, "color_jitter": 0.0, "random_erasing_mode": "const", **options}
    data, collate = dataset(True, images, **options)
    for epoch in range(3):
        data.set_epoch(epoch)
        drawn = collate([data[index] for index in range(count)])
        actual = drawn.to(DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(device_augmentation, "kernels_on", lambda device: None)
            expected = drawn.to(DEVICE)
        assert torch.equal(actual["labels"], expected["labels"])
        torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(20, 24), (17, 40)])
def test_resizing(interpolation, size):
    """Up, down, far down, from the borders, one pixel; images of other memory layouts, too."""
    rng = np.random.default_rng(0)
    shapes = [(60, 45), (12, 9), (300, 20), (25, 400), (20, 24), (7, 7)]
    crops = [(0, 0, 60, 45), (5, 2, 7, 7), (100, 3, 200, 11), (3, 0, 22, 400), (0, 0, 20, 24), (6, 6, 1, 1)]
    images = [torch.from_numpy(rng.integers(0, 256, (3, *shape), dtype=np.uint8)).to(DEVICE) for shape in shapes]
    images[0] = images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    images[1] = images[1][:1].expand(3, -1, -1)
    out = torch.empty(len(images), *size, 3, dtype=torch.uint8, device=DEVICE)
    device_kernels.resize_crops(images, np.array(crops), out, interpolation)
    expected = device_augmentation.crop_and_resize(images, np.array(crops), size, interpolation)
    difference = (out.permute(0, 3, 1, 2).int() - expected.int()).abs()
    assert difference.max() <= (0 if interpolation == "nearest" else 1)
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resizing_crops_that_lie_side_by_side(interpolation):
    rng = np.random.default_rng(0)
    sides = np.array([(60, 45), (1, 1), (12, 9), (90, 20), (20, 24)])
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in sides]
    data = torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(DEVICE)
    out = torch.empty(len(sides), 17, 40, 3, dtype=torch.uint8, device=DEVICE)
    device_kernels.resize_whole(data, sides, out, interpolation)
    planes = [torch.from_numpy(image).to(DEVICE).permute(2, 0, 1) for image in images]
    boxes = np.column_stack([np.zeros_like(sides), sides])
    expected = device_augmentation.crop_and_resize(planes, boxes, (17, 40), interpolation)
    difference = (out.permute(0, 3, 1, 2).int() - expected.int()).abs()
    assert difference.max() <= (0 if interpolation == "nearest" else 1)
    assert (difference > 0).float().mean() < 0.01


def test_noise():
    images = pictures(40, 50)[2:3].repeat(8, 1, 1, 1)
    boxes = torch.tensor([5.0, 35, 3, 48, 0, 0, 0], device=DEVICE).repeat(1, 8, 1)
    first, again, other = (device_kernels.finish(images, boxes, [0.5] * 3, [0.5] * 3, seed) for seed in (4, 4, 9000))
    assert torch.equal(first, again)
    inside = first[:, :, 5:35, 3:48]
    assert abs(inside.mean()) < 0.02 and abs(inside.std() - 1) < 0.02
    several = torch.stack([inside.flatten(), other[:, :, 5:35, 3:48].flatten(), inside.roll(1, 0).flatten()])
    several = torch.cat([several, inside.roll(1, 1).reshape(1, -1)])
    assert (several.corrcoef() - torch.eye(4, device=DEVICE)).abs().max() < 0.03
    first[:, :, 5:35, 3:48] = 0
    assert first.abs().amax((0, 1)).gt(0).sum() == 40 * 50 - 30 * 45 and first.abs().max() < 1


def test_batches(monkeypatch):
    """The whole way, also of files that the device decodes, and twice the same."""
    images = [encode(photo(seed, *((30, 44) if seed % 2 else (180, 130)))) for seed in range(8)]
    options = {"device_decode": 0.5, "random_erasing_mode": "const", "auto_augment": "rand-m9-n2-mstd0.5"}
    data, collate = dataset(True, images, device_resize=True, **options)
    drawn = collate([data[index] for index in range(len(data))])
    assert 0 < len(drawn.names) < 8 and 0 < len(drawn.sides) < 8 - len(drawn.names)
    first, again = (drawn.pin_memory().to(DEVICE) if DEVICE.type == "cuda" else drawn.to(DEVICE) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name])
    monkeypatch.setattr(device_augmentation, "kernels_on", lambda device: None)
    expected = drawn.to(DEVICE)
    difference = (first["pixel_values"] - expected["pixel_values"]).abs() * 255 * 0.22
    assert difference.mean() < 0.6 and (difference > 8).float().mean() < 0.01


def test_same_draws_as_in_the_workers():
    images = [encode(photo(seed, *SIZE)) for seed in range(4)]
    options = {"auto_augment": "original-mstd0.5", "random_erasing_count": 2}
    expected, actual = batch(False, images, **options), dataset(True, images, **options)
    actual = actual[1]([actual[0][index] for index in range(4)]).to(DEVICE)
    assert torch.equal(actual["labels"].cpu(), expected["labels"])
    difference = (actual["pixel_values"].cpu() - expected["pixel_values"]).abs() * 255 * 0.22
    assert difference.mean() < 0.6 and (difference > 8).float().mean() < 0.01
