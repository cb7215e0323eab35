# SPDX-License-Identifier: Apache-2.0
"""`predict.py`: a tidy table from a checkpoint folder, and errors that name what is wrong."""

import re

import pytest
from transformers import pipeline

import predict
from tests.images import colour_image, own_library_settings  # noqa: F401
from tests.models import make_model, save_checkpoint


pytestmark = pytest.mark.usefixtures("own_library_settings")

LABELS = ["cat", "elephant", "dog", "owl", "bee", "ant"]


@pytest.fixture(scope="module", params=["karat", "softmax"])
def checkpoint(request, tmp_path_factory):
    return save_checkpoint(make_model(request.param, LABELS), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "photo.png"
    colour_image("red", 0, (30, 20)).save(path)
    return str(path)


def fails(capsys, *words):
    assert predict.main(list(map(str, words))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("predict.py: error: ") and not captured.out
    return captured.err


def test_five_best_labels_of_each_image(checkpoint, image, capsys):
    assert predict.main([image, image, "--model", checkpoint, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.strip().split("\n\n")
    assert first == second and not captured.err
    path, *rows = first.splitlines()
    assert path == image and len(rows) == 5
    expected = pipeline("image-classification", model=checkpoint, device="cpu")(image)
    found = [re.fullmatch(r"  (\w+) +([\d.]+) %", row).groups() for row in rows]
    assert found == [(item["label"], f"{100 * item['score']:.2f}") for item in expected]
    # A table: the numbers stand below each other.
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("wanted, shown", [(1, 1), (6, 6), (99, 6)])
def test_top_k(checkpoint, image, capsys, wanted, shown):
    assert predict.main([image, "--model", checkpoint, "--top-k", str(wanted), "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + shown


def test_models_that_are_none(checkpoint, image, tmp_path, capsys):
    assert "no model folder ./nowhere" in fails(capsys, image, "--model", "./nowhere")
    assert "run_image_classification.py" in fails(capsys, image, "--model", tmp_path / "nowhere")
    assert "holds no config.json" in fails(capsys, image, "--model", tmp_path)
    assert "someone/something cannot be loaded" in fails(capsys, image, "--model", "someone/something")


@pytest.mark.parametrize("words", [["--top-k", "0"], ["--topk", "3"], []])
def test_wrong_flags(image, capsys, words):
    with pytest.raises(SystemExit):
        predict.main([image, *words, *(["--model", "x"] if words else [])])
    assert "error" in capsys.readouterr().err
