# SPDX-License-Identifier: Apache-2.0
"""The snippets of the documents run, in order."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from tests.documents import PROJECT, RUNNABLE, SIZES, name_of, snippets_to_run


LINKED = (
    "analysis",
    "configuration",
    "image_classification",
    "modeling_karat_vit",
    "predict.py",
    "run_image_classification.py",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a short default run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    run(f"{shlex.quote(sys.executable)} {PROJECT}/run_image_classification.py --num_train_epochs 1", folder)
    return folder / "outputs"


@pytest.fixture
def workspace(tmp_path, monkeypatch, hub, trained):
    """A folder that looks like the clone, with small data, a small DeiT, and a short default run in it; and a Hub."""
    for name in LINKED:
        (tmp_path / name).symlink_to(PROJECT / name)
    shutil.copytree(trained, tmp_path / "outputs")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for split, count in (("train", 4), ("validation", 2)):
        for label, color in (("cat", (200, 80, 40)), ("dog", (40, 80, 200))):
            folder = tmp_path / "data" / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), tuple(c + 3 * index for c in color)).save(folder / f"{index}.png")
    deit = ViTForImageClassification(ViTConfig(**SIZES, patch_size=16, layer_norm_eps=1e-6, num_labels=10))
    deit.save_pretrained(tmp_path / "checkpoints" / "deit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run(script: str, folder: Path | None = None) -> None:
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_every_snippet_runs_in_order(path, workspace):
    for snippet in snippets_to_run(path):
        code = snippet.reduced() if snippet.test == "reduced" else snippet.code
        try:
            if snippet.language == "bash":
                run(code)
            else:
                # Each on its own, since that is how they are copied.
                exec(compile(code, f"{path.name}, line {snippet.line}", "exec"), {"__name__": "snippet"})
        except Exception as error:
            raise AssertionError(f"{name_of(path)}, line {snippet.line}: {error}") from error
