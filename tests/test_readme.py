# SPDX-License-Identifier: Apache-2.0
"""The documents say what is true: their tables are what code, recipes and rows say, and their links lead somewhere."""

import configparser
import csv
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

from benchmarks import plots
from benchmarks.table import read as benchmark_rows
from image_classification.models.families import has_windows, is_known
from image_classification.settings import official_flags
from modeling_karat_vit import KARATIZED_MODELS, KArAtViTConfig
from results import page as results_page
from tests.backbones import MAKERS, UNSUPPORTED
from tests.documents import DOCS, DOCUMENTS, PAGES, PROJECT, RUNNABLE, WRITTEN, commands, name_of, snippets


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


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
            found.setdefault((model, batch, provider), {})[start] = row
    shown = tables(DOCS / "performance.md", "model")[0][1:]
    assert len(shown) == sum(provider != "softmax" for *_, provider in found)
    for label, batch, softmax, karat, ratio, _, starts in shown:
        model, provider = label.split()[0].lower(), "hybrid" if "hybrid" in label else "karat"
        ours, theirs = found[model, batch, provider], found[model, batch, "softmax"]
        start = list(ours)[-1]
        rates = [float(row["images_per_second"]) for row in (theirs[start], ours[start])]
        assert [softmax, karat, ratio] == [*(f"{x:,.0f}" for x in rates), f"{float(ours[start]['ratio_time']):.2f}"]
        assert starts == " / ".join(f"{float(row['startup_seconds']):.0f}" for row in ours.values())


def rows_of(name: str) -> list[dict]:
    with (plots.RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_families_are_those_supported():
    """Each family and class has its place, with the figures that were measured; README has the same ones."""
    measured = [row for row in rows_of("cpu_families.csv") if row["benchmark"] == "starts"]
    assert len(measured) == len(MAKERS) and all(float(row["residual"]) == 0.0 for row in measured)
    readme, types = {}, []
    for family, kinds, models, _, taken, *figures, _ in table(DOCS / "karatize.md", "Family"):
        own = re.findall(r"`(\w+)`", kinds)
        known = [AutoConfig.for_model(name) for name in own if is_known(AutoConfig.for_model(name))]
        maps = "all, no maps" if any(map(has_windows, known)) else "all"
        assert taken == (maps if known else "Python only"), family
        types += own
        assert len(models.split(", ")) == len([cls for cls in KARATIZED_MODELS if cls.config_class.model_type in own])
        rows = [row for row in measured if row["model_type"] in own]
        assert figures == [f"{max(float(row[way]) for row in rows):.2f}" for way in ("replace", "fitted")], family
        readme[family] = [models, "0", figures[1], taken]
    assert sorted(types) == sorted({cls.config_class.model_type for cls in KARATIZED_MODELS})
    assert {family: cells for family, *cells in table(DOCUMENTS[0], "backbone")} == readme
    assert [name for name, _ in table(DOCS / "karatize.md", "Model")] == list(UNSUPPORTED)


def test_the_fine_tuned_backbones_are_those_measured():
    measured = [
        [
            "untouched" if row["model"] == "softmax" else f"`{row['model']}`",
            row["seed"],
            "" if row["model"] == "softmax" else f"{float(row['karat_rate']):g}",
            f"{float(row['logits_relative']):.2f}",
            *(f"{100 * float(row[when]):.1f}" for when in ("before", "after")),
        ]
        for row in rows_of("cuda_backbones.csv")
    ]
    assert table(DOCS / "karatize.md", "start") == measured


def test_the_memory_of_biases_is_what_was_measured():
    measured: dict[str, list[str]] = {}
    for row in rows_of("cpu_families.csv"):
        if row["benchmark"] == "memory":
            measured.setdefault(row["provider"], []).append(f"{float(row['peak_gib']):.2f}")
    assert {name: cells for name, *cells in table(DOCS / "karatize.md", "attention, GiB")} == measured


def test_the_runs_are_those_of_the_table():
    """`python -m results.page` would change nothing, and has something to make."""
    text, rows = results_page.PAGE.read_text(encoding="utf-8"), results_page.read()
    assert results_page.regenerate(text, rows) == text
    assert all(f"<!-- results: {name} -->\n" in text for name in results_page.TABLES)


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
