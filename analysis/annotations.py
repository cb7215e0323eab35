# SPDX-License-Identifier: Apache-2.0
"""Images whose object is marked, by boxes or a mask: folders with a metadata file, and data sets."""

from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from image_classification.data.images import decode
from image_classification.data.local import VALIDATION_NAMES
from image_classification.errors import InputError

from .images import Found, draw_numbers, processor_of
from .models import Checkpoint


BOX_FORMATS = ("xywh", "xyxy")


def find_annotated(
    source: str, split: str | None, count: int, seed: int = 0, box_format: str = "xywh"
) -> tuple[list[Found], list[np.ndarray]]:
    """
    Read images and where their objects are, as `datasets` keeps them: boxes in the column `objects` (a list under
    `bbox`) or `bbox` or `boxes`, or an image `mask`, in which what is not black is the object.

    A folder of images of one's own has a metadata.jsonl, one line for each image:
    `{"file_name": "cat.jpg", "objects": {"bbox": [[x, y, width, height]]}}`, or
    `{"file_name": "cat.jpg", "mask_file_name": "masks/cat.png"}`.

    Args:
        source: such a folder, one of parquet or arrow files or of `save_to_disk`, or a data set of the Hub.
        split: which; `None` for the one that there is, or the held-out one.
        count, seed: how many images to draw, and how.
        box_format: `"xywh"` (left, top, width, height, as COCO) or `"xyxy"` (left, top, right, bottom), in pixels of
            the image as it is stored.

    Returns:
        The images, and for each a boolean array (its height, its width), True on its objects.

    Raises:
        InputError: the source cannot be read, has no such columns, or an image that is drawn has no object, a box that
            is not inside it, or a mask of another size.
    """
    rows, named = _split(_read(source), split, source)
    image = _image_column(rows, source)
    boxes, masks = _object_columns(rows, source)
    for column in [image] + ([masks] if masks else []):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    found: list[Found] = []
    objects = []
    for index in draw_numbers(len(rows), count, seed):
        row = rows[index]
        where = f"{named} image {index}"
        picture = decode(row[image], where)
        path = row[image].get("path")
        name = Path(path).name if path else str(index)
        where += f" ({name})" if path else ""
        if masks:
            inside = _from_mask(row[masks], picture, where)
        else:
            value = row[boxes]
            inside = _from_boxes(value["bbox"] if isinstance(value, dict) else value, picture, where, box_format)
        found.append((picture, name, None))
        objects.append(inside)
    return found, objects


def as_seen(checkpoint: Checkpoint, objects: list[np.ndarray]) -> np.ndarray:
    """
    Show objects on the images as the model takes them: resized and cropped as its image processor does with the images.
    From booleans (height, width) of each image to (B, height, width), all False where the crop leaves nothing.
    """
    processor = processor_of(checkpoint)
    seen = []
    for inside in objects:
        picture = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert("RGB")
        pixels = processor(images=picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        seen.append(np.asarray(pixels)[0, 0] > 127)
    return np.stack(seen)


def _read(source: str) -> Dataset | DatasetDict:
    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            return datasets.load_from_disk(source)
        # Otherwise it warns of each file that is no image, such as a README.
        datasets.logging.set_verbosity_error()
        return datasets.load_dataset(source)
    except Exception as error:  # The Hub's client, Arrow and the readers of folders have no common base.
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise InputError(
            f"`--annotated` {source} cannot be read: {reason.splitlines()[0][:300]}. Expected a folder of images with "
            'a metadata.jsonl ({"file_name": "cat.jpg", "objects": {"bbox": [[x, y, width, height]]}} on each line, '
            'or "mask_file_name"), or a data set with such columns.'
        ) from error


def _split(read: Dataset | DatasetDict, wanted: str | None, source: str) -> tuple[Dataset, str]:
    if isinstance(read, Dataset):
        if wanted is not None:
            raise InputError(f"`--split` is {wanted!r}, and {source} is a single split. Leave it out.")
        return read, source
    if wanted is None:
        held_out = [name for name in VALIDATION_NAMES if name in read]
        wanted = next(iter(read)) if len(read) == 1 else next(iter(held_out), None)
    if wanted not in read:
        problem = "Say which with --split" if wanted is None else f"`--split` is {wanted!r}"
        raise InputError(f"{problem}: {source} has {', '.join(read)}.")
    if len(read[wanted]) == 0:
        raise InputError(f"The split {wanted!r} of {source} is empty.")
    return read[wanted], f"{source}, {wanted}"


def _image_column(rows: Dataset, source: str) -> str:
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image) and name != "mask"]
    if len(images) != 1:
        raise InputError(
            f"{source} has {len(images)} columns of images beside `mask`{': ' if images else ''}{', '.join(images)}. "
            f"Expected one. Columns: {', '.join(rows.column_names)}."
        )
    return images[0]


def _object_columns(rows: Dataset, source: str) -> tuple[str | None, str | None]:
    """Find the column of boxes, or that of masks: the other is `None`."""
    if isinstance(rows.features.get("mask"), datasets.Image):
        return None, "mask"
    inside = rows.features.get("objects")
    if isinstance(inside, datasets.features.features.List | datasets.Sequence):
        inside = inside.feature
    if isinstance(inside, dict) and "bbox" in inside:
        return "objects", None
    for name in ("bbox", "boxes"):
        if name in rows.features:
            return name, None
    raise InputError(
        f"{source} marks no objects: expected the column `objects` with `bbox`, or `bbox`, or `mask` with images (in a "
        f"metadata.jsonl: `mask_file_name`). It has {', '.join(rows.column_names)}."
    )


def _from_mask(item: dict | None, picture: Image.Image, where: str) -> np.ndarray:
    if item is None:
        raise InputError(f"{where} has no mask.")
    mask = decode(item, f"{where}, mask")
    if mask.size != picture.size:
        raise InputError(
            f"{where} has {picture.width} x {picture.height} pixels, and its mask {mask.width} x {mask.height}: "
            "expected the same."
        )
    inside = np.asarray(np.asarray(mask).any(-1))
    if not inside.any():
        raise InputError(f"{where} has a mask that is black: there is no object. Leave the image out.")
    return inside


def _from_boxes(boxes: list | None, picture: Image.Image, where: str, box_format: str) -> np.ndarray:
    # One box may come without the list around it.
    boxes = [boxes] if boxes and not isinstance(boxes[0], list | tuple) else boxes
    if not boxes:
        raise InputError(f"{where} has no box. Leave the image out.")
    inside = np.zeros((picture.height, picture.width), dtype=bool)
    for box in boxes:
        if len(box) != 4:
            raise InputError(f"{where} has the box {box}: expected four numbers.")
        left, top, right, bottom = map(float, box)
        if box_format == "xywh":
            right, bottom = left + right, top + bottom
        # Annotators' tools round, so a pixel beyond the edge is nothing.
        if not (-1 <= left < right <= picture.width + 1 and -1 <= top < bottom <= picture.height + 1):
            raise InputError(
                f"{where} has {picture.width} x {picture.height} pixels, and the box {box}, read as {box_format}, is "
                f"not inside. Are its numbers of the other kind ({', '.join(BOX_FORMATS)}: --box-format)?"
            )
        # At least one pixel, so that the smallest object is one.
        x, y = max(0, min(round(left), picture.width - 1)), max(0, min(round(top), picture.height - 1))
        inside[y : max(y + 1, round(bottom)), x : max(x + 1, round(right))] = True
    return inside
