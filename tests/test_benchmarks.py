# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks make of their rows."""

from pathlib import Path

from benchmarks import plots
from benchmarks.common import Table


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
