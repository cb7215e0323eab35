# SPDX-License-Identifier: Apache-2.0
"""
A table of models: parameters; multiply-adds of one image, as the paper counts them and as they are really done; memory
and speed, measured here; accuracy, from their runs.

  paper: activation   h L N^2 r (3G + 1) for the paper's operator with a Fourier basis, 3 h L N^2 for softmax
  paper: total        that, all matrix products, and 4 for each element of a layer norm
  matrix products     multiply-adds that PyTorch counts in a forward pass, by the implementation that runs by default
  elementwise         results of the other arithmetic in it (a sine, a product, an exponential, ... count 1 each)
  training memory     peak of a whole step (forward, backward, AdamW) on one batch, weights included
  images/s            median of several passes over one batch

The paper states the activation's count and all totals; softmax's 3 and the layer norm's 4 are what its totals come
out at. It has no count for other bases and operators. Writes compare.csv, compare.md, and compare.png and .svg.
"""

import argparse
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils import benchmark
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from image_classification.errors import InputError
from image_classification.models.building import describe_attention
from image_classification.models.families import OWN, vision
from image_classification.reports.curves import history
from image_classification.reports.summary import RESULTS
from image_classification.runs import checkpoints
from modeling_karat_vit.configuration_karat_vit import height_and_width, patches_of

from . import options, style
from .models import Checkpoint, load_checkpoint, read_state, run_folder, use_default_attention
from .output import Output, figure_names


_DECIMAL = {"G": 1e9, "M": 1e6, "k": 1e3}
_BINARY = {"Gi": 2.0**30, "Mi": 2.0**20, "Ki": 2.0**10}
_PERCENT = {"": 0.01}
_PLAIN = {"": 1.0}

# The columns: key, title, unit and its prefixes, digits after the point.
COLUMNS: tuple[tuple[str, str, str, dict[str, float], int], ...] = (
    ("accuracy", "top-1", "%", _PERCENT, 2),
    ("top5_accuracy", "top-5", "%", _PERCENT, 2),
    ("parameters", "parameters", "", _DECIMAL, 3),
    ("karat_parameters", "of these KArAt's", "", _DECIMAL, 3),
    ("paper_activation", "paper: activation", "FLOPs", _DECIMAL, 3),
    ("paper_total", "paper: total", "FLOPs", _DECIMAL, 3),
    ("matrix_products", "matrix products", "MACs", _DECIMAL, 3),
    ("elementwise", "elementwise", "ops", _DECIMAL, 3),
    ("training_memory", "training memory", "B", _BINARY, 2),
    ("training_speed", "training", "images/s", _PLAIN, 0),
    ("inference_speed", "inference", "images/s", _PLAIN, 0),
)


def scaled(rows: list[dict], key: str) -> tuple[str, str, list[str]]:
    """
    Write out a column as it is printed, in one unit for all rows: the largest prefix that leaves the largest value 0.1
    or more.

    Returns:
        Title, unit, and the cells: a dash where nothing is known.
    """
    _, title, unit, prefixes, digits = next(column for column in COLUMNS if column[0] == key)
    largest = max((row[key] for row in rows if key in row), default=0)
    prefix = next((prefix for prefix, size in prefixes.items() if largest >= 0.1 * size), list(prefixes)[-1])
    cells = [f"{row[key] / prefixes[prefix]:,.{digits}f}" if key in row else "-" for row in rows]
    return title, prefix + unit, cells


def paper_count(config) -> tuple[int, int] | None:
    """
    Count the multiply-adds of one image as the paper books them: (activation, total).

    Returns:
        `None` for what the paper has no count for: other models than ViT, other bases than Fourier, other operators
        than `phi1_w2`, the projection on the simplex.
    """
    if config.model_type not in OWN:
        return None
    blocks, heads, hidden = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    patches = math.prod(patches_of(config.image_size, config.patch_size))
    patch_pixels = math.prod(height_and_width(config.patch_size))
    tokens = patches + 1
    karat_heads = per_score = 0
    if config.model_type == "karat_vit":
        if config.basis_type != "fourier" or config.modular_mode != "phi1_w2" or config.project_l1:
            return None
        layers = blocks if config.karat_layers is None else len(config.karat_layers)
        karat_heads = layers * (config.num_karat_heads or heads)
        per_score = config.karat_rank * (3 * config.grid_size + 1)
    activation = tokens**2 * (karat_heads * per_score + (blocks * heads - karat_heads) * 3)
    products = patches * patch_pixels * config.num_channels * hidden
    of_a_block = tokens * hidden * (4 * hidden + 2 * config.intermediate_size) + 2 * tokens**2 * hidden
    products += blocks * of_a_block + hidden * config.num_labels
    norms = 4 * (2 * blocks + 1) * tokens * hidden
    return activation, products + norms + activation


class Elementwise(TorchDispatchMode):
    """Counts, in `count`, the results of pointwise operations, softmax and layer norms under it."""

    _MOVED = ("clone", "copy", "_to_copy", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):  # the softmax inside
            query, key = args[:2]
            self.count += query.shape[:-1].numel() * key.shape[-2]
        elif (torch.Tag.pointwise in func.tags and name not in self._MOVED) or name in (
            "_softmax",
            "native_layer_norm",
        ):
            self.count += next(leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor))
        return result


class PeakMemory(TorchDispatchMode):
    """The most bytes, in `peak`, of tensors that live at once among those made under it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in given:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def real_count(checkpoint: Checkpoint) -> tuple[int, int]:
    """
    Count a forward pass of one image, by the implementation that runs by default (without fused kernels, which PyTorch
    cannot see into): multiply-adds of matrix products, and elementwise operations.
    """
    model = use_default_attention(checkpoint, "karat_portable")
    pixels = _pixels(checkpoint, 1)
    with torch.no_grad():
        model(pixels)  # what is done only once is not counted
        with FlopCounterMode(display=False) as products:
            model(pixels)
        with Elementwise() as others:
            model(pixels)
    return products.get_total_flops() // 2, others.count


def training_memory(checkpoint: Checkpoint, batch_size: int) -> int | None:
    """
    Measure the peak bytes of a training step (forward, backward, AdamW), weights included: what CUDA's allocator says,
    or on the CPU the tensors that live at once. `None` on other devices.
    """
    if checkpoint.model.device.type not in ("cpu", "cuda"):
        return None
    model = checkpoint.model
    device = model.device
    step = _training_step(checkpoint, batch_size)
    if device.type == "cuda":
        step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with PeakMemory() as memory:
            step()  # makes the optimiser's state, which stays
            step()
        peak = own + memory.peak
    model.eval().zero_grad()
    return peak


def speed(checkpoint: Checkpoint, batch_size: int, train: bool) -> float:
    """Measure images per second: median of passes, until these agree within a tenth or took five seconds."""
    step = (_training_step if train else _inference)(checkpoint, batch_size)
    step()
    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    seconds = timer.adaptive_autorange(max_run_time=5.0).median
    checkpoint.model.eval().zero_grad()
    return batch_size / seconds


def _training_step(checkpoint: Checkpoint, batch_size: int) -> Callable[[], None]:
    """Make a step that leaves the weights as they are: its learning rate is 0."""
    model, pixels = use_default_attention(checkpoint).train(), _pixels(checkpoint, batch_size)
    labels = torch.arange(batch_size, device=model.device) % max(1, model.config.num_labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels).logits, labels).backward()
        optimizer.step()

    return step


def _inference(checkpoint: Checkpoint, batch_size: int) -> Callable[[], None]:
    model, pixels = use_default_attention(checkpoint), _pixels(checkpoint, batch_size)

    def step():
        with torch.inference_mode():
            model(pixels)

    return step


def _pixels(checkpoint: Checkpoint, batch_size: int) -> torch.Tensor:
    config = checkpoint.model.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, vision(config).num_channels, *checkpoint.image_size)
    return torch.randn(shape, generator=generator).to(checkpoint.model.device)


def accuracy(source: str) -> dict[str, float]:
    """Read `accuracy` and `top5_accuracy` (0 to 1) of a run, or of a checkpoint in one; empty if it is of none."""
    folder = run_folder(source)
    if folder is None:
        return {}
    row: dict[str, Any] = {}
    results = folder / RESULTS
    if Path(source).resolve() == folder:
        row = checkpoints.read_json(results) if results.is_file() else {}
    elif checkpoints.is_checkpoint(Path(source)):
        state = read_state(Path(source))
        rows = [row for row in history(state["log_history"]) if row["step"] == state["global_step"]]
        row = rows[-1] if rows else {}
    measured = row if isinstance(row, dict) else {"eval_accuracy": row}
    found = {name: measured[f"eval_{name}"] for name in ("accuracy", "top5_accuracy") if f"eval_{name}" in measured}
    if not all(isinstance(value, float | int) and 0 <= value <= 1 for value in found.values()):
        raise InputError(f"The accuracy of {source} ({RESULTS}) is damaged: {found}, expected numbers, 0 to 1.")
    return found


def compute(checkpoint: Checkpoint, name: str, batch_size: int | None = 32) -> dict:
    """
    Measure one row of the table, in plain units: counts, bytes, images per second, accuracies from 0 to 1.

    Args:
        name: what to call it.
        batch_size: of the measurements of memory and speed; `None` leaves them out.

    Returns:
        The keys of `COLUMNS` as far as they are known, `name`, `attention`, `batch_size` and `device`.
    """
    model = checkpoint.model
    config = model.config
    row = {
        "name": name,
        "attention": describe_attention(model) if checkpoint.is_karat else "softmax",
        **accuracy(checkpoint.source),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "karat_parameters": 0,
    }
    if checkpoint.is_karat:
        karat = model.karat_parameter_names()
        row["karat_parameters"] = sum(p.numel() for key, p in model.named_parameters() if key in karat)
    counted = paper_count(config)
    if counted is not None:
        row["paper_activation"], row["paper_total"] = counted
    row["matrix_products"], row["elementwise"] = real_count(checkpoint)
    if batch_size is not None:
        memory = training_memory(checkpoint, batch_size)
        row |= {} if memory is None else {"training_memory": memory}
        row["training_speed"] = speed(checkpoint, batch_size, train=True)
        row["inference_speed"] = speed(checkpoint, batch_size, train=False)
        row["batch_size"] = batch_size
        row["device"] = describe_device(model.device)
    return row


def describe_device(device: torch.device) -> str:
    """Name the hardware that measures."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return device.type


def markdown(rows: list[dict]) -> str:
    """Write the table in Markdown, a model in each row; columns in which nothing is known are left out."""
    columns = [scaled(rows, key) for key, *_ in COLUMNS if any(key in row for row in rows)]
    titles = [f"{title} ({unit})" if unit else title for title, unit, _ in columns]
    lines = [f"| model | attention | {' | '.join(titles)} |", "| --- | --- |" + " ---: |" * len(columns)]
    for index, row in enumerate(rows):
        cells = " | ".join(cells[index] for _, _, cells in columns)
        lines.append(f"| {row['name']} | {row['attention']} | {cells} |")
    measured = next((row for row in rows if "device" in row), None)
    if measured is not None:
        lines += ["", f"Memory and speed: batch {measured['batch_size']}, fp32, on {measured['device']}."]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], key: str, axes: Axes) -> Axes:
    """Draw one column of the table as bars, with their values; the first model on top."""
    title, unit, cells = scaled(rows, key)
    values = np.array([row.get(key, 0.0) for row in rows])
    places = np.arange(len(rows))
    largest = values.max() or 1.0
    colours = [style.KIND_COLOURS["softmax" if row["attention"] == "softmax" else "karat"] for row in rows]
    axes.barh(places, values, color=colours, height=0.62)
    for place, value, cell in zip(places, values, cells):
        inside = value > 0.62 * largest
        how = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": style.INK}
        style.note(axes, cell, (value, place), (-3 if inside else 3, 0), **how)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    words = [*title.split(), f"({unit})"] if unit else title.split()
    axes.set(xlim=(0, 1.02 * largest), ylim=(len(rows) - 0.5, -0.5), title="\n".join(words))
    return axes


DRAWN = ("accuracy", "parameters", "paper_total", "matrix_products", "elementwise", "training_memory", "training_speed")


def draw_all(rows: list[dict], figure: Figure) -> Figure:
    """Draw the columns that are known, side by side."""
    keys = [key for key in DRAWN if any(key in row for row in rows)]
    panels = np.atleast_1d(figure.subplots(1, len(keys), sharey=True))
    for key, axes in zip(keys, panels):
        draw(rows, key, axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, nargs="+", metavar="DIR_OR_REPO", help="checkpoints: folders of runs, or Hub names"
    )
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    parser.add_argument(
        "--batch-size",
        type=options.at_least(1),
        default=32,
        help="of the measurements of memory and speed (default: 32)",
    )
    parser.add_argument("--no-measure", action="store_true", help="count only: leave out memory and speed")
    options.add_device(parser)
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    output = Output(args.output, ["compare.csv", "compare.md", *figure_names("compare")], args.overwrite)
    device = options.device_of(args.device)
    names = options.names(args.names, args.model)
    rows = []
    for source, name in zip(tqdm(args.model, desc="Models", leave=False, delay=1), names):
        checkpoint = load_checkpoint(source, device=device)
        rows.append(compute(checkpoint, name, None if args.no_measure else args.batch_size))
    output.table("compare.csv", rows)
    table = markdown(rows)
    output.text("compare.md", table)
    with style.context():
        output.figure("compare", draw_all(rows, style.figure(style.PAGE, 0.55 + 0.24 * len(rows))))
    print(table)
    output.report()
