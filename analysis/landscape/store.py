# SPDX-License-Identifier: Apache-2.0
"""What was computed of a landscape, kept in a file."""

import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from image_classification.errors import InputError
from image_classification.runs import checkpoints as saved


try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None


_BEGINNING = '{"settings": {'


class Points(MutableMapping):
    """
    What was computed, in a file of JSON lines, the settings first: each entry is on the disk when it is set, and a
    command that was stopped goes on from there.

    Args:
        path: of the file.
        settings: what the numbers depend on.
        replace: whether a file of other settings is begun anew.

    Raises:
        InputError: the file is of other settings and not to be replaced, is none of these, or another process has it.
    """

    def __init__(self, path: Path, settings: dict, replace: bool = False):
        self.path, self.entries = path, {}
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+", encoding="utf-8")
        try:
            self._lock()
            self._read(settings, replace)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"Another process is computing {self.path}. Wait for it or stop it, or choose another --output."
            ) from error
        except OSError:
            pass  # A file system without locks.

    def _read(self, settings: dict, replace: bool) -> None:
        self.file.seek(0)
        try:
            # A process that was killed may have left half a line at the end.
            text = self.file.read()
            whole = text.rpartition("\n")[0]
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines and not _BEGINNING.startswith(text[: len(_BEGINNING)]):
                raise ValueError("no settings")
            found = lines[0]["settings"] if lines else None
            self.entries = {line.pop("key"): line for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged, or no file of this command ({error!r}). Move it away, or choose another "
                "--output."
            ) from error
        if found is not None and found != settings:
            different = [
                f"{key} {_short(found.get(key))} there and {_short(settings.get(key))} here"
                for key in dict.fromkeys([*found, *settings])
                if found.get(key) != settings.get(key)
            ]
            if not replace:
                raise InputError(
                    f"{self.path} holds points of other settings ({'; '.join(different)}). Choose another folder with "
                    "--output, or replace them with --overwrite."
                )
            found, self.entries = None, {}
        self.file.seek(0)
        if found is None:
            self.file.truncate()
            self._append({"settings": settings})
        else:
            self.file.truncate(len(f"{whole}\n".encode()))

    def _append(self, line: dict) -> None:
        with saved.writing("A line", self.path, "Free some space, then give the same command again: it goes on."):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def __getitem__(self, key: str) -> dict:
        return self.entries[key]

    def __setitem__(self, key: str, value: dict) -> None:
        self._append({"key": key, **value})
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("What was computed stays.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __enter__(self) -> "Points":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def _short(value) -> str:
    """A setting for a message; of a digest, enough to see that it differs."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:8]}..."
    return json.dumps(value)
