# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from analysis import style
from analysis.landscape import command, figures
from analysis.landscape.planes import Plane
from image_classification.errors import InputError

from .conftest import eigenvalue, made


def test_sharpness_and_what_is_said_of_it():
    assert made().epsilon_sharpness == pytest.approx(10)
    assert figures.described(made()).startswith(r"$\lambda_\mathrm{max} = 1230$")
    unsure = made(hessian=eigenvalue(0.001234, converged=False))
    assert figures.described(unsure).startswith(r"$\lambda_\mathrm{max} \approx 0.00123$")
    assert "lambda" not in figures.described(made(hessian=None))
    assert "10 %" in figures.described(made())
    # A loss that overflows is null in the JSON, which knows no infinity.
    numbers = command.numbers_of("a", made(highest=np.inf, hessian=eigenvalue(np.nan, converged=False)))
    assert (numbers["loss"], numbers["epsilon_sharpness_percent"]) == (5.0, None)
    assert numbers["hessian"]["value"] is None
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("log", [False, True])
def test_the_figures_show_the_surface_and_the_path(log):
    path = np.array([[1.5, 0.9], [1.0, 0.2], [0.0, 0.0]])
    plane = Plane("pca", "none", torch.zeros(2, 3), path, explained=np.array([0.75, 0.125]))
    data = [made(plane=plane), made(kind="softmax", loss=made().loss * 3)]
    data[1].loss[0, 0] = np.inf
    levels = figures.levels_of(data, log)
    assert levels[0] <= 5
    assert levels[-1] >= 3 * 19 - 1e-9
    steps = np.diff(np.log(levels) if log else levels)
    np.testing.assert_allclose(steps, steps[0])
    with style.context():
        flat = figures.draw_all(data, style.figure(), log)
        deep = figures.draw_all(data, style.figure(), log, surface=True)
        for figure in (flat, deep):
            figure.canvas.draw()
    ours, theirs = flat.axes[:2]
    np.testing.assert_allclose(ours.lines[0].get_xydata(), path)
    np.testing.assert_allclose(ours.lines[1].get_xydata(), [[0, 0]])
    assert ours.get_xlabel() == "first principal direction (75.0 % of variance)"
    assert ours.get_ylabel() == "second (12.5 % of variance)"
    assert theirs.get_xlabel() == "first random direction"
    assert len(theirs.lines) == 1
    (square,) = ours.patches
    assert square.get_bbox().bounds == (-0.5, -0.5, 1, 1)
    assert [axes.get_title().split("\n")[0] for axes in (ours, theirs)] == ["KArAt", "softmax"]
    scale = np.log10 if log else np.asarray
    drawn = np.array(deep.axes[0].lines[0].get_data_3d()).T
    np.testing.assert_allclose(drawn[:, :2], path)
    np.testing.assert_allclose(drawn[:, 2], scale(data[0].height(path)))
    # One scale for both.
    assert deep.axes[0].get_zlim() == deep.axes[1].get_zlim() == pytest.approx(tuple(scale(levels[[0, -1]])))
    assert ours.collections[0].norm.vmax == theirs.collections[0].norm.vmax


def test_levels_of_flat_and_of_endless_losses():
    assert len(figures.levels_of([made(loss=np.full((5, 9), 2.0))])) > 2
    with pytest.raises(InputError, match="not finite anywhere"):
        figures.levels_of([made(loss=np.full((5, 9), np.nan))])
