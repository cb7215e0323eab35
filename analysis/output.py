# SPDX-License-Identifier: Apache-2.0
"""
The files of a command. They are named before the work begins, so that nothing of the user's is overwritten, and no
hour of work lost, because of a file that exists.
"""

import contextlib
import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from image_classification.errors import InputError, more
from image_classification.files import written_whole


class Output:
    """
    The files of one command.

    Args:
        folder: made when the first is written.
        names: of all files; `figure_names` gives those of a figure.
        overwrite: replace files that exist.

    Raises:
        InputError: `folder` is a file, or some of the files exist and `overwrite` is not set.
    """

    def __init__(self, folder: str | Path, names: list[str], overwrite: bool = False):
        self.folder, self.names = Path(folder), list(names)
        self.written: list[str] = []
        assert len(set(names)) == len(names), names
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"`--output` {folder} is a file, expected a folder.")
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"`--output` {folder} cannot be made: {nearest} is a file, or a folder not to be written to."
            )
        there = [name for name in names if (self.folder / name).exists()]
        if there and not overwrite:
            raise InputError(
                f"{self.folder} holds {', '.join(there[:3])}{more(there, 3)} already. Choose another folder with "
                "--output, or replace them with --overwrite."
            )

    def figure(self, stem: str, figure: Figure) -> None:
        """Save a figure as `stem`.png and `stem`.svg."""
        for name in figure_names(stem):
            with self._whole(name) as path:
                # Without the date, the same figure is the same file.
                metadata = {"Date": None} if name.endswith(".svg") else {"Software": None}
                figure.savefig(path, format=name[-3:], metadata=metadata)

    def table(self, name: str, rows: list[dict]) -> None:
        """Save rows as CSV. Columns are the keys, in the order in which they first appear."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with self._whole(name) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def arrays(self, name: str, **arrays: Any) -> None:
        """Save arrays by name as a compressed NPZ."""
        with self._whole(name) as path, path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def text(self, name: str, text: str) -> None:
        """Save a text."""
        with self._whole(name) as path:
            path.write_text(text, encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """Save a file that was made elsewhere."""
        with self._whole(name) as path:
            shutil.copyfile(source, path)

    def report(self) -> None:
        """Say what was written, and that nothing of what was promised is missing."""
        assert sorted(self.written) == sorted(self.names), (self.written, self.names)
        print("\n".join(str(self.folder / name) for name in self.written))

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """Open a path to write to, which becomes the file once it is whole."""
        assert name in self.names, name
        with written_whole(self.folder / name) as part:
            yield part
        self.written.append(name)


def figure_names(stem: str) -> list[str]:
    """Name the files of a figure."""
    return [f"{stem}.png", f"{stem}.svg"]
