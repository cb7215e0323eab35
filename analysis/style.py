# SPDX-License-Identifier: Apache-2.0
"""One look for every figure: sizes of a printed column, colours that colour-blind readers tell apart, signs about 0."""

import contextlib
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.rcsetup import cycler
from matplotlib.text import Annotation


# Widths in inches: a column of a two-column page, and the whole page. Text is 7 to 8 pt at these sizes.
COLUMN, PAGE = 3.35, 6.9

# Okabe and Ito's palette, in the order in which series take it; black is left for means and outlines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442")
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, YELLOW = PALETTE
INK, GREY, PALE = "black", "#6b7280", "#d4d7dc"

# KArAt and softmax look the same in every figure.
KIND_COLOURS = {"karat": BLUE, "softmax": VERMILLION}
KIND_NAMES = {"karat": "KArAt", "softmax": "softmax"}

# Negative is blue, positive red, zero white; safe for the usual kinds of colour blindness.
DIVERGING = "RdBu_r"
# The positive end of it, for veils over images.
RED = "#b2182b"
# What has an order, such as epochs.
ORDERED = "viridis"

_RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlepad": 3.5,
    "axes.labelpad": 2.5,
    "axes.prop_cycle": cycler(color=PALETTE),
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "image.interpolation": "nearest",
    "figure.dpi": 150,
    "savefig.dpi": 300,
    # The same figure is the same file.
    "svg.hashsalt": "karat-vit",
}


def context() -> contextlib.AbstractContextManager[None]:
    """Make and draw figures in here."""
    return matplotlib.rc_context(_RC)


def use() -> None:
    """Make and draw figures so in a whole notebook."""
    matplotlib.rcParams.update(_RC)


def figure(width: float = PAGE, height: float = 2.4) -> Figure:
    """Make an empty figure with constrained layout, apart from pyplot (no window system, nothing global). Inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.03)
    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(made)
    return made


def symmetric(*values: np.ndarray) -> Normalize:
    """Make a norm for `DIVERGING`, with 0 in the middle and the largest finite magnitude at both ends."""
    largest = max((float(np.nanmax(np.abs(v))) for v in values if np.size(v)), default=0.0)
    largest = largest if largest > 0 else 1.0
    return Normalize(-largest, largest)


def blank(axes: Axes) -> Axes:
    """Ready axes for a picture: no ticks, a thin frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.4, color=GREY)
    return axes


def tell_apart(data: list) -> list[str]:
    """Name models side by side (each has `name` and `kind`): KArAt and softmax where that tells them apart."""
    kinds = [each.kind for each in data]
    return [KIND_NAMES[kind] for kind in kinds] if len(set(kinds)) == len(kinds) > 1 else [each.name for each in data]


def colours_of(data: list) -> list[str]:
    """Choose the colours of models side by side, by their `kind` where that tells them apart."""
    colours = [KIND_COLOURS[each.kind] for each in data]
    return colours if len(set(colours)) == len(colours) else list(PALETTE[: len(data)])


def note(axes: Axes, text: str, at: tuple, offset: tuple[float, float], coordinates="data", **how: Any) -> Annotation:
    """Write a small text, `offset` points beside a place."""
    options: dict[str, Any] = {"fontsize": 7, "va": "center"} | how
    return axes.annotate(text, at, xycoords=coordinates, xytext=offset, textcoords="offset points", **options)


def share_heights(panels: Iterable[Axes]) -> None:
    """Give panels one vertical scale, which spans all of theirs."""
    panels = list(panels)
    low, high = zip(*(axes.get_ylim() for axes in panels))
    for axes in panels:
        axes.set_ylim(min(low), max(high))


def shades(count: int) -> list:
    """Make `count` colours from early (light) to late (dark), for series with an order."""
    steps = np.linspace(0.88, 0.05, count) if count > 1 else [0.2]
    return [matplotlib.colormaps[ORDERED](step) for step in steps]


def columns_of(panels: int) -> int:
    """Choose the number of panels in a row of a page."""
    return 3 if panels > 4 and panels % 4 in (1, 2) else min(panels, 4)


def categories(count: int) -> Colormap:
    """Make `count` colours for names without an order. Beyond the palette they are repeated lighter and lighter."""
    rounds, places = np.divmod(np.arange(count), len(PALETTE))
    base = np.array([to_rgb(colour) for colour in PALETTE])[places]
    return ListedColormap(list(base + (1 - base) * np.minimum(0.8, 0.45 * rounds)[:, None]))
