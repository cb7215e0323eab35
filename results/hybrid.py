# SPDX-License-Identifier: Apache-2.0
"""
Measures what a hybrid's heads learned: `python -m results.hybrid --model HYBRID --compare SOFTMAX --data FOLDER`.

Both are folders of finished runs with rows in results/runs.csv, and the images are held-out ones of the data set.
Writes results/hybrid.csv, and makes docs/what-hybrid-attention-learns.md of it and of results/hybrid.md, the page's
text. Without --model only the page is made anew.
"""

import contextlib
import csv
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import faithfulness, options, spectrum, style
from analysis.images import find_images, prepare
from analysis.models import Checkpoint, load_checkpoint
from analysis.recording import record_batches
from image_classification.errors import InputError, run_command
from image_classification.flags import Parser
from image_classification.models.families import OWN

from .example import row_of
from .page import Tables, mean, read, regenerate
from .screen import ROOT, TABLE, name_of


FIGURES, TEXT = ROOT / "results" / "hybrid.csv", ROOT / "results" / "hybrid.md"
PAGE, SITE = ROOT / "docs" / "what-hybrid-attention-learns.md", ROOT / "zensical.toml"
# Of the site's navigation: the line of the page, and the one that it follows.
BEFORE = '        { "See what attention learned" = "analysis.md" },\n'
ENTRY = f'        {{ "What hybrid attention learns" = "{PAGE.name}" }},\n'
NAMES = ("hybrid", "softmax")
# `part` is a map of faithfulness, or a kind of heads.
FIELDS = ("model", "run", "measure", "block", "part", "mean", "low", "high", "images")


def of_heads(scores: torch.Tensor, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Measures of the heads of a block.

    Args:
        scores, maps: before and after the activation, (B, h, N, N).

    Returns:
        `scores`, their standard deviation; `entropy` of the maps' rows in nats, where rows are what rollout makes of
        them, magnitudes over their sum; and `share` of a head in the magnitudes of all. All are (B, h).
    """
    sizes = maps.abs()
    sums = sizes.sum(-1, keepdim=True)
    tiny = torch.finfo(maps.dtype).tiny
    return {
        "scores": scores.std((-1, -2)),
        "entropy": torch.special.entr(sizes / sums.clamp_min(tiny)).sum(-1).mean(-1),
        "share": (sums / sums.sum(1, keepdim=True).clamp_min(tiny)).mean((-1, -2)),
    }


def similarity(tokens: torch.Tensor) -> torch.Tensor:
    """The mean cosine of all pairs of tokens (B, N, d): (B,), 1 where all are equal up to length."""
    count = tokens.shape[1]
    together = torch.nn.functional.normalize(tokens, dim=-1).sum(1).square().sum(-1)
    return (together - count) / (count * (count - 1))


@contextlib.contextmanager
def watched(layer: Any, kept: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Keep of a block's forward passes the norm of attention over the residual's, and the tokens' `similarity`."""
    branches: list[torch.Tensor] = []

    def keep(_, args, output):
        kept["residual"].append((branches.pop().norm(dim=-1) / args[0].norm(dim=-1)).mean(-1).cpu())
        kept["similarity"].append(similarity(output).cpu())

    hooks = [
        layer.attention.register_forward_hook(lambda _, __, output: branches.append(output[0])),
        layer.register_forward_hook(keep),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_blocks(checkpoint: Checkpoint, pixels: torch.Tensor, batch_size: int = 8) -> dict[str, np.ndarray]:
    """
    Measures of every block for images (B, 3, height, width): those `of_heads` and `rank`, the effective rank of the
    maps, (L, B, h); `residual`, the norm of what attention adds to a token over that of the token, and `similarity` of
    the tokens after the block, (L, B).
    """
    layers = checkpoint.model.vit.layers
    kept: list[dict[str, list[torch.Tensor]]] = [
        {name: [] for name in ("scores", "entropy", "share", "residual", "similarity")} for _ in layers
    ]
    with contextlib.ExitStack() as hooks:
        for layer, of in zip(layers, kept):
            hooks.enter_context(watched(layer, of))
        for recorded in record_batches(checkpoint, pixels, list(range(len(layers))), batch_size):
            for block, attention in recorded.items():
                for name, values in of_heads(attention.scores, attention.maps).items():
                    kept[block][name].append(values)
    found = {name: np.stack([torch.cat(of[name]).numpy() for of in kept]) for name in kept[0]}
    return {"rank": spectrum.compute(checkpoint, pixels, 0, batch_size).effective_after, **found}


def rows_of(checkpoint: Checkpoint, values: dict[str, np.ndarray]) -> list[dict]:
    """Rows of the table: the mean over images, and its interval, of each block, and of each kind of its heads."""
    rows = []
    for measure, of_all in values.items():
        for block, of_block in enumerate(of_all):
            kinds = np.array(checkpoint.head_kinds(block))
            parts = {"": of_block}
            if of_block.ndim == 2:  # KArAt heads have together a share; all else is the mean over heads of a kind.
                over = np.sum if measure == "share" else np.mean
                parts = {kind: over(of_block[:, kinds == kind], axis=1) for kind in dict.fromkeys(kinds.tolist())}
            for part, of_images in parts.items():
                if measure != "share" or part == "karat":
                    mean, low, high, images = faithfulness.bootstrap(of_images)
                    row = {"model": checkpoint.name, "measure": measure, "block": block, "part": part}
                    rows.append(row | {"mean": mean, "low": low, "high": high, "images": images})
    return rows


def measure(
    sources: list[str], data: str | None, table: Path, num_images: int = 100, batch_size: int = 8, device=None
) -> list[dict]:
    """
    Measure a hybrid and a softmax model on the same held-out images.

    Args:
        sources: the folders of their runs.
        data: folder of the data set, or a name that `--data_set` takes; `None`: as the hybrid's run.json says.
        table: CSV of the runs.
        num_images: how many are drawn.
        batch_size: images computed at once.
        device: where; default an accelerator if there is one.

    Raises:
        InputError: a run is not finished or has no row; or a model is no hybrid, or no softmax ViT.
    """
    models = [
        load_checkpoint(source, flag, options.device_of(device))
        for source, flag in zip(sources, ("--model", "--compare"))
    ]
    for checkpoint, name, kinds in zip(models, NAMES, ({"karat", "softmax"}, {"softmax"})):
        found = {kind for block in range(checkpoint.blocks) for kind in checkpoint.head_kinds(block)}
        if checkpoint.model.config.model_type not in OWN or found != kinds:
            raise InputError(f"{checkpoint.source} is a {checkpoint.model.config.model_type}, expected a {name} ViT.")
    runs = [row_of(checkpoint, table) for checkpoint in models]
    for checkpoint, name in zip(models, NAMES):
        checkpoint.name = name
    images = find_images(models, None, num_images, data_set=data)
    rows, faithful = [], []
    for checkpoint in models:
        pixels = prepare(checkpoint, images).pixels
        protocol = faithfulness.Protocol(batch_size=batch_size)
        faithful.append(faithfulness.compute(checkpoint, pixels, checkpoint.blocks - 1, protocol=protocol))
        rows += rows_of(checkpoint, of_blocks(checkpoint, pixels, batch_size))
    last = models[0].blocks - 1
    rows += [{"block": last, "part": row.pop("map"), **row} for row in faithfulness.table(faithful)]
    named = {name: name_of(run) for name, run in zip(NAMES, runs)}
    return [row | {"run": named.get(row["model"], "")} for row in rows]


def models(rows: list[dict], table: Path = TABLE) -> list[str]:
    """Lines of the table of the two runs."""
    runs = {name_of(row): row for row in read(table)}
    lines = ["| model | run | recipe | epochs | last | averaged |", "|" + " --- |" * 6]
    for model, run in dict.fromkeys((row["model"], row["run"]) for row in rows if row["run"]):
        row = runs[run]
        figures = [mean([row], name) for name in ("last", "average_last")]
        cells = [model, f"`{run}`", f"`{row['recipe']}`", row["epochs"], *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def deletion_and_insertion(rows: list[dict]) -> list[str]:
    """Lines of the table of faithfulness."""
    kept = [row for row in rows if row["measure"] in faithfulness.MEASURES]
    numbers = [row | {name: float(row[name]) for name in ("mean", "low", "high")} for row in kept]
    return faithfulness.text([row | {"map": row["part"]} for row in numbers]).splitlines()


def blocks(rows: list[dict], measure: str) -> list[str]:
    """Lines of a table of a measure: blocks, and a column for each model, or each kind of its heads."""
    found = {(row["model"], row["part"], row["block"]): float(row["mean"]) for row in rows if row["measure"] == measure}
    columns = list(dict.fromkeys((model, part) for model, part, _ in found))
    columns.sort(key=lambda column: (column[0] != NAMES[0], column[1]))
    titles = [
        f"{model}, {style.KIND_NAMES[part]} heads" if part and model != part else model for model, part in columns
    ]
    lines = [f"| block | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(columns)]
    for block in dict.fromkeys(block for _, _, block in found):
        values = [found.get((*column, block)) for column in columns]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {block} | {' | '.join(cells)} |")
    return lines


TABLES: Tables = {
    "models": models,
    "faithfulness": deletion_and_insertion,
    **{
        name: functools.partial(blocks, measure=name)
        for name in ("rank", "entropy", "share", "scores", "residual", "similarity")
    },
}


def write_page() -> None:
    """Make the page of its text and the table, and put it into the navigation."""
    PAGE.write_text(regenerate(TEXT.read_text(encoding="utf-8"), read(FIGURES), TABLES), encoding="utf-8")
    site = SITE.read_text(encoding="utf-8")
    if ENTRY not in site:
        SITE.write_text(site.replace(BEFORE, BEFORE + ENTRY), encoding="utf-8")


def run(args: Any) -> None:
    """Measure if there are models, and make the page."""
    if (args.model is None) != (args.compare is None):
        raise InputError("`--model` and `--compare` go together: a hybrid, and the softmax model beside it.")
    if args.model is None and not FIGURES.is_file():
        raise InputError(f"`--model` names no hybrid, and there is no {FIGURES} to make the page of.")
    if args.model is not None:
        how = {"num_images": args.num_images, "batch_size": args.batch_size, "device": args.device}
        rows = measure([args.model, args.compare], args.data, args.table, **how)
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
        print(f"{args.output}: {len(rows)} rows")
    if args.output == FIGURES:
        write_page()


def main(argv: list[str] | None = None) -> int:
    """Measure, and make the page. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m results.hybrid", description=(__doc__ or "").split("\n")[1])
    parser.add_argument("--model", metavar="HYBRID", help="folder of a hybrid's finished run")
    parser.add_argument("--compare", metavar="SOFTMAX", help="folder of the softmax model's")
    parser.add_argument("--data", help="folder of the data set, or its name (default: as run.json says)")
    parser.add_argument("--num-images", type=options.at_least(2), default=100, help="to draw (default: 100)")
    parser.add_argument("--batch-size", type=options.at_least(1), default=20, help="images at once (default: 20)")
    options.add_device(parser)
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV of the runs")
    parser.add_argument("--output", type=Path, default=FIGURES, help=f"CSV (default: {FIGURES}, and the page)")
    args = parser.parse_args(argv)
    return run_command("python -m results.hybrid", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
