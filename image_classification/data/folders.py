# SPDX-License-Identifier: Apache-2.0
"""
The files below folders, for every command that reads a folder: names that begin with a dot and `__MACOSX` are nothing,
at every depth, and each real folder counts once, however many links lead to it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError


def visible(folder: str | Path) -> list[os.DirEntry]:
    """What a folder holds, by name. Raises `InputError` where it cannot be read, or has a name that is not in UTF-8."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read ({error.strerror}).") from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(entry.name)
            raise InputError(f"{folder} holds {shown!r}, a name that is not in UTF-8: rename it.") from error
    return sorted(found, key=lambda entry: entry.name)


class Walk:
    """
    The files below some folders, whose names end in one of the suffixes (in lower case): first `enter` each of them,
    then `follow` the links that were found on the way.

    The folders are in `base`; a link to it, or to what has it in it, leads back up and counts for nothing.
    """

    def __init__(self, base: Path, suffixes: Iterable[str]):
        self._base = os.path.join(os.path.realpath(base), "")
        self.suffixes = tuple(suffixes)
        self.files: dict[Path, list[str]] = {}
        self.entered: set[str] = set()
        self._links: list[tuple[Path, str]] = []

    def enter(self, root: Path, path: str | None = None) -> None:
        """Take the files below a folder, `path` (or `root` itself), for those of `root`."""
        files, waiting = self.files.setdefault(root, []), [(path or str(root), os.path.realpath(path or root))]
        while waiting:
            folder, real = waiting.pop()
            if real in self.entered:
                continue
            self.entered.add(real)
            for entry in visible(folder):
                if is_folder(entry):
                    if entry.is_symlink():
                        self._links.append((root, entry.path))
                    else:
                        waiting.append((entry.path, os.path.join(real, entry.name)))
                elif entry.name.lower().endswith(self.suffixes):
                    files.append(entry.path)

    def follow(self, elsewhere: Iterable[str] = ()) -> None:
        """Enter the folders to which links lead, unless they were entered before, here or by others, `elsewhere`."""
        self.entered |= (others := set(elsewhere) - self.entered)
        while self._links:
            root, path = self._links.pop(0)
            if not self._base.startswith(os.path.join(os.path.realpath(path), "")):
                self.enter(root, path)
        self.entered -= others


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files below one folder, sorted."""
    walk = Walk(folder, suffixes)
    walk.enter(folder)
    walk.follow()
    return sorted(map(Path, walk.files[folder]))


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False
