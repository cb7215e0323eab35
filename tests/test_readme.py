# SPDX-License-Identifier: Apache-2.0
"""
The documents say what is true: their snippets run, in order, and their tables are what code, recipes and rows say.

A comment before a snippet says how it is tested: `<!-- test: reduced -->` runs it with small local data in place of
what needs a network, a large data set or hours; `make` and `pip` only check that what they name exists; `official` is
run by `test_official_commands.py`. Without a comment a bash or python snippet runs as it stands, and `text` is not run.
The README's snippets are those of the pages, where they run.
"""

import configparser
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks import plots
from benchmarks.table import read as benchmark_rows
from image_classification.settings import official_flags
from modeling_karat_vit import KArAtViTConfig
from results.page import PAGE, TABLES, regenerate
from tests.test_official_commands import OFFICIAL


PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *PAGES]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
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


def snippets(path: Path) -> list[Snippet]:
    pattern = r"(?:^<!-- test: (?P<test>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    text = path.read_text(encoding="utf-8")
    return [
        Snippet(text[: match.start("code")].count("\n") + 1, match["language"], match["test"] or "", match["code"])
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def snippets_to_run(path: Path) -> list[Snippet]:
    return [
        snippet
        for snippet in snippets(path)
        if snippet.language in ("bash", "python") and snippet.test not in ("make", "pip", "official")
    ]


# The galleries are made by a command, with commands for any checkpoint; test_gallery.py tests them.
WRITTEN = [path for path in PAGES if "gallery" not in path.parts]
RUNNABLE = [path for path in WRITTEN if snippets_to_run(path)]


def prose(path: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def tables(path: Path, title: str) -> list[list[list[str]]]:
    """A document's tables whose first column has this title: rows of cells, the head first."""
    found, rows = [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" |")]
        if rows is None:
            found.append(rows := [cells])
        elif not set(cells[0]) <= {"-", " "}:
            rows.append(cells)
    found = [rows for rows in found if rows[0][0] == title]
    assert found, f"{name_of(path)} has no table of {title}"
    return found


def table(path: Path, title: str) -> list[list[str]]:
    ((_, *rows),) = tables(path, title)
    return rows


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


def test_what_runs():
    assert {"getting-started", "model", "training", "data", "hub", "analysis"} <= {path.stem for path in RUNNABLE}
    elsewhere = [(snippet.test, snippet.code) for path in WRITTEN for snippet in snippets(path)]
    for path in set(DOCUMENTS) - set(PAGES):
        for snippet in snippets(path):
            assert snippet.language == "bibtex" or (snippet.test, snippet.code) in elsewhere, snippet


@pytest.mark.parametrize("path", [*DOCUMENTS[:2], *WRITTEN], ids=name_of)
def test_every_snippet_says_how_it_is_tested(path):
    found = snippets(path)
    ways = {"python": {"", "reduced"}, "bash": {"", "reduced", "make", "pip", "official"}}
    for snippet in found:
        assert snippet.test in ways.get(snippet.language, {""} if snippet.language in ("text", "bibtex") else ()), (
            snippet
        )
    assert path.read_text(encoding="utf-8").count("<!-- test: ") == sum(1 for snippet in found if snippet.test)


def commands(test: str) -> list[str]:
    return [
        command
        for path in (*DOCUMENTS[:2], *WRITTEN)
        for snippet in snippets(path)
        if snippet.test == test
        for command in snippet.commands()
    ]


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    used = {shlex.split(command)[1] for command in commands("make")}
    named = {target for path in DOCUMENTS for target in re.findall(r"`make ([a-z-]+)", prose(path))}
    assert {"train", "test", "docs"} <= used and used | named <= targets


def test_the_extras_exist():
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    assert {extra for command in commands("pip") for extra in re.findall(r"\[(\w+)\]", command)} == set(
        setup["options.extras_require"]
    )
    described = re.search(r"to load and predict: (.*)", (DOCS / "getting-started.md").read_text())[1].split(", ")
    assert described == re.findall(r"^([\w-]+)", setup["options"]["install_requires"].strip(), re.MULTILINE)


def test_the_official_commands():
    words = [" ".join(command.split()) for command in commands("official")]
    names = {"G3B": "--blockwise", "G3U": "--universal"}
    assert words == [OFFICIAL.format(name=name, sharing=sharing) for name, sharing in names.items()]


def test_the_tables_of_presets():
    parameters = {}
    for path in (PROJECT / "configuration").glob("*/config.json"):
        config = AutoConfig.from_pretrained(path.parent)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        parameters[path.parent.name] = config, f"{model.num_parameters():,}"
    rows = table(DOCS / "model.md", "preset")
    assert {name.strip("`") for name, _, _ in rows} == set(parameters)
    for name, attention, count in rows:
        config, expected = parameters[name.strip("`")]
        assert count == expected, name
        if config.model_type == "vit":
            assert attention.startswith("softmax")
        else:
            assert attention.startswith(f"KArAt, Fourier G{config.grid_size}, {config.sharing}")
    for name, *counts in table(DOCUMENTS[0], "preset"):
        endings = ("", "_karat", "_karat_universal")
        assert counts == [parameters[name.strip("`") + ending][1] for ending in endings], name


def test_the_table_of_settings():
    rows = {
        name.strip("`"): (values, default.strip("`")) for name, values, default in table(DOCS / "model.md", "field")
    }
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
    for _, settings, _ in table(DOCS / "model.md", "operator"):
        depth = {"karat_depth": 1} if "karat_depth=1" in settings else {}
        mode = re.search(r"modular_mode=(\"\w+\"|None)", settings)[1].strip('"')
        KArAtViTConfig(modular_mode=None if mode == "None" else mode, **depth)


def test_the_table_of_official_flags():
    begin, end = "<!-- official flags: begin -->", "<!-- official flags: end -->"
    page = (DOCS / "official-command-line.md").read_text()
    assert page.split(begin)[1].split(end)[0].strip() == official_flags.markdown_table()


def reported(folder: str, name: str) -> str:
    recipe = yaml.safe_load((PROJECT / "configuration" / folder / f"{name}.yaml").read_text())
    return ", ".join(f"{recipe['reported'][metric]:.2f}" for metric in ("top1", "top5") if metric in recipe["reported"])


def test_the_figures_of_the_paper_are_those_of_the_recipes():
    compared = 0
    for (_, *folders), *rows in tables(DOCS / "results.md", "recipe"):
        for name, *cells in rows:
            for folder, cell in zip(folders, cells):
                if folder.startswith("`"):
                    assert cell == reported(folder.strip("`"), name.strip("`")), (folder, name)
                    compared += 1
    assert compared == len([path for path in PROJECT.glob("configuration/*/*.yaml") if "reported:" in path.read_text()])
    for row in table(DOCUMENTS[0], "model"):
        name = f"vit_{row[0].split()[0].lower()}_patch16_224"
        for folder, cell in zip(("cifar10", "imagenet1k"), row[1:]):
            both = [reported(folder, name + ending).split(", ")[0] for ending in ("", "_karat")]
            assert cell == ", ".join(both), (folder, name)


def test_the_ratios_are_those_measured_last():
    measured = {plots.label(row): row for row in plots.latest(plots.RESULTS / "cuda.csv")}
    readme = [(row[0], *row[3:]) for row in table(DOCUMENTS[0], "model")]
    page = [row[:3] for _, *rows in tables(DOCS / "performance.md", "training step") for row in rows]
    assert {label for label, *_ in page} == set(measured)
    for label, time, memory in (*readme, *page):
        row = measured[label]
        assert (time, memory) == (f"{float(row['ratio_gpu']):.2f}", f"{float(row['ratio_memory']):.2f}"), label


def test_the_whole_runs_are_those_measured_last():
    key = ("model", "batch", "provider", "start", "epochs")
    rows = benchmark_rows(plots.RESULTS / "cuda_runs.csv", key, benchmark="runs", mode="recorded")
    found = {}
    for (model, batch, provider, start, epochs), (*_, row) in rows.items():
        if epochs != "100":  # A warm start follows a cold one, and has the rates.
            found.setdefault((model, batch), {}).setdefault(provider, {})[start] = row
    shown = tables(DOCS / "performance.md", "model")[0][1:]
    assert len(shown) == len(found)
    for label, batch, softmax, karat, ratio, _, starts in shown:
        ours, theirs = (found[label.split()[0].lower(), batch][provider] for provider in ("karat", "softmax"))
        rated = list(ours.values())[-1]
        rates = [float(row["images_per_second"]) for row in (list(theirs.values())[-1], rated)]
        assert [softmax, karat, ratio] == [*(f"{rate:,.0f}" for rate in rates), f"{float(rated['ratio_time']):.2f}"]
        assert starts == " / ".join(f"{float(row['startup_seconds']):.0f}" for row in ours.values())


def test_the_runs_are_those_of_the_table():
    """`python -m results.page` would change nothing, and has something to make."""
    text = PAGE.read_text(encoding="utf-8")
    assert regenerate(text) == text and all(f"<!-- results: {name} -->\n|" in text for name in TABLES)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@every_document
def test_its_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.is_file(), target
        # The site has what is in docs/, and nothing else.
        assert path not in PAGES or linked.is_relative_to(DOCS), target
        assert not anchor or anchor in anchors(linked), target


@every_document
def test_the_files_it_names_exist(path):
    folders = {folder.name for folder in PROJECT.iterdir() if folder.is_dir()} - {"output", "outputs", "build"}
    for named in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", prose(path)):
        first, *rest = named.rstrip("/").split("/")
        if first in folders and (rest or named.endswith("/")) and not any(part.isupper() for part in rest):
            assert "MODEL" in named or "NAME" in named or (PROJECT / named).exists(), named


def test_the_layout_is_what_is_there():
    named = {name.strip("`") for name, _ in table(DOCS / "developing.md", "part")}
    assert all((PROJECT / name).exists() for name in named), named
    packages = {f"{path.parent.name}/" for path in PROJECT.glob("*/__init__.py")}
    assert packages <= named


def test_every_page_is_in_the_navigation_once():
    site = tomllib.loads((PROJECT / "zensical.toml").read_text())["project"]

    def pages(items) -> list[str]:
        return [
            page
            for item in items
            for value in item.values()
            for page in ([value] if isinstance(value, str) else pages(value))
        ]

    assert sorted(pages(site["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


@pytest.mark.parametrize("path", sorted((DOCS / "api").glob("*.md")), ids=name_of)
def test_what_the_api_pages_show_is_there(path):
    found = re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE)
    assert found
    for name in found:
        module, _, attribute = name.rpartition(".")
        try:
            shown = getattr(importlib.import_module(module), attribute)
        except AttributeError:
            shown = importlib.import_module(name)
        # A browser takes <B> for a tag, unless it is code.
        assert shown.__doc__ and not re.search(r"<\w+>", re.sub(r"`[^`]*`", "", shown.__doc__)), name


def test_ci_lints_as_make_does():
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1]
    for command in lint.strip().splitlines():
        words = [word for word in command.replace("$(python)", ".venv/bin/python").split() if word != "."]
        assert any(hook["entry"].split()[: len(words)] == words for hook in hooks), command
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]


def test_the_picture_is_what_its_script_draws():
    code = compile((PROJECT / "docs" / "draw_karat.py").read_text(), "draw_karat.py", "exec")
    drawing = {"__name__": "draw_karat"}
    exec(code, drawing)
    assert drawing["picture"]() == (PROJECT / "docs" / "karat.svg").read_text(encoding="utf-8")
