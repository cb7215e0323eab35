# SPDX-License-Identifier: Apache-2.0
"""Data sets: the embedded digits, folders, parquet files, the Hub's schemas, and everything that can be wrong."""

import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from image_classification.data import columns
from image_classification.data.images import decode
from image_classification.data.sources import as_classes_of, load_data
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments
from tests.images import COLOURS, colour_image, encode, make_image_folder


def load(train=True, **settings):
    return load_data(DataArguments(**settings), seed=0, train=train)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_digits_split_is_fixed_and_stratified():
    digits, again = load(data_set="digits"), load_data(DataArguments(data_set="DIGITS"), seed=1)
    assert (len(digits.train), len(digits.validation), len(digits.labels)) == (1437, 360, 10)
    assert digits.validation["label"][:] == again.validation["label"][:]
    counts = np.bincount(digits.validation["label"][:])
    assert counts.min() >= 34 and counts.max() <= 38
    pixels = {
        split: {bytes(item["bytes"]) for item in digits_split["image"][:]}
        for split, digits_split in (("train", digits.train), ("validation", digits.validation))
    }
    assert len(pixels["train"] | pixels["validation"]) > 1780 and len(pixels["train"] & pixels["validation"]) < 10
    image = decode(digits.validation[0]["image"], "image")
    assert image.size == (8, 8) and image.mode == "RGB"


def test_image_folder(image_folder):
    found = load(data_path=str(image_folder))
    assert (found.labels, len(found.train), len(found.validation), found.hub_name) == (list(COLOURS), 12, 6, None)
    for row in found.train:
        channel = np.asarray(decode(row["image"], "image")).mean(axis=(0, 1)).argmax()
        assert found.labels[row["label"]] == ("red", "green", "blue")[channel]


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_other_names_of_the_validation_folder(image_folder, name):
    (image_folder / "validation").rename(image_folder / name)
    assert len(load(data_path=str(image_folder)).validation) == 6


def test_validation_is_held_out_where_there_is_none(tmp_path):
    root = make_image_folder(tmp_path / "images", splits=(("train", 8),))
    found = load(data_path=str(root), validation_fraction=0.25)
    assert (len(found.train), len(found.validation)) == (18, 6)
    assert np.bincount(found.validation["label"][:]).tolist() == [2, 2, 2]
    assert "held out" in found.notes[0]
    with pytest.raises(InputError, match="too little"):
        load(data_path=str(root), validation_fraction=0.01)


def test_sample_limits_are_seeded(image_folder):
    found = load(data_path=str(image_folder), max_train_samples=5, max_eval_samples=3)
    assert (len(found.train), len(found.validation)) == (5, 3)
    assert found.train["image"][:] == load(data_path=str(image_folder), max_train_samples=5).train["image"][:]


def rows(count, classes=3, label="label", image="image", feature=None):
    """A split in the Hub's form: images as embedded bytes."""
    contents = [encode(colour_image(COLOURS[index % 3], index), "PNG") for index in range(count)]
    images = [{"bytes": content, "path": None} for content in contents]
    kinds = {image: datasets.Image(), label: feature or datasets.ClassLabel(num_classes=classes)}
    return datasets.Dataset.from_dict(
        {image: images, label: [index % 3 for index in range(count)]}, features=datasets.Features(kinds)
    )


@pytest.mark.parametrize(
    "folder, name", [("", "{}-00000-of-00001.parquet"), ("{}", "0000.parquet"), ("data", "{}.parquet")]
)
def test_parquet_files(tmp_path, folder, name):
    for split, count in (("train", 9), ("test", 6)):
        path = tmp_path / folder.format(split) / name.format(split)
        path.parent.mkdir(exist_ok=True)
        rows(count).to_parquet(path)
    found = load(data_path=str(tmp_path))
    assert (len(found.train), len(found.validation)) == (9, 6)
    assert decode(found.train[0]["image"], "image").size == (24, 20)


def test_saved_to_disk(tmp_path):
    datasets.DatasetDict(train=rows(9), validation=rows(6)).save_to_disk(tmp_path / "saved")
    assert len(load(data_path=str(tmp_path / "saved")).train) == 9


def class_label(*names, count=None):
    return datasets.ClassLabel(names=list(names) or [f"class {index}" for index in range(count)])


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL10 = "airplane bird car cat deer dog horse monkey ship truck".split()
# As the repositories are on the Hub: repository and configuration, splits, columns. The number of images here tells the
# splits apart; ImageNet's test split has no labels.
SCHEMAS = {
    "CIFAR10": (
        ("uoft-cs/cifar10", "plain_text"),
        ("train", "test"),
        {"img": datasets.Image(), "label": class_label(*CIFAR10)},
    ),
    "CIFAR100": (
        ("uoft-cs/cifar100", "cifar100"),
        ("train", "test"),
        {"img": datasets.Image(), "fine_label": class_label(count=100), "coarse_label": class_label(count=20)},
    ),
    "IMNET": (
        ("ILSVRC/imagenet-1k", None),
        ("train", "validation", "test"),
        {"image": datasets.Image(), "label": class_label(count=1000)},
    ),
    "SVHN": (
        ("ufldl-stanford/svhn", "cropped_digits"),
        ("train", "test", "extra"),
        {"image": datasets.Image(), "label": class_label(*map(str, range(10)))},
    ),
    "STL10": (("tanganke/stl10", None), ("train", "test"), {"image": datasets.Image(), "label": class_label(*STL10)}),
    "Flowers102": (
        ("dpdl-benchmark/oxford_flowers102", None),
        ("train", "validation", "test"),
        {"image": datasets.Image(), "label": class_label(count=102)},
    ),
}
COUNTS = {"train": 9, "validation": 6, "test": 7, "extra": 12}
USED = {"IMNET": "validation"}  # To evaluate on; of all others it is the test split.


def hub_split(name: str, split: str) -> datasets.Dataset:
    features = SCHEMAS[name][2]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    (image,) = features.keys() - set(labels)
    columns = {image: rows(COUNTS[split])["image"][:]}
    for label in labels:
        unknown = name == "IMNET" and split == "test"
        columns[label] = [-1 if unknown else index % 3 for index in range(COUNTS[split])]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_hub_schemas(name, monkeypatch):
    asked = []

    def load_dataset(*arguments, streaming):
        asked.append((arguments, streaming))
        return datasets.DatasetDict({split: hub_split(name, split) for split in SCHEMAS[name][1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load(data_set=name.lower())
    repository, _, features = SCHEMAS[name]
    assert asked == [(repository, False)] and found.hub_name == repository[0]
    label = features.get("fine_label") or features["label"]
    assert found.labels == label.names
    assert (len(found.train), len(found.validation)) == (COUNTS["train"], COUNTS[USED.get(name, "test")])
    assert found.train["label"][:4] == [0, 1, 2, 0]
    assert decode(found.train[0]["image"], "image").mode == "RGB"
    # `extra` is there for who names it.
    if "extra" in SCHEMAS[name][1]:
        assert len(load(data_set=name, train_split="extra").train) == COUNTS["extra"]


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_local_copies_of_hub_repositories(name, tmp_path):
    """Its parquet files, where a clone has them: the same columns and splits, found under the same name."""
    for split in SCHEMAS[name][1]:
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        hub_split(name, split).to_parquet(path)
    found = load(data_set=name, data_path=str(tmp_path))
    assert (len(found.train), len(found.validation)) == (COUNTS["train"], COUNTS[USED.get(name, "test")])
    features = SCHEMAS[name][2]
    assert found.labels == (features.get("fine_label") or features["label"]).names


def test_labels_that_are_plain_integers_or_names(tmp_path):
    rows(6, feature=datasets.Value("int64")).to_parquet(tmp_path / "train.parquet")
    rows(6, feature=datasets.Value("int64")).to_parquet(tmp_path / "test.parquet")
    assert load(data_path=str(tmp_path)).labels == ["0", "1", "2"]
    named = rows(6, feature=datasets.Value("int64")).remove_columns("label").add_column("label", list("abcabc"))
    for split, part in (("train", named), ("test", named.select([1, 2]))):
        part.to_parquet(tmp_path / f"{split}.parquet")
    found = load(data_path=str(tmp_path))
    assert (found.labels, found.validation["label"][:]) == (["a", "b", "c"], [1, 2])


def test_columns_that_must_be_named(tmp_path):
    split = rows(6).add_column("other", [0, 1] * 3).cast_column("other", datasets.ClassLabel(num_classes=2))
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"label, other.*--label_column"):
        load(data_path=str(tmp_path / "saved"))
    assert len(load(data_path=str(tmp_path / "saved"), label_column="other").labels) == 2
    with pytest.raises(InputError, match="image, label, other"):
        load(data_path=str(tmp_path / "saved"), label_column="lable")
    with pytest.raises(InputError, match="no images"):
        load(data_path=str(tmp_path / "saved"), label_column="other", image_column="label")


# Links, hidden files


def paths_of(root, split="train", **settings):
    """Of the images of a split, relative to the data, by class."""
    data = load(data_path=str(root), **settings)
    found = {}
    for row in getattr(data, split):
        found.setdefault(data.labels[row["label"]], []).append(str(Path(row["image"]["path"]).relative_to(root)))
    return found


def own_files(root, split="train"):
    """What `make_image_folder` has made."""
    return {
        colour: sorted(str(path.relative_to(root)) for path in (root / split / colour).glob("*.jpg"))
        for colour in COLOURS
    }


def up_and_down(root, outside):
    (root / "train" / "blue" / "loop").symlink_to("../..")


def to_itself(root, outside):
    (root / "train" / "blue" / "self").symlink_to(".")
    (root / "train" / "red" / "never").symlink_to("never")


def a_class_that_is_all(root, outside):
    (root / "train" / "self").symlink_to(".")
    (root / "train" / "up").symlink_to("../..")


def to_the_other_split(root, outside):
    (root / "train" / "green" / "more").symlink_to(root / "validation")
    (root / "train" / "green" / "one").symlink_to(root / "validation" / "green")


def to_another_class(root, outside):
    # Also where the class that links comes before the one that is linked to.
    for one, other in (("blue", "red"), ("red", "green")):
        (root / "train" / other / "deep").mkdir()
        (root / "train" / one / "its").symlink_to(f"../{other}")
        (root / "train" / one / "deeper").symlink_to(f"../{other}/deep")


def hidden(root, outside):
    for name in (".ipynb_checkpoints", "__MACOSX", "deep/.thumbnails", "deep/__MACOSX"):
        (root / "train" / "blue" / name).mkdir(parents=True)
        shutil.copy(root / "train" / "red" / "0.jpg", root / "train" / "blue" / name / "x.jpg")
    shutil.copy(root / "train" / "red" / "0.jpg", root / "train" / "blue" / "._0.jpg")
    for name in ("__MACOSX", ".cache"):
        shutil.copytree(root / "train" / "red", root / "train" / name)
        shutil.copytree(root / "train", root / name, symlinks=True)


@pytest.mark.parametrize(
    "change", [up_and_down, to_itself, a_class_that_is_all, to_the_other_split, to_another_class, hidden]
)
@pytest.mark.parametrize("skip", [False, True])
def test_each_real_folder_counts_once_and_what_is_hidden_is_nothing(tmp_path, image_folder, change, skip):
    expected = {split: own_files(image_folder, split) for split in ("train", "validation")}
    change(image_folder, tmp_path)
    assert {split: paths_of(image_folder, split, skip_bad_images=skip) for split in expected} == expected


def test_links_to_folders_elsewhere_count_once(tmp_path, image_folder):
    """Whatever else leads there, in whatever order, and with what is below them."""
    outside = make_image_folder(tmp_path / "outside", splits=(("part", 3),))
    (outside / "part" / "blue" / "back").symlink_to("..")
    (image_folder / "train" / "blue" / "a").symlink_to(outside / "part" / "blue")
    (image_folder / "train" / "blue" / "b").symlink_to(outside / "part" / "blue")
    (image_folder / "train" / "green" / "all").symlink_to(outside)
    shutil.rmtree(image_folder / "train" / "red")
    (image_folder / "train" / "red").symlink_to(outside / "part" / "red")
    found = load(data_path=str(image_folder)).train
    real = [os.path.realpath(row["image"]["path"]) for row in found]
    assert len(real) == len(set(real)) == 4 + 4 + 3 * 3
    # A split may be a link as a whole, to see whether a model can learn its images by heart.
    shutil.rmtree(image_folder / "validation")
    (image_folder / "validation").symlink_to("train")
    data = load(data_path=str(image_folder))
    assert len(data.validation) == len(data.train)


def test_hidden_parquet_files_are_nothing(tmp_path):
    for split, count in (("train", 9), ("test", 6)):
        rows(count).to_parquet(tmp_path / f"{split}.parquet")
        for folder in (".cache", "__MACOSX"):
            (tmp_path / folder).mkdir(exist_ok=True)
            rows(3).to_parquet(tmp_path / folder / f"{split}.parquet")
        (tmp_path / f"._{split}.parquet").write_bytes(b"Mac OS X")
    (tmp_path / "loop").symlink_to(".")
    found = load(data_path=str(tmp_path))
    assert (len(found.train), len(found.validation)) == (9, 6)
    streamed = load(data_path=str(tmp_path), streaming=True)
    assert (len(streamed.train), len(streamed.validation)) == (9, 6)


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode elsewhere")
def test_names_that_are_not_utf8(image_folder):
    os.rename(image_folder / "train" / "red", os.fsencode(image_folder / "train") + b"/caf\xe9")
    with pytest.raises(InputError, match=r"caf.*UTF-8"):
        load(data_path=str(image_folder))


# What can be wrong


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_training_split(tmp_path, split):
    folder = make_image_folder(tmp_path / "images", splits=((split, 2),))
    (tmp_path / "parquet").mkdir()
    rows(6).to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    for path in (folder, tmp_path / "parquet"):
        with pytest.raises(InputError, match=f"no training split. Its splits: {split}.*--train_split"):
            load(data_path=str(path))
        assert len(load(data_path=str(path), train=False).validation) == 6
    with pytest.raises(InputError, match="no training split"):
        load(data_path=str(tmp_path / "parquet"), streaming=True)


GARBAGE = {
    "empty": b"",
    "text": b"not what its name says\n" * 9,
    "magic": b"PAR1" + b"\xff" * 99 + b"PAR1",
    "arrow": b"ARROW1\0\0" + b"\x01" * 999,
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("content", list(GARBAGE))
def test_data_files_of_garbage_name_the_file(tmp_path, kind, content):
    for split in ("train", "test"):
        (tmp_path / f"{split}.{kind}").write_bytes(GARBAGE[content])
    for read in (lambda: load(data_path=str(tmp_path)), lambda: load(data_path=str(tmp_path), streaming=True)):
        with pytest.raises(InputError, match=rf"\.{kind}|empty") as raised:
            read()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, change",
    [
        ("dataset_dict.json", lambda path: path.write_text("{")),
        ("dataset_dict.json", lambda path: path.write_text('{"splits": ["train", "nowhere"]}')),
        ("train/state.json", lambda path: path.unlink()),
        ("train/dataset_info.json", lambda path: path.write_text("[]")),
        ("train/data-00000-of-00001.arrow", truncate),
        ("train/data-00000-of-00001.arrow", lambda path: path.write_bytes(b"")),
        ("train/data-00000-of-00001.arrow", lambda path: path.unlink()),
    ],
)
def test_damaged_folder_of_save_to_disk(tmp_path, name, change):
    datasets.DatasetDict(train=rows(9), validation=rows(6)).save_to_disk(tmp_path / "saved")
    change(tmp_path / "saved" / name)
    with pytest.raises(InputError, match="saved") as raised:
        load(data_path=str(tmp_path / "saved"))
    assert "\n" not in str(raised.value)


def test_classes_without_a_training_image_are_named(tmp_path):
    labels = {"train": [1, 3, 1, 3, 1, 3], "test": [1, 5, 1, 3, 1, 3]}
    for name, values in labels.items():
        rows(6).remove_columns("label").add_column("label", values).to_parquet(tmp_path / f"{name}.parquet")
    assert "no training image is of the classes 0, 2, 4, 5" in load(data_path=str(tmp_path)).notes


def test_rows_without_an_image(tmp_path):
    for value in (None, {"bytes": None, "path": None}):
        table, info = rows(6).data.table, rows(6).info
        images = pa.array([*table["image"].to_pylist()[:5], value], table["image"].type)
        split = datasets.Dataset(table.set_column(0, table.schema.field("image"), images), info=info)
        for name in ("train", "test"):
            split.to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match="some rows have no image"):
            load(data_path=str(tmp_path))


def test_data_path_that_is_a_file(tmp_path):
    rows(6).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"is the file .*train\.parquet"):
        load(data_path=str(tmp_path / "train.parquet"))


def test_folders_that_hold_no_data_set(tmp_path, image_folder):
    with pytest.raises(InputError, match="does not exist"):
        load(data_path=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"train/cat/1\.jpg.*found nothing"):
        load(data_path=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="found blue, green, red"):
        load(data_path=str(image_folder / "train"))


def test_one_class(tmp_path):
    root = make_image_folder(tmp_path / "images", classes=("only",))
    with pytest.raises(InputError, match="every image is of the class 'only'"):
        load(data_path=str(root))


def spoilt(name, spoil):
    """A file of the folder of images, spoilt, which the error names."""

    def change(root):
        spoil(root / name)
        return str(root / name)

    return change


def save_floats(value):
    return lambda path: Image.fromarray(np.full((8, 8), value, dtype=np.float32)).save(path, format="TIFF")


def without_classes(root):
    shutil.rmtree(root / "validation")
    (root / "validation").mkdir()


BAD_FOLDERS = {
    "cut in half": (spoilt("train/green/1.jpg", truncate), "{}.*truncated"),
    "cut in half, held out": (spoilt("validation/green/1.jpg", truncate), "{}.*truncated"),
    "no image": (spoilt("train/green/1.jpg", lambda path: path.write_text("not an image")), "{}"),
    "floats": (spoilt("train/green/float.tiff", save_floats(0.5)), "{} has pixels .*mode F"),
    "not a number": (spoilt("train/green/float.tiff", save_floats(np.nan)), "{} has pixels .*NaN or infinite"),
    "infinite": (spoilt("train/green/float.tiff", save_floats(np.inf)), "{} has pixels .*NaN or infinite"),
    "an empty class": (lambda root: (root / "train" / "yellow").mkdir(), "train/yellow holds no images"),
    "no classes": (without_classes, "validation holds no class folders"),
    "a class to evaluate only": (
        lambda root: shutil.copytree(root / "validation" / "red", root / "validation" / "violet"),
        "validation has the class 'violet'",
    ),
    "one folder, two classes": (lambda root: (root / "train" / "crimson").symlink_to("red"), "crimson.*same folder"),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_folders_of_images_that_cannot_be_used(image_folder, fault):
    change, message = BAD_FOLDERS[fault]
    named = change(image_folder)
    with pytest.raises(InputError, match=message.format(named)):
        load(data_path=str(image_folder))


def with_labels(labels):
    return rows(len(labels)).remove_columns("label").add_column("label", labels)


BAD_TABLES = {
    "other classes": (rows(6, 3), rows(6, 4), {}, "classes of the training and the validation split differ"),
    "no labels": (rows(6, feature=datasets.Value("int64")), with_labels([-1] * 6), {}, "label -1"),
    "too many classes": (with_labels([0, 100_000]), with_labels([0, 1]), {}, "largest label is 100,000"),
    "beyond memory": (with_labels([0, 2_000_000_000]), with_labels([0, 1]), {}, "largest label is 2,000,000,000"),
    "one column": (rows(6), rows(6), {"label_column": "image"}, "`image_column` and `label_column` .* one column"),
    "cut in half": (rows(30), rows(30), {}, r"train\.parquet cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_tables_that_cannot_be_used(tmp_path, fault):
    train, test, settings, message = BAD_TABLES[fault]
    for name, split in (("train", train), ("test", test)):
        split.to_parquet(tmp_path / f"{name}.parquet")
    if fault == "cut in half":
        truncate(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        load(data_path=str(tmp_path), **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, r"--data_path.*digits, CIFAR10"),
        ({"data_set": "CIFAR1000"}, "CIFAR100"),
        ({"data_set": "CIFAR10"}, r"(?s)uoft-cs/cifar10 .*--data_path.*digits"),  # without a network
    ],
)
def test_data_sets_that_are_not_there(settings, message):
    with pytest.raises(InputError, match=message):
        load(**settings)


def test_bad_images_are_left_out_named_and_counted(image_folder, caplog, monkeypatch):
    paths = sorted((image_folder / "train").rglob("*.jpg"))
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[5].write_text("no image")
    monkeypatch.setattr(logging.getLogger("image_classification"), "propagate", True)
    data = load(data_path=str(image_folder), skip_bad_images=True, check_images="none")
    assert len(data.train) == len(paths) - 2
    assert not {str(paths[1]), str(paths[5])} & {row["image"]["path"] for row in data.train}
    assert f"2 of {len(paths)} train images cannot be read and are left out" in data.notes
    assert str(paths[1]) in caplog.text and str(paths[5]) in caplog.text


def test_too_few_images_that_can_be_read(image_folder):
    for path in (image_folder / "train").rglob("*.jpg"):
        if path.parent.name != "red":
            path.write_text("no image")
    with pytest.raises(InputError, match="every image is of the class 'red'"):
        load(data_path=str(image_folder), skip_bad_images=True)
    for path in (image_folder / "train").rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(InputError, match=r"None of the \d+ train images .* can be read"):
        load(data_path=str(image_folder), skip_bad_images=True)


def test_large_sets_are_checked_as_they_are_read(image_folder, monkeypatch):
    truncate(image_folder / "train" / "green" / "1.jpg")
    monkeypatch.setattr(columns, "CHECK_UP_TO", 10)
    assert "--check_images all" in load(data_path=str(image_folder)).notes[-1]
    with pytest.raises(InputError, match="truncated"):
        load(data_path=str(image_folder), check_images="all")


def test_broken_embedded_image_names_its_split_and_row(tmp_path):
    good, bad = rows(6), rows(6).cast_column("image", datasets.Image(decode=False))
    items = bad["image"][:]
    items[4] = {"bytes": items[4]["bytes"][:50], "path": None}
    bad = datasets.Dataset.from_dict({"image": items, "label": bad["label"][:]}, features=good.features)
    datasets.DatasetDict(train=good, test=bad).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="validation image 4"):
        load(data_path=str(tmp_path / "saved"))


def test_orientation_and_palette_as_in_the_pipeline(tmp_path):
    from transformers.image_utils import load_image

    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("P").save(tmp_path / "palette.png")
    for path, size in (("turned.jpg", (4, 6)), ("palette.png", (6, 4))):
        ours = decode({"path": str(tmp_path / path), "bytes": None}, "image")
        assert ours.size == size
        assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(tmp_path / path))))


def make_flat_folder(folder: Path, kind: str, count: int = 4) -> list[tuple[str, str]]:
    """Images side by side with a metadata file; returns their file names and classes."""
    folder.mkdir(parents=True)
    rows = [(f"{colour}{number}.png", colour) for number in range(count) for colour in COLOURS]
    for number, (name, colour) in enumerate(rows):
        colour_image(colour, number).save(folder / name)
    if kind == "csv":
        lines = ["file_name,label", *map(",".join, rows)]
    else:
        lines = [json.dumps({"file_name": name, "label": colour}) for name, colour in rows]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    return rows


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_flat_folders_with_metadata(tmp_path, kind):
    make_flat_folder(tmp_path / "data" / "train", kind)
    make_flat_folder(tmp_path / "data" / "test", kind, count=2)
    found = load(data_path=str(tmp_path / "data"))
    assert (found.labels, len(found.train), len(found.validation)) == (list(COLOURS), 12, 6)
    for row in found.validation:
        channel = np.asarray(decode(row["image"], "image")).mean(axis=(0, 1)).argmax()
        assert found.labels[row["label"]] == ("red", "green", "blue")[channel]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), split="test")
    assert [found.labels[label] for label in found.validation["label"][:]] == theirs["label"][:]


def test_a_flat_folder_without_splits(tmp_path):
    make_flat_folder(tmp_path / "data", "csv", count=10)
    found = load(data_path=str(tmp_path / "data"))
    assert len(found.train) + len(found.validation) == 30
    evaluated = load(train=False, data_path=str(tmp_path / "data"), validation_split="train")
    assert len(evaluated.validation) == 30 and evaluated.train is None


def test_what_is_wrong_with_a_flat_folder_is_named(tmp_path):
    make_flat_folder(tmp_path / "data", "csv", count=10)
    (tmp_path / "data" / "red0.png").unlink()
    with pytest.raises(InputError, match=r"red0\.png"):
        load(data_path=str(tmp_path / "data"))
    (tmp_path / "data" / "metadata.csv").write_text("label\nred\n")
    with pytest.raises(InputError, match=r"data with its metadata\.csv.*file_name"):
        load(data_path=str(tmp_path / "data"))


@pytest.mark.parametrize("splits", [(("validation", 2),), (("", 2),)], ids=["validation", "bare"])
def test_classes_that_are_a_part_of_a_trained_models(tmp_path, splits):
    root = make_image_folder(tmp_path / "data", splits=splits, classes=("green", "blue"))
    found = load(train=False, data_path=str(root))
    assert (found.labels, len(found.validation)) == (["blue", "green"], 4)
    whole = ["red", "green", "blue", "grey"]
    mapped = as_classes_of(found, whole)
    assert mapped.labels == whole and any("2 of the model's 4 classes" in note for note in mapped.notes)
    for before, after in zip(found.validation, mapped.validation):
        assert before["image"] == after["image"]
        assert found.labels[before["label"]] == mapped.labels[after["label"]]
    assert as_classes_of(found, ["red", "green"]) is found
    assert as_classes_of(found, [*whole, "red"]) is found  # Which of the two?
    with pytest.raises(InputError, match="no training split" if splits[0][0] else "holds no data set"):
        load(data_path=str(root))
