# SPDX-License-Identifier: Apache-2.0
"""Figures of loss surfaces: contours, and surfaces in three dimensions, with the path of training."""

from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from image_classification.errors import InputError

from .. import style
from .planes import Plane
from .surface import Landscape


_EDGE = [patheffects.withStroke(linewidth=2.2, foreground="black")]
_PATH: dict[str, Any] = {"color": "white", "marker": "o", "markersize": 2, "linewidth": 1.0, "path_effects": _EDGE}
_STAR: dict[str, Any] = {"marker": "*", "color": style.ORANGE, "markersize": 8, "mec": "black", "mew": 0.5}


def levels_of(data: list[Landscape], log: bool = False, count: int = 24) -> np.ndarray:
    """Choose levels of contours for all models together: even steps of the loss, or of its logarithm."""
    losses = np.concatenate([each.loss[np.isfinite(each.loss)] for each in data])
    losses = losses[losses > 0] if log else losses
    if not losses.size:
        raise InputError("The loss is not finite anywhere on the grid: choose a smaller --radius.")
    low, high = losses.min(), losses.max()
    high = high if high > low else low + 1.0
    return np.geomspace(low, high, count) if log else np.asarray(MaxNLocator(count).tick_values(low, high))


def _norm(levels: np.ndarray, log: bool) -> Normalize:
    return (LogNorm if log else Normalize)(levels[0], levels[-1])


def _ticks(levels: np.ndarray) -> np.ndarray:
    """Choose 1, 3, 10, 30, ... for a logarithmic axis; of a narrow one its ends."""
    ticks = np.asarray(LogLocator(subs=(1, 3)).tick_values(levels[0], levels[-1]))
    ticks = ticks[(ticks >= levels[0]) & (ticks <= levels[-1])]
    return ticks if len(ticks) > 1 else levels[[0, -1]]


def draw(data: Landscape, axes: Axes, levels: np.ndarray, log: bool = False) -> Axes:
    """
    Draw filled contours of the loss; on them the path of training, the trained weights (star), and the square of the
    epsilon-sharpness (dashed).

    Args:
        levels, log: from and as in `levels_of`.
    """
    loss = _within(data.loss, levels)
    axes.contourf(data.x, data.y, loss, levels, cmap=style.ORDERED, norm=_norm(levels, log))
    axes.contour(data.x, data.y, loss, levels[::3], colors="white", linewidths=0.35, alpha=0.6)
    side = 2 * data.epsilon
    line: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8, "linestyle": (0, (3, 2))}
    axes.add_patch(Rectangle((-data.epsilon, -data.epsilon), side, side, fill=False, **line))
    if data.plane.path is not None:
        axes.plot(*data.plane.path.T, **_PATH)
    axes.plot(0, 0, **_STAR)
    axes.set_xlim(data.x[0], data.x[-1])
    axes.set_ylim(data.y[0], data.y[-1])
    for axis, label in zip((axes.xaxis, axes.yaxis), axis_labels(data.plane)):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_label_text(label)
    return axes


def _within(loss: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Limit the heights to what is drawn: what is not finite is as high as the highest."""
    return np.clip(np.where(np.isfinite(loss), loss, levels[-1]), levels[0], levels[-1])


def axis_labels(plane: Plane) -> tuple[str, str]:
    """Name both directions."""
    if plane.explained is None:
        return "first random direction", "second random direction"
    shares = [f"{100 * share:.1f} % of variance" for share in plane.explained]
    return f"first principal direction ({shares[0]})", f"second ({shares[1]})"


def draw_surface(data: Landscape, axes: Axes3D, levels: np.ndarray, log: bool = False) -> Axes3D:
    """
    Draw the same as a surface in three dimensions, the path lying on it.

    Args:
        levels: from `levels_of`.
        log: whether heights are logarithms, as the levels are.
    """
    scale = np.log10 if log else np.asarray
    bottom, top = float(scale(levels[0])), float(scale(levels[-1]))
    # Matplotlib sorts whole artists by depth, and would hide the path within the surface.
    axes.computed_zorder = False
    axes.plot_surface(
        *np.meshgrid(data.x, data.y),
        scale(_within(data.loss, levels)),
        cmap=style.ORDERED,
        norm=Normalize(bottom, top),
        rstride=1,
        cstride=1,
        linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35),
        zorder=1,
    )
    if data.plane.path is not None:
        height = data.height(data.plane.path)
        there = np.isfinite(height)
        axes.plot(*data.plane.path[there].T, scale(_within(height[there], levels)), **_PATH, zorder=2)
    axes.plot([0], [0], [scale(_within(np.array(data.trained_loss), levels))], **_STAR, zorder=3)
    axes.set_zlim(bottom, top)
    for axis, label, pad in (
        (axes.xaxis, "first direction", -3),
        (axes.yaxis, "second direction", -3),
        (axes.zaxis, "loss", 0),
    ):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_label_text(label)
        axis.labelpad = pad - 3
        axis.set_tick_params(pad=pad)
        # There is no public way to the lines of the grid.
        axis._axinfo["grid"].update(linewidth=0.4, color=style.PALE)
    if log:
        ticks = _ticks(levels)
        axes.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect((4, 4, 3), zoom=0.98)
    return axes


def described(data: Landscape) -> str:
    """Write out the sharpness of a model, for its title."""
    parts = []
    if data.hessian is not None:
        sign = "=" if data.hessian.converged else r"\approx"
        parts.append(rf"$\lambda_\mathrm{{max}} {sign} {_three_digits(data.hessian.value)}$")
    parts.append(rf"$\epsilon$-sharpness {_three_digits(data.epsilon_sharpness)} % ($\epsilon = {data.epsilon:g}$)")
    return ", ".join(parts)


def _three_digits(value: float) -> str:
    """Write out three digits, without an exponent."""
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def draw_all(data: list[Landscape], figure: Figure, log: bool = False, surface: bool = False) -> Figure:
    """Draw models side by side on one scale: contours, or surfaces in three dimensions."""
    levels = levels_of(data, log)
    panels = figure.subplots(1, len(data), squeeze=False, subplot_kw={"projection": "3d"} if surface else {})[0]
    names = style.tell_apart(data)
    for each, name, axes in zip(data, names, panels):
        if surface:
            draw_surface(each, axes, levels, log)
        else:
            draw(each, axes, levels, log)
        axes.set_title(f"{name}\n{described(each)}" if len(data) > 1 else described(each))
    if not surface:
        bar = figure.colorbar(
            ScalarMappable(_norm(levels, log), style.ORDERED), ax=panels.tolist(), pad=0.02, aspect=28
        )
        bar.set_label("loss")
        if log:
            ticks = _ticks(levels).tolist()
            bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            bar.ax.minorticks_off()
    return figure
