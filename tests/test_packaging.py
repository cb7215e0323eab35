# SPDX-License-Identifier: Apache-2.0
"""Installation: what setup.cfg, the pinned versions, the Makefile and the papers beside them promise each other."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


PROJECT = Path(__file__).parents[1]
SPDX = "# SPDX-License-Identifier: Apache-2.0"


@pytest.fixture
def setup():
    parser = configparser.ConfigParser()
    parser.read(PROJECT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def requirements(setup) -> list[Requirement]:
    extras = setup["options.extras_require"].values()
    return [Requirement(line) for text in (setup["options"]["install_requires"], *extras) for line in lines(text)]


def pins(name: str) -> dict[str, str]:
    pairs = [line.split("==") for line in lines((PROJECT / name).read_text())]
    return {canonicalize_name(package): version for package, version in pairs}


def test_every_top_level_package_is_listed(setup):
    folders = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    run_from_the_clone = {"analysis", "benchmarks", "results", "tests"}
    assert folders - run_from_the_clone == set(lines(setup["options"]["packages"]))


def test_everything_that_is_asked_for_is_pinned(setup):
    pinned = pins("constraints.txt")
    for requirement in requirements(setup):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_lowest_transformers_is_the_one_that_setup_allows(setup):
    transformers = next(requirement for requirement in requirements(setup) if requirement.name == "transformers")
    lowest = pins("requirements-lowest.txt")["transformers"]
    assert f">={lowest.removesuffix('.0')}" in str(transformers.specifier).split(",")
    assert transformers.specifier.contains(lowest)
    assert not transformers.specifier.contains("6.0.0")


def test_version_and_licence_agree(setup):
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["version"] == setup["metadata"]["version"]
    assert citation["license"] == setup["metadata"]["license_expression"] == "Apache-2.0"
    assert "Apache License" in (PROJECT / "LICENSE").read_text()
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        "Maity",
        "Hitsman",
        "Li",
        "Dutta",
    ]


def test_every_source_file_begins_with_the_licence():
    folders = [PROJECT, *(path for path in PROJECT.iterdir() if path.is_dir() and path.name[0] != ".")]
    sources = [
        path
        for folder in folders
        for pattern in ("*.py", "*.yaml")
        for path in (folder.glob(pattern) if folder == PROJECT else folder.rglob(pattern))
        if not folder.name.startswith("output")
    ]
    assert len(sources) > 20
    without = [path for path in sources if not path.read_text(encoding="utf-8").startswith(SPDX)]
    assert not without


def test_ci_runs_on_a_clean_checkout():
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


# The Makefile, with programs in place of Python that write down how they are called.


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
    assert ran[0] == "-m ruff check ."
    assert ran[1] == "-m ruff format --check ."
    assert ran[2] == "-m pytest -n 2"
    assert ran[3].startswith("-m pytest -n 2 tests/modeling_karat_vit ")
    assert len(ran) == 4
    named = ran[3].split()[4:]
    assert all((PROJECT / path.partition("::")[0]).exists() for path in named)


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
        clone / "fits",
        'if [ "$1" = -m ]; then mkdir -p "$3/bin"; cp /bin/true "$3/bin/python"; else echo fits; fi',
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
