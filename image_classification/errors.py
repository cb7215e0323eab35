# SPDX-License-Identifier: Apache-2.0
"""What a command says where it fails: an error that a user can mend, and the handler of all others."""

import contextlib
import difflib
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


# Errors of the system that are about a file that the user named.
_OF_THE_USER = {
    getattr(errno, name, None)
    for name in ("EACCES", "EDQUOT", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
} - {None}
# In whose frames `_file_of` looks for the file that a failure is about.
_OURS = {"__main__", "analysis", "image_classification", "modeling_karat_vit", "predict"}


class InputError(ValueError):
    """A setting, file or folder that cannot be used. The message names it, what was expected and what to do."""

    said = False  # Whether another process says the same.


def run_command(program: str, command: Callable[[], int | None], debug: bool = False) -> int:
    """
    Run a command, and tell its failure, if it fails, in one line on standard error that begins with `program`.

    Returns:
        The command's exit status (0 for `None`); 2 after an `InputError`; 130 after Ctrl-C; 1 after a failure that
        nobody foresaw, whose traceback is in a file that the line names, or with `debug` on standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Names of files and classes may be no text at all.
    try:
        status = command() or 0
        # Here, and not at Python's end, which would fail in its own way.
        return 1 if _reader_has_gone() else status
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except Exception as error:
        with contextlib.suppress(OSError):  # The disk is full.
            # What could not be written is forgotten: only writing again shows it.
            pipe = isinstance(error, BrokenPipeError)
            if _reader_has_gone("\n" * pipe) and pipe:
                return 1
        if debug:
            traceback.print_exception(error)
        if isinstance(error, OSError) and error.errno in _OF_THE_USER and error.filename is not None:
            print(f"{program}: error: {os.fsdecode(error.filename)}: {error.strerror}.", file=sys.stderr)
            return 2
        if not isinstance(error, InputError):
            print(f"{program}: error: {' '.join(_unforeseen(error).split())}", file=sys.stderr)
            return 1
        if not error.said:
            # A data worker's error comes with the worker's traceback before it.
            message = str(error).rpartition(f"{InputError.__name__}: ")[2]
            print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


def one_line(text: str) -> str:
    """A name as people may have made it (a folder's, a class's), without line breaks and what cannot be printed."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def reason_of(error: BaseException, whole: bool = False) -> str:
    """
    What went wrong, on one line: the first of the message, or the last where a data worker's traceback is in it; or
    with `whole` all of them.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if whole:
        return " ".join(" ".join(lines).split())
    if "Traceback (most recent call last):" in lines:
        return lines[-1]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def refusing(what: str, hint: str = "", whole: bool = True) -> Iterator[None]:
    """Make an `InputError` of whatever a library raises: `what`, the reason (as `reason_of` has it), and a `hint`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = reason_of(error, whole)
        raise InputError(f"{what}: {reason.rstrip('.') if hint else reason}{hint}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def more(items: list, shown: int = 5) -> str:
    """` and 3 more`, or nothing where all are shown."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def _reader_has_gone(text: str = "") -> bool:
    """Whether nobody reads the output any more, as after `| head`. What is not written yet is written, or dropped."""
    try:
        print(end=text, flush=True)
    except OSError as error:
        # Python would fail once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
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
    links = list(reversed(chain(error)))
    for link in links:
        if isinstance(link, OSError) and isinstance(link.filename, (str, bytes)):
            return os.fsdecode(link.filename)
    frames = [
        frame
        for link in links
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


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it came from, the innermost last."""
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links
