# SPDX-License-Identifier: Apache-2.0
"""What a command says where it fails: an error that a user can mend, and the handler of all others."""

import difflib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


# In whose frames `_file_of` looks for the file that a failure is about.
_OURS = {"__main__", "analysis", "image_classification", "modeling_karat_vit", "predict"}


class InputError(ValueError):
    """
    A setting, file or folder that cannot be used. The message names it, what was expected and what to do.

    `said` is set where another process says the same.
    """

    said = False


def run_command(program: str, command: Callable[[], int | None], debug: bool = False) -> int:
    """
    Run a command, and tell its failure, if it fails, in one line on standard error.

    Args:
        program: what the line begins with.
        command: returns its exit status; `None` is 0.
        debug: print the tracebacks.

    Returns:
        The command's exit status; 2 after an `InputError`; 130 after Ctrl-C; 1 after a failure that nobody foresaw,
        whose traceback is in a file that the line names.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if _reader_has_gone() and isinstance(error, BrokenPipeError):
            return 1
        if debug:
            traceback.print_exception(error)
        if not isinstance(error, InputError):
            print(f"{program}: error: {_unforeseen(error)}", file=sys.stderr)
            return 1
        if not error.said:
            # A data worker's error comes with the worker's traceback before it.
            message = str(error).rpartition(f"{InputError.__name__}: ")[2].strip()
            print(f"{program}: error: {message}", file=sys.stderr)
        return 2


def reason_of(error: BaseException) -> str:
    """What went wrong, on one line: the first of the message, or the last where a data worker's traceback is in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "Traceback (most recent call last):" in lines else 0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def more(items: list, shown: int = 5) -> str:
    """` and 3 more`, or nothing where all are shown."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`. What is not written yet is written, or dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _unforeseen(error: Exception) -> str:
    """One line on a failure that nobody foresaw: its kind, the file it is about, and where its traceback is."""
    said, kind = reason_of(error), type(error).__name__
    line = said if said.startswith(kind) else f"{kind}: {said}"
    if (file := _file_of(error)) is not None and file not in line:
        line += f" (at work on {file})"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="karat-vit-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            traceback.print_exception(error, file=log)
    except OSError:  # The disk is full, perhaps.
        traceback.print_exception(error)
        return line
    return f"{line}. This was not foreseen; its traceback is in {log.name}, and --debug shows it."


def _file_of(error: BaseException) -> str | None:
    """The file that the system names; or else the file (or if there is none, the folder) in our innermost frames."""
    for link in _chain(error):
        if isinstance(link, OSError) and isinstance(link.filename, (str, bytes)):
            return os.fsdecode(link.filename)
    frames = [
        frame
        for link in _chain(error)
        for frame, _ in reversed(list(traceback.walk_tb(link.__traceback__)))
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS
    ]
    named = [
        str(value)
        for frame in frames
        for name, value in frame.f_locals.items()
        if isinstance(value, Path) or (isinstance(value, str) and name in ("path", "file", "folder", "source"))
    ]
    return next((path for test in (os.path.isfile, os.path.isdir) for path in named if test(path)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from, the innermost first."""
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return reversed(links)
