# SPDX-License-Identifier: Apache-2.0
"""The error for everything that a user can mend: the script prints its message without a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """
    A setting, file or folder that cannot be used. The message names it, what was expected and what to do.

    `said` is set where another process says the same.
    """

    said = False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def more(items: list, shown: int = 5) -> str:
    """` and 3 more`, or nothing where all are shown."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""
