# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks make of their rows, and that their parts run, in small."""

import csv
import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import backbones, devices, families, plots, rivals, runs, table, training_step
from benchmarks.common import HOST, Rates, Table, cpu
from image_classification import main
from image_classification.data.sources import load_data
from image_classification.settings.parser import parse_settings


SMALL = "--image_size 32 --hidden_size 24 --num_attention_heads 3 --intermediate_size 24 --num_hidden_layers 2"


def row(**fields):
    shape = {"benchmark": "model", "model": "tiny", "mode": "eager", "batch": 8, "tokens": 197, "dtype": "bfloat16"}
    return {**shape, "what": "train", **fields}


def test_ratios_are_to_softmax_of_the_same_shape():
    table = Table("cpu")
    table.add(**row(provider="softmax", median_ms=2.0, gpu_ms=1.0, peak_gib=1.0))
    table.add(**row(provider="softmax", batch=16, median_ms=100.0, gpu_ms=100.0, peak_gib=100.0))
    table.add(**row(provider="karat_triton", basis="spline", median_ms=3.0, gpu_ms=1.25, peak_gib=1.5))
    found = table.rows[-1]
    assert (found["ratio_time"], found["ratio_gpu"], found["ratio_memory"]) == (1.5, 1.25, 1.5)


def test_without_softmax_there_is_no_ratio():
    table = Table("cpu")
    table.add(**row(provider="karat_triton", basis="spline", median_ms=3.0, gpu_ms=1.25, peak_gib=1.5))
    assert not any(name.startswith("ratio") for name in table.rows[-1])


def test_rows_go_behind_those_of_the_same_columns():
    kinds = {"": Table, "input_pipeline": Rates, "devices": devices.Devices, "runs": runs.Runs}
    kinds |= {"backbones": backbones.FineTuning, "families": families.Families}
    for path in plots.RESULTS.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            assert next(csv.reader(file)) == [*kinds[path.stem.partition("_")[2]].measured, *HOST], path


def test_a_training_step_is_timed_where_it_agrees_with_the_reference(monkeypatch):
    shape = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 24, "num_hidden_layers": 2}
    monkeypatch.setitem(training_step.SIZES, "tiny", shape)
    case, found = training_step.Case("tiny", "fourier G=3", batch=2, image_size=32), Table("cpu")
    training_step.run("cpu", found, case, 1, ["softmax", "naive"])
    rows = [(row["provider"], row["basis"], row["what"], row["tokens"]) for row in found.rows]
    expected = (("softmax", ""), ("naive", "fourier G=3"))
    assert rows == [(*each, what, 5) for each in expected for what in ("train", "infer")]
    assert all(row["median_ms"] > 0 and float(row["error"]) < 1e-4 for row in found.rows)
    monkeypatch.setattr(training_step, "LIMIT", 0.0)
    training_step.run("cpu", found, case, 1, ["naive"])
    assert "not timed" in found.rows[-1]["error"] and "median_ms" not in found.rows[-1]


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Commands of the parts `runs` and `rivals` in this process, which takes a tenth of the time; their words."""
    commands = []

    def execute(words, cache):
        words = [str(word) for word in words]
        commands.append(words)
        capsys.readouterr()
        if words[1:3] == ["-m", "benchmarks.rivals"]:
            rivals.main(words[3:])
        else:
            assert main.main(words[2:]) == 0
            results = Path(words[words.index("--output_dir") + 1]) / "all_results.json"
            results.write_text(json.dumps({"train_startup_seconds": 7.0, **json.loads(results.read_text())}))
        return capsys.readouterr().out, {"seconds": 1.0}

    monkeypatch.setattr(runs, "execute", execute)
    return commands


@pytest.mark.system
def test_whole_runs(in_process):
    """Softmax and KArAt by the script, on images like CIFAR-10's."""
    found, flags = runs.Runs("cpu"), [*SMALL.split(), "--dataloader_num_workers", "0"]
    runs.run("cpu", found, ["tiny/4"], ["unrecorded"], ways=["softmax", "karat"], images=80, epochs=0.5, flags=flags)
    softmax, karat = found.rows
    assert all(words[words.index("--record_step") + 1] == "false" for words in in_process)
    assert (
        karat["ratio_time"] == softmax["images_per_second"] / karat["images_per_second"] != softmax["ratio_time"] == 1
    )
    assert karat["peak_gib"] > 0 and karat["startup_seconds"] > 0 and karat["cpu"] == cpu()
    assert (softmax["basis"], karat["basis"]) == ("", "fourier G=3")


def test_a_recorded_run_starts_twice(monkeypatch):
    monkeypatch.setattr(runs, "train", lambda folder, _, way, *__: (folder / way).mkdir(exist_ok=True) or {})
    found = runs.Runs("cpu")
    runs.run("cpu", found, ["tiny/32"], images=10)
    assert [(row["mode"], row["start"], row["provider"]) for row in found.rows] == [
        *(("recorded", start, way) for start in ("cold", "warm") for way in runs.WAYS),
        *(("unrecorded", "cold", way) for way in runs.WAYS),
    ]


def test_a_hybrid_differs_from_softmax_in_the_model_alone(monkeypatch, tmp_path):
    commands = {}
    monkeypatch.setattr(runs, "execute", lambda words, cache: ("", {"error": commands.update({cache: words})}))
    for way in ("softmax", "hybrid"):
        runs.train(tmp_path, "cpu", way, {"model": "tiny", "batch": 4, "epochs": 1, "mode": "unrecorded"}, tmp_path)
    softmax, hybrid = (parse_settings([*map(str, words[2:])]).record for words in commands.values())
    assert {name for name in hybrid if hybrid[name] != softmax.get(name)} == {"model", "output_dir"}
    assert hybrid["model"] == "vit_tiny_patch16_224_karat_hybrid"


@pytest.mark.system
def test_a_command_has_caches_of_its_own_and_says_why_it_failed(tmp_path):
    code = "import os, sys; print(os.environ['TRITON_CACHE_DIR']); sys.exit('no luck')"
    printed, found = runs.execute([sys.executable, "-c", code], tmp_path)
    assert printed.strip() == str(tmp_path / "triton")
    assert found["error"] == "exit 1: no luck" and found["seconds"] > 0


@pytest.mark.system
def test_rivals(in_process, monkeypatch):
    monkeypatch.delitem(rivals.RIVALS, "timm loop, compiled")  # Minutes on a CPU.
    monkeypatch.setattr(rivals, "WARMUP", 1)
    monkeypatch.setattr(rivals, "SECONDS", 0)
    monkeypatch.setattr(rivals, "BATCHES", (2,))
    monkeypatch.setattr(runs, "train", lambda *_: {"images_per_second": 10.0, "seconds": 1.0})
    found = runs.Runs("cpu")
    rivals.run("cpu", found, images=20)
    assert [row["provider"] for row in found.rows] == ["softmax", "karat", "timm loop", "transformers.Trainer"]
    assert all(row["ratio_time"] == 10.0 / row["images_per_second"] for row in found.rows)
    assert len({row["images_per_second"] for row in found.rows}) == 3


@pytest.mark.system
def test_fine_tuning_karatized_backbones():
    """The residual start has the untouched model's logits and accuracy, and each model learns in its own way."""
    with runs.workspace(None, 20) as (_, folder):
        data = load_data(rivals.settings_of(folder, "cpu").data, 0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    how = {"epochs": 1, "fine_tuning": 1, "batch": 10, "seed": 0, "karat_rate": 0.1}
    softmax, residual, replace = backbones.compare(data, "cpu", "dinov2", sizes, **how)
    assert [row["model"] for row in (softmax, residual, replace)] == ["softmax", "residual", "replace"]
    assert residual["logits_distance"] == softmax["logits_distance"] == 0.0 < replace["logits_distance"]
    assert residual["before"] == softmax["before"] and softmax["gamma"] is None and replace["gamma"] is None
    assert residual["gamma"] > 0.01  # At a rate of its own: that of the others is much lower.
    assert all(0.0 <= row["after"] <= 1.0 for row in (residual, replace, softmax))


def test_tables_show_whole_runs_first_and_hosts_as_ranges(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cuda.csv"
    steps, whole = Table("cpu"), runs.Runs("cpu")
    for host, ratio in (("A", 1.9), ("B", 1.25), ("C", 1.5), ("D", 1.75)):
        steps.constant["cpu"] = host
        karat = row(provider="karat_triton", basis="fourier G=3", median_ms=ratio, gpu_ms=1.0, peak_gib=1.0)
        steps.rows.append({**karat, "ratio_time": ratio, "ratio_gpu": 1.0, "ratio_memory": 1.0, **steps.constant})
    for start, rate in (("cold", 8000.0), ("warm", 8100.0)):
        run = {"benchmark": "runs", "model": "tiny", "batch": 32, "mode": "recorded", "start": start, "epochs": 2.0}
        whole.add(**run, provider="softmax", images_per_second=8800.0, seconds=60.0)
        whole.add(**run, provider="karat", images_per_second=rate, startup_seconds=7.0, seconds=61.0)
    steps.write(path)
    whole.write(path.with_stem("cuda_runs"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["table", str(path)])
    table.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| t")]
    assert lines[0] == "| tiny | 32 | recorded | 2 | 8,800 | 8,100 | 1.09 | 7 / 7 | 61 |"
    assert lines[1].endswith("| 1.00 | 1.00 | 1.25 to 1.75 |")  # The last three machines.


@pytest.mark.parametrize(
    "words, part", [(["--only", "runs"], "on cpu there are"), (["--data-path", "nowhere"], "nowhere: there is no such")]
)
def test_what_cannot_be_measured(words, part, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--device", "cpu", *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert part in capsys.readouterr().err


def test_the_picture_shows_the_last_row_of_each_step(tmp_path: Path):
    path = tmp_path / "rows.csv"
    for gpu_ms in (3.0, 2.0):
        table = Table("cpu")
        table.add(**row(provider="softmax", median_ms=1.0, gpu_ms=1.0, peak_gib=1.0))
        table.add(**row(provider="karat_triton", basis="fourier G=3", median_ms=1.0, gpu_ms=gpu_ms, peak_gib=1.0))
        table.add(**row(provider="naive", basis="fourier G=3", what="infer", median_ms=1.0, gpu_ms=9.0, peak_gib=1.0))
        table.write(path)
    (shown,) = plots.latest(path)
    assert float(shown["ratio_gpu"]) == 2.0
    assert plots.label(shown) == "Tiny G3, fused, batch 8"
    plots.draw([shown], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
