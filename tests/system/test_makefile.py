# SPDX-License-Identifier: Apache-2.0
"""The Makefile, with programs in place of Python that write down how they are called."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


PROJECT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "requirements-lowest.txt"):
        shutil.copy(PROJECT / name, folder / name)
    return folder


def make(clone, *arguments) -> subprocess.CompletedProcess:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("VENV", "PYTHON", "ARGS", "MAKEFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def recorder(clone, folder: str = ".venv") -> Path:
    """An environment whose Python only writes down its arguments; returns the file it writes them to."""
    program(clone / folder / "bin" / "python", f'echo "$@" >> "{clone}/calls"')
    return clone / "calls"


def test_help_lists_every_target(clone):
    result = make(clone)
    targets = re.search(r"^\.PHONY: (.*)$", (clone / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert result.returncode == 0
    assert re.findall(r"^  ([a-z-]+) +\S", result.stdout, re.MULTILINE) == targets


def test_a_second_call_skips_what_is_done(clone):
    calls = recorder(clone)
    assert make(clone, "train").returncode == 0
    first = calls.read_text().splitlines()
    assert any(
        "pip install" in call and "--constraint constraints.txt" in call and ".[train]" in call for call in first
    )
    assert first[-1] == "run_image_classification.py"

    calls.unlink()
    assert make(clone, "train", "ARGS=--num_train_epochs 2").returncode == 0
    assert calls.read_text().splitlines() == ["run_image_classification.py --num_train_epochs 2"]


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "constraints.txt"])
def test_a_change_of_the_requirements_installs_again(clone, name):
    calls = recorder(clone)
    make(clone, "train")
    stamp = (clone / ".venv" / ".installed-train").stat().st_mtime
    os.utime(clone / name, (stamp + 10, stamp + 10))
    calls.unlink()
    make(clone, "train")
    assert ".[train]" in calls.read_text()


def test_the_tests_run_twice(clone):
    calls = recorder(clone)
    assert make(clone, "test").returncode == 0
    ran = [call for call in calls.read_text().splitlines() if "pip" not in call]
    *lint, pinned, lowest = ran
    assert lint == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    assert pinned == "-m pytest -n 2 --dist worksteal"
    assert lowest.startswith(f"{pinned} tests/modeling_karat_vit ")
    named = [word for word in lowest.removeprefix(pinned).split() if not word.startswith("--")]
    assert all((PROJECT / path.partition("::")[0]).exists() for path in named)


def test_the_tests_of_transformers_run_twice(clone):
    calls = recorder(clone)
    assert make(clone, "test-hf").returncode == 0
    ran = [call for call in calls.read_text().splitlines() if "pip" not in call]
    assert [call.split()[0] for call in ran] == ["tests/hf/fetch.py", "-m"] * 2
    assert all(call.endswith(" tests/hf/common.py") for call in ran[1::2])


def test_a_failed_installation_is_tried_again(clone):
    python = clone / ".venv" / "bin" / "python"
    program(python, 'case "$*" in *editable*) exit 1;; esac')
    assert make(clone, "train").returncode != 0
    calls = recorder(clone)
    assert make(clone, "train").returncode == 0
    assert ".[train]" in calls.read_text()


def test_venv_picks_another_environment(clone):
    calls = recorder(clone, "elsewhere")
    assert make(clone, "train", "VENV=elsewhere").returncode == 0
    assert calls.read_text().splitlines()[-1] == "run_image_classification.py"
    assert not (clone / ".venv").exists()


def test_the_environment_is_made_from_the_first_interpreter_that_fits(clone):
    old = program(clone / "old", "echo old")
    bare = program(clone / "bare", "echo bare")
    fits = program(
        clone / "fits", 'if [ "$1" = -m ]; then mkdir -p "$3/bin"; cp /bin/true "$3/bin/python"; else echo fits; fi'
    )
    result = make(clone, "train", f"PYTHON=missing {old} {bare} {fits}")
    assert result.returncode == 0, result.stderr
    assert (clone / ".venv" / "bin" / "python").exists()


def test_without_a_fitting_interpreter_the_error_says_so(clone):
    old = program(clone / "old", "echo old")
    result = make(clone, "train", f"PYTHON=missing {old}")
    assert result.returncode != 0
    assert "no Python 3.11 or later" in result.stderr


def test_without_ensurepip_the_error_names_the_package(clone):
    bare = program(clone / "bare", "echo bare")
    result = make(clone, "train", f"PYTHON={bare}")
    assert result.returncode != 0
    assert "apt-get install python3-venv" in result.stderr


def test_a_folder_that_is_no_environment_is_left_alone(clone):
    (clone / "photos").mkdir()
    (clone / "photos" / "cat.jpg").touch()
    result = make(clone, "train", "VENV=photos")
    assert result.returncode != 0
    assert "VENV=photos" in result.stderr
    assert [path.name for path in (clone / "photos").iterdir()] == ["cat.jpg"]


def test_clean_deletes_caches_only(clone):
    kept = [clone / ".venv" / "lib" / "__pycache__" / "x.pyc", clone / "outputs" / "digits" / "model.safetensors"]
    gone = [clone / "package" / "__pycache__" / "x.pyc", clone / ".pytest_cache" / "x", clone / ".ruff_cache" / "x"]
    for path in kept + gone:
        path.parent.mkdir(parents=True)
        path.touch()
    assert make(clone, "clean").returncode == 0
    assert all(path.exists() for path in kept)
    assert not any(path.parent.exists() for path in gone)
