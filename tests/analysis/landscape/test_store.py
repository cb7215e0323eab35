# SPDX-License-Identifier: Apache-2.0
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch

from analysis.landscape import surface
from analysis.landscape.store import Points
from image_classification.errors import InputError

from .conftest import CPU, Quadratic, Weights, symmetric


class Killed(Points):
    """Dies without notice after a few entries, while it writes the next."""

    def __setitem__(self, key, value):
        if len(self) == 5:
            self._database.execute("BEGIN")
            super().__setitem__(key, value)
            os.kill(os.getpid(), signal.SIGKILL)
        super().__setitem__(key, value)


@pytest.mark.system
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_kill_it_goes_on_and_recomputes_nothing(tmp_path):
    model = Weights((2, 2))
    directions = torch.randn(2, 4, dtype=torch.float64)
    points = {f"{row}/{column}": (float(row), float(column)) for row in range(4) for column in range(4)}
    path = tmp_path / "points.sqlite"

    def fill(kind, objective):
        with kind(path, {"grid": 4}) as store:
            surface.evaluate(model, directions, objective, points, store, [CPU])
            return dict(store)

    expected, objective = {}, Quadratic(model, symmetric(1, 2, 3, 4))
    surface.evaluate(model, directions, objective, points, expected, [CPU])
    process = multiprocessing.get_context("fork").Process(target=fill, args=(Killed, objective))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    objective.calls = 0
    assert fill(Points, objective) == expected
    assert objective.calls == len(points) - 5
    assert fill(Points, objective) == expected
    assert objective.calls == len(points) - 5


def test_points_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "new" / "points.sqlite"
    with Points(path, {"grid": 3, "weights": "a" * 64, "radius": None}) as store:
        store["x"] = {"loss": float("inf")}
        with pytest.raises(TypeError):
            del store["x"]
    with Points(path, {"grid": 3, "weights": "a" * 64, "radius": None}) as store:
        assert dict(store) == {"x": {"loss": float("inf")}}
    written = path.read_bytes()
    other = {"grid": 5, "weights": "b" * 64, "radius": None}
    with pytest.raises(InputError, match=r"grid 3 there and 5 here; weights aaaaaaaa... there and bbbb.*--overwrite"):
        Points(path, other)
    assert path.read_bytes() == written
    with Points(path, other, replace=True) as store:
        assert not store
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE notes (text TEXT)")
    database.close()
    damaged = path.read_bytes()[:200] + b"x" * 5000
    for content in (b"my notes", damaged, (tmp_path / "other.sqlite").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged, or no file of this command"):
            Points(path, other, replace=True)
        assert path.read_bytes() == content
    path.write_bytes(b"")  # killed while it was begun
    with Points(path, other) as store:
        assert not store


@pytest.mark.system
def test_two_commands_do_not_write_one_file(tmp_path):
    path = tmp_path / "points.sqlite"
    code = (
        "import sys; from pathlib import Path; from analysis.landscape.store import Points\n"
        f"with Points(Path({str(path)!r}), {{}}): print('', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match="Another process is computing"):
            Points(path, {})
        process.stdin.close()
    Points(path, {}).__exit__()
