# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints to look at."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTForImageClassification

from analysis import style
from analysis.__main__ import main
from modeling_karat_vit import KArAtViTForImageClassification
from tests.images import own_library_settings  # noqa: F401
from tests.models import make_model, save_checkpoint, with_scores


@pytest.fixture(autouse=True)
def _own_library_settings(own_library_settings):  # noqa: F811
    pass


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch):
    """Drawing a figure at the resolution of print takes longer than what it shows."""
    monkeypatch.setitem(style._RC, "savefig.dpi", 60)


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 12,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "id2label": {0: "cat", 1: "dog", 2: "newt"},
    "label2id": {"cat": 0, "dog": 1, "newt": 2},
}


def karat_model(**fields) -> KArAtViTForImageClassification:
    """2 blocks, 2 heads, 3 x 3 patches (N = 10), r = 4; queries and keys large enough for scores of about 1."""
    return with_scores(make_model("karat", **{**SIZES, "karat_rank": 4, **fields}))


def softmax_model() -> ViTForImageClassification:
    return with_scores(make_model("softmax", seed=1, **SIZES))


def save(model, folder) -> str:
    return save_checkpoint(model, folder, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a table that was written."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def karat(tmp_path) -> str:
    return save(karat_model(), tmp_path / "karat")


@pytest.fixture
def softmax(tmp_path) -> str:
    return save(softmax_model(), tmp_path / "softmax")


@pytest.fixture
def photos(tmp_path) -> str:
    """A folder of six 12 x 12 images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> str:
    """A run on 64 digits: 2 epochs at a rate of 0 (the weights stay at their start), both checkpoints kept."""
    from image_classification.main import main as train

    folder = str(tmp_path_factory.mktemp("runs") / "digits")
    flags = (
        "configuration/digits.yaml --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
        "--intermediate_size 16 --num_train_epochs 2 --max_train_samples 64 --max_eval_samples 32 --learning_rate 0 "
        "--save_total_limit 0 --dataloader_num_workers 0 --use_cpu --disable_tqdm"
    )
    assert train([*flags.split(), "--output_dir", folder]) == 0
    return folder


@pytest.fixture
def analyse(tmp_path, capsys):
    """A function `analyse(*words)` that runs a command into `tmp_path / "out"`, must succeed, and returns that path."""

    def call(*words):
        status = main([*map(str, words), "--output", str(tmp_path / "out")])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return tmp_path / "out"

    return call


@pytest.fixture
def refusal(tmp_path, capsys):
    """A function `refusal(*words)` that runs a command, which must fail before it writes; returns its message."""

    def call(*words):
        before = sorted(tmp_path.rglob("*"))
        try:
            status = main([*map(str, words), "--output", str(tmp_path / "out")])
        except SystemExit as stopped:  # A flag's value by itself.
            status = stopped.code
        assert status == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return call
