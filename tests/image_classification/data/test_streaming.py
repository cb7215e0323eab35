# SPDX-License-Identifier: Apache-2.0
"""Streamed data sets: order, shares of processes, lengths, resuming, what is refused, and real processes."""

import json
import threading
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets.splits import SplitDict, SplitInfo
from safetensors.torch import load_file

from image_classification import main as script
from image_classification.data import local
from image_classification.data.images import decode
from image_classification.data.sources import load_data
from image_classification.data.streaming import StreamSampler, read_ahead
from image_classification.errors import InputError
from image_classification.settings.arguments import DataArguments
from tests.image_classification.data.test_sources import make_flat_folder
from tests.images import COLOURS, colour_image, encode
from tests.system.processes import in_two_forks


TRAIN, VALIDATION = (9, 12, 7, 10), (6, 5)  # Images in each file.


def content(number: int) -> bytes:
    return encode(colour_image(COLOURS[number % 3], number, (12, 10)))


def make_split(numbers, column="img", names=COLOURS) -> Dataset:
    """In the Hub's schema; the path is the image's number."""
    rows = {column: [{"bytes": content(n), "path": str(n)} for n in numbers], "label": [n % 3 for n in numbers]}
    return Dataset.from_dict(
        rows, features=Features({column: datasets.Image(), "label": ClassLabel(names=list(names))})
    )


def write_files(folder, split: str, sizes, first: int = 0, **options) -> None:
    for index, size in enumerate(sizes):
        rows = make_split(range(first, first + size), **options)
        rows.to_parquet(str(folder / f"{split}-{index:05d}-of-{len(sizes):05d}.parquet"))
        first += size


@pytest.fixture(autouse=True)
def _quick_shutdown(monkeypatch):
    """Where it has read several files at once, `datasets` sleeps for five seconds."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    datasets.disable_progress_bars()
    write_files(folder, "train", TRAIN)
    write_files(folder, "validation", VALIDATION, 100)
    return folder


def load(path, train=True, images=None, streaming=True, **options):
    return load_data(DataArguments(data_path=str(path), streaming=streaming, **options), 0, train, images)


def numbers(sampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return [int(row["image"]["path"]) for _, row in sampler]


def test_columns_classes_and_lengths(shards):
    data = load(shards)
    assert data.labels == list(COLOURS) and (len(data.train), len(data.validation)) == (38, 11)
    assert data.validation[2] == {"image": {"bytes": content(102), "path": "102"}, "label": 0}
    assert "streamed in 4 parts, shuffled within 4,096 images" in data.notes[-1]
    assert load(shards, train=False).train is None
    with pytest.raises(IndexError):
        data.validation[11]


def test_arrow_files(tmp_path):
    for name, first, count in (("train", 0, 7), ("test", 50, 4)):
        make_split(range(first, first + count)).save_to_disk(str(tmp_path / name))
    data = load(tmp_path)
    assert (len(data.train), len(data.validation)) == (7, 4)
    assert numbers(StreamSampler(data.validation, None, 1)) == [50, 51, 52, 53]


@pytest.mark.parametrize("told", [True, False])
def test_from_the_hub(shards, monkeypatch, told):
    """As `load_dataset` gives it: with the numbers of images that the repository names, if it does."""
    local = datasets.load_dataset

    def load_dataset(name, config, streaming):
        assert (name, config, streaming) == ("uoft-cs/cifar10", "plain_text", True)
        streams = {}
        for split, of_hub, sizes in (("train", "train", TRAIN), ("validation", "test", VALIDATION)):
            files = {of_hub: sorted(map(str, shards.glob(f"{split}*")))}
            streams[of_hub] = local("parquet", data_files=files, split=of_hub, streaming=True)
            assert streams[of_hub].info.splits is None
            if told:
                streams[of_hub].info.splits = SplitDict({of_hub: SplitInfo(of_hub, num_examples=sum(sizes))})
        return datasets.IterableDatasetDict(streams)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = DataArguments(data_set="cifar10", streaming=True)
    if not told:
        with pytest.raises(InputError, match=r"uoft-cs/cifar10, train split does not say how many images"):
            load_data(args, 0)
        assert len(load_data(args, 0, train=False).validation) == 11
        return
    data = load_data(args, 0)
    assert (len(data.train), len(data.validation), data.hub_name) == (38, 11, "uoft-cs/cifar10")
    assert sorted(numbers(StreamSampler(data.train, 1, 8))) == list(range(38))


def test_every_image_once_an_epoch_in_another_order(shards):
    split = load(shards).train
    first, again, second = (numbers(StreamSampler(split, 3, 16), epoch) for epoch in (0, 0, 1))
    assert first == again and first != second and first != sorted(first)
    assert sorted(first) == sorted(second) == list(range(38))
    assert numbers(StreamSampler(split, 4, 16)) != first


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_images(shards, processes):
    """Two and four divide the four files, three do not: then it is one image of every three."""
    split = load(shards).train
    samplers = [StreamSampler(split, 3, 8, process, processes) for process in range(processes)]
    found = [numbers(sampler) for sampler in samplers]
    assert {len(each) for each in found} == {38 // processes} == {len(sampler) for sampler in samplers}
    # Before one of them has seen all of its files, and goes on with others.
    begun = [image for each in found for image in each[: {2: 7 + 9, 3: 12, 4: 7}[processes]]]
    assert len(set(begun)) == len(begun)
    keys = [number for sampler in samplers for number, _ in sampler]
    assert len(set(keys)) == len(keys) == 38 // processes * processes
    assert max(Counter(image for each in found for image in each).values()) == (1 if processes == 3 else 2)


def test_limits_take_the_first(shards):
    data = load(shards, max_train_samples=20, max_eval_samples=3)
    assert sorted(numbers(StreamSampler(data.train, 1, 8))) == list(range(20))
    assert numbers(StreamSampler(data.validation, None, 1)) == [100, 101, 102]
    assert "the first 20 train images are used" in data.notes
    halves = [numbers(StreamSampler(data.train, 1, 8, process, 2)) for process in (0, 1)]
    assert [len(half) for half in halves] == [10, 10] and not set(halves[0]) & set(halves[1])


def test_unknown_number_of_images(shards, monkeypatch):
    monkeypatch.setattr(local, "rows_in", lambda file: 0)
    with pytest.raises(InputError, match=r"does not say how many images.*--max_steps"):
        load(shards)
    data = load(shards, images=80)  # Two passes and a bit.
    assert (len(data.train), len(data.validation)) == (80, 11)
    found = numbers(StreamSampler(data.train, 3, 16))
    assert sorted(found[:38]) == sorted(found[38:76]) == list(range(38)) and found[:38] != found[38:76]
    assert len(load(shards, max_train_samples=10).train) == 10


def test_what_an_evaluation_lacks_is_told(shards):
    split = load(shards).validation
    split.length = 12
    with pytest.raises(InputError, match="has 11 images, and was said to have 12"):
        numbers(StreamSampler(split, None, 1))


def test_labels_are_checked_as_they_are_read(tmp_path):
    write_files(tmp_path, "train", (4,))
    rows = make_split(range(4))
    rows.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1}).cast(rows.features).to_parquet(
        str(tmp_path / "test.parquet")
    )
    with pytest.raises(InputError, match=r"validation split: an image has the label (-1|None), expected 0 to 2"):
        numbers(StreamSampler(load(tmp_path).validation, None, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"repeated_aug": True}, "`repeated_aug` does not go with `streaming`"),
        ({"skip_bad_images": True}, "`skip_bad_images` does not go with"),
        ({"check_images": "all"}, "`check_images: all` does not go with"),
        ({"data_set": "digits"}, "`data_set: digits` does not go with"),
        ({"data_path": None}, "No data set is named"),
        ({"data_path": "gone"}, "gone does not exist"),
        ({"validation_split": "extra"}, "has train, validation"),
        ({"label_column": "img"}, r"are one column, 'img'"),
    ],
)
def test_refused(shards, options, message):
    with pytest.raises(InputError, match=message):
        load_data(DataArguments(**{"data_path": str(shards), "streaming": True, **options}), 0)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "classes"])
def test_folders_of_image_files(tmp_path, image_folder, kind):
    """The same images with the same labels as without streaming, in parts that processes share."""
    root = image_folder
    if kind != "classes":
        root = tmp_path / "flat"
        make_flat_folder(root / "train", kind)
        make_flat_folder(root / "test", kind, count=2)
    plain, data = load(root, streaming=False), load(root)
    assert (data.labels, len(data.train), len(data.validation)) == (list(COLOURS), 12, 6)
    assert [row for _, row in StreamSampler(data.validation, None, 1)] == list(plain.validation)
    shares = [[row for _, row in StreamSampler(data.train, 3, 4, process, 2)] for process in (0, 1)]
    rows = sorted(shares[0] + shares[1], key=lambda row: row["image"]["path"])
    assert rows == sorted(plain.train, key=lambda row: row["image"]["path"])
    assert shares[0] + shares[1] != list(plain.train)
    for row in rows:
        channel = np.asarray(decode(row["image"], "image")).mean(axis=(0, 1)).argmax()
        assert data.labels[row["label"]] == ("red", "green", "blue")[channel]


def test_folders_that_cannot_be_streamed(tmp_path):
    (tmp_path / "only").mkdir()
    write_files(tmp_path / "only", "train", (3,))
    with pytest.raises(InputError, match="no split to evaluate on, and none is held out of a stream"):
        load(tmp_path / "only")
    write_files(tmp_path / "only", "test", (3,), names=("a", "b", "c"))
    with pytest.raises(InputError, match="the classes of the training and the validation split differ"):
        load(tmp_path / "only")
    (tmp_path / "only" / "test-00000-of-00001.parquet").write_bytes(b"text")
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet cannot be read"):
        load(tmp_path / "only")


def test_reading_ahead():
    read = []

    def rows(count):
        for number in range(count):
            read.append(number)
            yield number
        raise OSError("the network is gone")

    iterator = read_ahead(rows(6), 2)
    assert next(iterator) == 0
    iterator.close()
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert len(read) < 6
    iterator = read_ahead(rows(3), 2)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="network"):
        next(iterator)


def words_of(shards, small, folder, batch, *more):
    words = [*small, "--streaming", "--data_path", str(shards), "--shuffle_buffer", "12", "--model", "karat_digits"]
    words += ["--image_size", "8", "--patch_size", "4", "--num_train_epochs", "2", "--learning_rate", "1e-2"]
    words += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "0", "--seed", "3"]
    words += ["--aa", "rand-m9-mstd0.5-inc1", "--hidden_dropout_prob", "0", *more, "--output_dir", str(folder)]
    words[words.index("--per_device_train_batch_size") + 1] = str(batch)
    return words


@pytest.mark.system
def test_run_goes_on_exactly_with_any_number_of_workers(shards, tmp_path, small, capsys):
    whole, part, by_workers = (tmp_path / name for name in ("whole", "part", "by_workers"))
    assert script.main(words_of(shards, small, whole, 16)) == 0
    assert "38 training and 11 held-out images, 3 classes" in capsys.readouterr().out
    # In the middle of the second epoch, of three steps.
    assert script.main(words_of(shards, small, part, 16, "--resume", str(whole / "checkpoint-4"))) == 0
    words = words_of(shards, small, by_workers, 16)
    words[words.index("--dataloader_num_workers") + 1] = "2"
    assert script.main(words) == 0
    assert script.main([*words_of(shards, small, tmp_path / "device", 16), "--augment_on", "device"]) == 0
    expected = load_file(whole / "model.safetensors")
    for folder in (part, by_workers):
        assert all(
            torch.equal(tensor, expected[name]) for name, tensor in load_file(folder / "model.safetensors").items()
        )
    first, second = (json.loads((folder / "all_results.json").read_text()) for folder in (whole, by_workers))
    assert first["eval_loss"] == second["eval_loss"] and first["train_loss"] == second["train_loss"]


@pytest.mark.system
def test_two_processes(shards, tmp_path, small, capfd):
    """Each of 19 images an epoch; the evaluation is one process's, of every image once."""
    words = words_of(shards, small, tmp_path / "run", 8)
    statuses = in_two_forks(lambda: script.main(words))
    out, errors = capfd.readouterr()
    assert statuses == [0, 0], out + errors
    assert "2 processes" in out and "each process reads 2 of them" in out
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 6
    found = json.loads((tmp_path / "run" / "all_results.json").read_text())
    evaluate = [*small, "--streaming", "--data_path", str(shards), "--eval", "--resume", str(tmp_path / "run")]
    assert script.main([*evaluate, "--output_dir", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "eval_results.json").read_text())
    for name in ("eval_loss", "eval_accuracy"):
        assert alone[name] == pytest.approx(found[name], rel=1e-5), name
