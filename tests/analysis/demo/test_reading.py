# SPDX-License-Identifier: Apache-2.0
"""Reading what people have."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from analysis.demo.reading import SHRINK_ABOVE, read_image
from image_classification.errors import InputError


LEFT_RED = np.zeros((60, 90, 3), np.uint8)
LEFT_RED[:, :45] = (250, 10, 10)


def write(path: Path, image: Image.Image, **how) -> str:
    image.save(path, **how)
    return str(path)


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees, clockwise
    image, notes = read_image(write(tmp_path / "turned.jpg", Image.fromarray(LEFT_RED), exif=exif, quality=95))
    assert image.size == (60, 90)
    assert image.getpixel((30, 20))[0] > 200
    assert image.getpixel((30, 70))[0] < 50
    assert notes == []


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
def test_the_modes_that_images_have(tmp_path, mode):
    image, notes = read_image(write(tmp_path / "a.tif", Image.new("L", (9, 7), 255).convert(mode)))
    assert (image.mode, image.size, image.getpixel((3, 3)), notes) == ("RGB", (9, 7), (255, 255, 255), [])


def test_sixteen_bits_become_eight(tmp_path):
    deep = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    for name in ("a.png", "a.tif"):
        image, notes = read_image(write(tmp_path / name, deep))
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
        assert "16 bits" in notes[0]


def test_sixteen_bits_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    deep = Image.fromarray(np.full((4, 9), 30000, np.uint16))
    assert read_image(write(tmp_path / "a.png", deep, exif=exif))[0].size == (4, 9)


def test_transparency_is_ignored_and_said(tmp_path):
    clear, opaque = Image.new("RGBA", (5, 5), (9, 8, 7, 0)), Image.new("RGBA", (5, 5), (9, 8, 7, 255))
    image, notes = read_image(write(tmp_path / "clear.png", clear))
    assert image.getpixel((0, 0)) == (9, 8, 7)
    assert "Transparency" in notes[0]
    assert read_image(write(tmp_path / "opaque.png", opaque))[1] == []


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image, notes = read_image(write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert image.getpixel((4, 4)) == (255, 0, 0)
    assert "first" in notes[0]


def test_large_images_shrink_as_they_are_read(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = write(tmp_path / "large.jpg", Image.new("RGB", (8192, 6144), (200, 40, 30)), exif=exif)
    image, notes = read_image(path)
    assert image.width * image.height <= SHRINK_ABOVE
    assert image.width / image.height == pytest.approx(6144 / 8192, rel=1e-3)  # turned, too
    assert image.getpixel((100, 100)) == pytest.approx((200, 40, 30), abs=3)
    assert "50 megapixels" in notes[0]


def test_images_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", Image.new("L", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InputError, match="too large: at most"), pytest.warns(Image.DecompressionBombWarning):
        read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n\x00\x00", None]
)
def test_what_is_no_image_is_refused_in_words(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:  # cut short
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read") as refused:
        read_image(str(path))
    assert str(tmp_path) not in str(refused.value)  # visitors need not know where files lie


def test_a_deleted_upload_is_asked_for_again(tmp_path):
    with pytest.raises(InputError, match="upload it again"):
        read_image(str(tmp_path / "gone.png"))
