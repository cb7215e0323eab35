# SPDX-License-Identifier: Apache-2.0
"""Installation: what setup.cfg, the pinned versions, the Makefile and the papers beside them promise each other."""

import configparser
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages


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


def test_every_package_is_installed(setup):
    code = {".".join(path.parent.relative_to(PROJECT).parts) for path in PROJECT.glob("[a-z]*/**/*.py")}
    run_from_the_clone = {"analysis", "benchmarks", "build", "docs", "outputs", "results", "tests"}
    expected = {name for name in code if name.partition(".")[0] not in run_from_the_clone}
    found = find_packages(PROJECT, include=lines(setup["options.packages.find"]["include"]))
    assert setup["options"]["packages"] == "find:"
    assert expected == set(found)


def test_what_is_no_code_is_installed_too(setup):
    packages = [PROJECT / name for name in lines(setup["options.packages.find"]["include"]) if "*" not in name]
    files = {path for package in packages for path in package.rglob("*") if path.is_file()}
    listed = setup["options.package_data"].items()
    installed = {path for name, pattern in listed for path in (PROJECT / name.replace(".", "/")).glob(pattern)}
    assert installed == {path for path in files if path.suffix not in (".py", ".pyc")}


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


@pytest.mark.system
def test_ci_runs_on_a_clean_checkout():
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
