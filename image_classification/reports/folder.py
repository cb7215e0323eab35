# SPDX-License-Identifier: Apache-2.0
"""The reports of a finished run, in its folder."""

from pathlib import Path

from ..data.sources import ImageData
from .card import CARD
from .curves import CURVES, HISTORY, draw_curves, history, write_json
from .recipe import RECIPE
from .summary import RESULTS, SAMPLE, save_sample


def write_reports(
    folder: Path, data: ImageData, log: list[dict[str, float]], figures: dict[str, float], card: str, recipe: str
) -> None:
    """Write results (`figures`), history and curves (by the Trainer's `log`), a sample image, card and recipe."""
    rows = history(log)
    write_json(folder / RESULTS, figures)
    write_json(folder / HISTORY, rows)
    draw_curves(rows, folder / CURVES, f"{folder.resolve().name}: {data.name}")
    save_sample(data.validation, folder / SAMPLE)
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
