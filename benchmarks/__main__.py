# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of KArAt beside softmax:

    python -m benchmarks --device cuda                      # everything; more than an hour
    python -m benchmarks --device cuda --only models        # or parts: runs, rivals, attention, models, ...
    python -m benchmarks --device cuda --only runs --rows tiny/32 --epochs 100 --data-path path/to/cifar10
    python -m benchmarks --device cpu                       # ViT-Tiny, batch 8
    python -m benchmarks.table                              # the rows as tables

The part runs starts the training script as a user does, on CIFAR-10 or images like it, and rivals what one would take
in its place; their rows go to benchmarks/results/DEVICE_runs.csv.

In all others every row is a ratio to a softmax baseline of the same process, and is timed only if its output and
gradients agree with the reference; the rows go to benchmarks/results/DEVICE.csv, behind those that are there.

The part input-pipeline trains on JPEG files, and compares with training on tensors that are on the device already; its
rows go to benchmarks/results/DEVICE_input_pipeline.csv. The part devices compares two GPUs with one; its rows go to
DEVICE_devices.csv.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from image_classification.flags import Parser

from . import attention, devices, input_pipeline, rivals, runs, training_step
from .common import Rates, Table
from .training_step import Case


FUSED = ["softmax", "karat_triton"]
TINY = Case("tiny", "fourier G=3", 256)


def attention_on_cuda(table: Table) -> None:
    attention.run("cuda", table, 256, 14, 20, ["karat_triton"])
    few = {name: attention.BASES[name] for name in ("fourier G=1", "fourier G=3", "mexican_hat")}
    attention.run("cuda", table, 256, 14, 5, ["karat_portable"], few)


def models_on_cuda(table: Table) -> None:
    training_step.run("cuda", table, TINY, 15, FUSED)
    for basis in ("spline", "mexican_hat", "morlet", "dog", "meyer", "shannon", "rational"):
        training_step.run("cuda", table, replace(TINY, basis=basis), 10, ["karat_triton"])
    training_step.run("cuda", table, TINY, 5, ["karat_portable", "eager", "naive"])
    training_step.run("cuda", table, replace(TINY, batch=32), 30, FUSED)
    for batch in (128, 256):
        training_step.run("cuda", table, Case("small", "fourier G=3", batch), 10, FUSED)
    training_step.run("cuda", table, Case("base", "fourier G=1", 128), 10, FUSED)


def compiled_on_cuda(table: Table) -> None:
    for batch in (32, 256):
        training_step.run("cuda", table, replace(TINY, batch=batch), 20, FUSED, ("compile",))


def single_image_on_cuda(table: Table) -> None:
    training_step.run("cuda", table, replace(TINY, batch=1), 50, FUSED, ("eager", "compile"), ("infer",))


def many_tokens_on_cuda(table: Table) -> None:
    for case in (replace(TINY, batch=16, image_size=512), replace(TINY, batch=2, image_size=1024)):
        training_step.run("cuda", table, case, 10, FUSED)
        training_step.run("cuda", table, case, 3, ["naive"])


def input_pipeline_on_cuda(table: Rates) -> None:
    run = partial(input_pipeline.run, "cuda", table, 256, 2048, (30, 130), (os.cpu_count() or 2) - 1)
    run(("resident", "cropped"), basis="")
    run(mode="eager")
    run()


def input_pipeline_on_cpu(table: Rates) -> None:
    input_pipeline.run("cpu", table, 8, 64, (2, 6), 1, mode="eager")


def attention_on_cpu(table: Table) -> None:
    attention.run("cpu", table, 8, 14, 5, ["karat_portable", "eager"])


def models_on_cpu(table: Table) -> None:
    training_step.run_in_turn(table, replace(TINY, batch=8), 15, ["softmax", "karat_portable", "eager", "naive"])


PARTS: dict[str, dict[str, Callable[..., None]]] = {
    "cuda": {
        "runs": partial(runs.run, "cuda"),
        "rivals": partial(rivals.run, "cuda"),
        "attention": attention_on_cuda,
        "models": models_on_cuda,
        "compiled": compiled_on_cuda,
        "single-image": single_image_on_cuda,
        "many-tokens": many_tokens_on_cuda,
        "input-pipeline": input_pipeline_on_cuda,
        "devices": lambda table: devices.run("cuda", table),
    },
    "cpu": {
        "attention": attention_on_cpu,
        "models": models_on_cpu,
        "input-pipeline": input_pipeline_on_cpu,
        "devices": lambda table: devices.run("cpu", table),
    },
}

# Kinds of the rows of parts that are not `Table`'s.
TABLES = {"runs": runs.Runs, "rivals": runs.Runs, "input-pipeline": Rates, "devices": devices.Devices}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only",
        nargs="+",
        help=f"some parts: {', '.join(PARTS['cpu'])}; on cuda {', '.join(PARTS['cuda'])}",
    )
    for name, choices in (("rows", runs.ROWS), ("modes", runs.MODES), ("starts", runs.STARTS), ("ways", runs.WAYS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), help="of the part runs; default: all")
    parser.add_argument("--epochs", type=float, help="of each run in runs and rivals; default: about a minute's")
    parser.add_argument("--data-path", type=Path, help="CIFAR-10's parquet files for these; default: images like it")
    parser.add_argument("--images", type=int, default=50_000, help="of these, to train on; default: 50,000")
    parser.add_argument("--output", type=Path, help="CSV to append to (default: benchmarks/results/DEVICE.csv)")
    arguments = parser.parse_args()
    device = arguments.device
    unknown = sorted(set(arguments.only or ()) - set(PARTS[device]))
    if unknown:
        parser.error(f"--only {unknown[0]}: on {device} there are {', '.join(PARTS[device])}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --device cpu")
    output = arguments.output or Path(__file__).parent / "results" / f"{device}.csv"
    if arguments.data_path is not None and not arguments.data_path.is_dir():
        parser.error(f"--data-path {arguments.data_path}: there is no such folder")
    data: dict[str, Any] = {"epochs": arguments.epochs, "data": arguments.data_path, "images": arguments.images}
    some = {name: getattr(arguments, name) for name in ("rows", "modes", "starts", "ways")}
    options = {"rivals": data, "runs": data | {name: values for name, values in some.items() if values}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # What was measured is written then, too.
    for name, part in PARTS[device].items():
        if arguments.only is None or name in arguments.only:
            table = TABLES.get(name, Table)(device)
            try:
                part(table, **options.get(name, {}))
            finally:
                table.write(output.with_stem(f"{output.stem}{table.suffix}"))


if __name__ == "__main__":
    main()
