# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and their sums."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the disk hold what a file or folder is."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders, and flushes only what may be written.
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(path: Path) -> Path:
    """Where a file or folder is while it is not whole: hidden, beside its place."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` once it is on the disk; after an error, nothing."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
