# SPDX-License-Identifier: Apache-2.0
"""The snippets of the documents run, in order."""

import dataclasses
import shlex
import shutil

import pytest
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

import predict
from analysis.__main__ import main as analyse
from image_classification.main import main as train
from tests.documents import PROJECT, RUNNABLE, SIZES, name_of, snippets_to_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a short default run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("python run_image_classification.py --num_train_epochs 1")
    return folder / "outputs"


@pytest.fixture
def workspace(tmp_path, monkeypatch, hub, trained):
    """A folder that looks like the clone, with small data, a small DeiT, and a short default run in it; and a Hub."""
    (tmp_path / "configuration").symlink_to(PROJECT / "configuration")
    shutil.copytree(trained, tmp_path / "outputs")
    for split, count in (("train", 4), ("validation", 2)):
        for label, color in (("cat", (200, 80, 40)), ("dog", (40, 80, 200))):
            folder = tmp_path / "data" / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), tuple(c + 3 * index for c in color)).save(folder / f"{index}.png")
    deit = ViTForImageClassification(ViTConfig(**SIZES, patch_size=16, layer_norm_eps=1e-6, num_labels=10))
    deit.save_pretrained(tmp_path / "checkpoints" / "deit")
    dinov2 = Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 56}, patch_size=8))
    dinov2.save_pretrained(tmp_path / "checkpoints" / "dinov2")
    processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "checkpoints" / "dinov2")
    monkeypatch.chdir(tmp_path)


def run(command: str) -> None:
    """A command of ours, in this process: to start another one takes longer than what it does in small."""
    python, program, *words = shlex.split(command)
    assert python == "python", command
    if program == "-m":
        assert words.pop(0) == "analysis", command
        status = analyse(words)
    else:
        assert (PROJECT / program).is_file(), command
        status = {"predict.py": predict.main, "run_image_classification.py": train}[program](words)
    assert status == 0, command


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_every_snippet_runs_in_order(path, workspace):
    for snippet in snippets_to_run(path):
        if snippet.test == "reduced":
            snippet = dataclasses.replace(snippet, code=snippet.reduced())
        try:
            if snippet.language == "bash":
                for command in snippet.commands():
                    run(command)
            else:
                # Each on its own, since that is how they are copied.
                exec(compile(snippet.code, f"{path.name}, line {snippet.line}", "exec"), {"__name__": "snippet"})
        except Exception as error:
            raise AssertionError(f"{name_of(path)}, line {snippet.line}: {error}") from error
