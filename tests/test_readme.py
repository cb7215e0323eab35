# SPDX-License-Identifier: Apache-2.0
"""
The README says what is true: its snippets run, in order, and its tables are what the code says.

A comment before a snippet says how it is tested: `<!-- test: reduced -->` runs it with small local data in place of
what needs a network, a large data set or hours; `make` and `pip` only check that what they name exists. Without a
comment it runs as it stands.
"""

import configparser
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from image_classification import official_flags
from modeling_karat_vit import KArAtViTConfig


PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
LINKED = (
    "analysis",
    "configuration",
    "image_classification",
    "modeling_karat_vit",
    "predict.py",
    "run_image_classification.py",
)

# What a reduced snippet has in place of the real thing.
REPLACED = {
    "path/to/imagenet": "data/photos",
    "path/to/images": "data/photos",
    "--data_set CIFAR10": "--data_path data/photos",
    "facebook/deit-tiny-patch16-224": "checkpoints/deit",
    "pretrained=True": "pretrained=False",
    "USER/NAME": "me/readme",
    "--epochs 100": "--epochs 1",
    "--num_workers 8": "--num_workers 0",
}
SIZES = {
    "image_size": 32,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
SHORT = {"num_train_epochs": 1, "dataloader_num_workers": 0}
TRAIN = "python run_image_classification.py"


@dataclass
class Snippet:
    line: int
    language: str
    test: str
    code: str

    def commands(self) -> list[str]:
        """The commands of a bash snippet, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]

    def reduced(self) -> str:
        code = self.code
        for real, small in REPLACED.items():
            code = code.replace(real, small)
        if self.language == "python":
            return code
        commands = Snippet(self.line, self.language, self.test, code).commands()
        return "\n".join(command + self._extra(command) for command in commands)

    @staticmethod
    def _extra(command: str) -> str:
        flags = {} if not command.startswith(TRAIN) else SHORT | (SIZES if "--model " in command else {})
        return "".join(f" --{name} {value}" for name, value in flags.items())


def snippets() -> list[Snippet]:
    pattern = r"(?:^<!-- test: (?P<test>\w+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    return [
        Snippet(README[: match.start("code")].count("\n") + 1, match["language"], match["test"] or "", match["code"])
        for match in re.finditer(pattern, README, re.MULTILINE | re.DOTALL)
    ]


def tables() -> dict[str, list[list[str]]]:
    """The README's tables by the title of their first column; cells without markup."""
    found, rows = {}, None
    for line in README.splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows is None:
            rows = found.setdefault(cells[0], [])
        elif not set(cells[0]) <= {"-", " "}:
            rows.append(cells)
    return found


@pytest.fixture
def workspace(tmp_path, monkeypatch, hub):
    """A folder that looks like the clone, with small data, a small DeiT, and a short default run in it; and a Hub."""
    for name in LINKED:
        (tmp_path / name).symlink_to(PROJECT / name)
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
    run(f"{TRAIN} --num_train_epochs 1")
    return tmp_path


def run(script: str) -> None:
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"


def test_every_snippet_runs_in_order(workspace):
    ran = 0
    for snippet in snippets():
        if snippet.language not in ("bash", "python") or snippet.test in ("make", "pip"):
            continue
        code = snippet.reduced() if snippet.test == "reduced" else snippet.code
        try:
            if snippet.language == "bash":
                run(code)
            else:
                # Each on its own, since that is how they are copied.
                exec(compile(code, f"README.md, line {snippet.line}", "exec"), {"__name__": "snippet"})
        except Exception as error:
            raise AssertionError(f"README.md, line {snippet.line}: {error}") from error
        ran += 1
    assert ran >= 10


def test_every_snippet_says_how_it_is_tested():
    assert {(snippet.language, snippet.test) for snippet in snippets()} <= {
        ("python", ""),
        ("python", "reduced"),
        ("bash", ""),
        ("bash", "reduced"),
        ("bash", "make"),
        ("bash", "pip"),
        ("bibtex", ""),
    }
    assert README.count("<!-- test: ") == sum(1 for snippet in snippets() if snippet.test)


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    commands = [command for snippet in snippets() if snippet.test == "make" for command in snippet.commands()]
    used = {shlex.split(command)[1] for command in commands}
    assert {"train", "test"} <= used <= targets


def test_the_extras_exist():
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    commands = [command for snippet in snippets() if snippet.test == "pip" for command in snippet.commands()]
    assert {extra for command in commands for extra in re.findall(r"\[(\w+)\]", command)} == set(
        setup["options.extras_require"]
    )
    described = re.search(r"to load and predict: (.*)", README)[1].split(", ")
    assert described == re.findall(r"^([\w-]+)", setup["options"]["install_requires"].strip(), re.MULTILINE)


def test_the_table_of_presets():
    rows = {name.strip("`"): (attention, parameters) for name, attention, parameters in tables()["preset"]}
    assert set(rows) == {path.parent.name for path in (PROJECT / "configuration").glob("*/config.json")}
    for name, (attention, parameters) in rows.items():
        config = AutoConfig.from_pretrained(PROJECT / "configuration" / name)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        assert parameters == f"{model.num_parameters():,}", name
        if config.model_type == "vit":
            assert attention.startswith("softmax")
        else:
            assert attention.startswith(f"KArAt, Fourier G{config.grid_size}, {config.sharing}")


def test_the_table_of_settings():
    rows = {name.strip("`"): (values, default.strip("`")) for name, values, default in tables()["field"]}
    config = KArAtViTConfig()
    own = set(vars(config)) - set(vars(ViTConfig())) - {"format_version"}
    assert {name for name in own if not name.startswith("_")} == set(rows)
    for name, (_, default) in rows.items():
        assert default == repr(getattr(config, name)).replace("'", '"'), name
    choices = {name: re.findall(r'`"(\w+)"`', values) for name, (values, _) in rows.items()}
    for name in ("basis_type", "wavelet_type", "sharing", "karat_init", "modular_mode"):
        for value in choices[name]:
            assert getattr(KArAtViTConfig(**{name: value}), name) == value


def test_the_table_of_operators():
    for _, settings, _ in tables()["operator"]:
        depth = {"karat_depth": 1} if "karat_depth=1" in settings else {}
        mode = re.search(r"modular_mode=(\"\w+\"|None)", settings)[1].strip('"')
        KArAtViTConfig(modular_mode=None if mode == "None" else mode, **depth)


def test_the_table_of_official_flags():
    begin, end = "<!-- official flags: begin -->", "<!-- official flags: end -->"
    assert README.split(begin)[1].split(end)[0].strip() == official_flags.markdown_table()


def test_the_files_it_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (PROJECT / target).is_file(), target
    layout = README.split("## How it is laid out")[1].split("```")[1]
    folder = PROJECT
    for line in layout.strip().splitlines():
        name = line.split()[0]
        folder = PROJECT if not line.startswith(" ") else folder
        assert (folder / name).exists(), name
        folder = PROJECT / name if name.endswith("/") else folder


def test_the_picture_is_what_its_script_draws():
    code = compile((PROJECT / "docs" / "draw_karat.py").read_text(), "draw_karat.py", "exec")
    drawing = {"__name__": "draw_karat"}
    exec(code, drawing)
    assert drawing["picture"]() == (PROJECT / "docs" / "karat.svg").read_text(encoding="utf-8")
