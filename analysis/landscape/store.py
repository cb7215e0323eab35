# SPDX-License-Identifier: Apache-2.0
"""The points of a landscape, kept in a file."""

import json
import sqlite3
from collections import UserDict
from pathlib import Path

from image_classification.errors import InputError
from image_classification.runs import checkpoints


class Points(UserDict):
    """
    Results in an SQLite file, with their settings: each entry is on the disk when it is set, and a command that
    was stopped goes on from there.

    Args:
        settings: what the numbers depend on.
        replace: begin a file of other settings anew.

    Raises:
        InputError: the file is of other settings and not to be replaced, is none of these, or another process has it.
    """

    def __init__(self, path: Path, settings: dict, replace: bool = False):
        super().__init__()
        self.path = path
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            # The lock of the first transaction is kept until the file is closed.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("BEGIN EXCLUSIVE")
            self._read(settings, replace)
            self._database.execute("COMMIT")
        except (sqlite3.Error, json.JSONDecodeError) as error:
            self._database.close()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise InputError(
                    f"Another process is computing {path}. Wait for it or stop it, or choose another --output."
                ) from error
            raise InputError(
                f"{path} is damaged, or no file of this command ({error}). Move it away, or choose another --output."
            ) from error
        except BaseException:
            self._database.close()
            raise

    def _read(self, settings: dict, replace: bool) -> None:
        tables = [name for (name,) in self._database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        if not tables:
            self._database.execute("CREATE TABLE settings (value TEXT)")
            self._database.execute("CREATE TABLE points (key TEXT PRIMARY KEY, value TEXT)")
        row = self._database.execute("SELECT value FROM settings").fetchone()
        found = json.loads(row[0]) if row else None
        if found not in (None, settings):
            if not replace:
                different = [
                    f"{key} {_short(found.get(key))} there and {_short(settings.get(key))} here"
                    for key in dict.fromkeys([*found, *settings])
                    if found.get(key) != settings.get(key)
                ]
                raise InputError(
                    f"{self.path} holds points of other settings ({'; '.join(different)}). Choose another folder with "
                    "--output, or replace them with --overwrite."
                )
            self._database.execute("DELETE FROM points")
            self._database.execute("DELETE FROM settings")
        if found != settings:
            self._database.execute("INSERT INTO settings VALUES (?)", [json.dumps(settings)])
        self.data = {key: json.loads(value) for key, value in self._database.execute("SELECT * FROM points")}

    def __setitem__(self, key: str, value: dict) -> None:
        with checkpoints.writing("A point", self.path, "Free some space; the same command goes on from here."):
            self._database.execute("INSERT OR REPLACE INTO points VALUES (?, ?)", [key, json.dumps(value)])
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError("what was computed stays")

    def __enter__(self) -> "Points":
        return self

    def __exit__(self, *_) -> None:
        self._database.close()


def _short(value) -> str:
    """Write out a setting for a message; of a digest, enough to see that it differs."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:8]}..."
    return json.dumps(value)
