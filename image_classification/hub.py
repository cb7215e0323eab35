# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: its errors in words, its tokens and names, and checkpoints from it."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # Of the HTTP library that huggingface_hub uses: httpx, or httpx2.
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session

from .errors import InputError, chain, reason_of


LAST_CHECKPOINT = "last-checkpoint"
# Seconds without a byte after which a request has failed; before training, and in a push.
PATIENCE, PATIENCE_OF_A_PUSH = 20, 300
# Answers after which another try may succeed: too slow, somebody else wrote at the same time, too many, an outage.
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}


@dataclass
class Trouble:
    """What went wrong, for people."""

    reason: str  # With what to do where that is known.
    passing: bool  # Whether another try may succeed.
    reached: bool = True  # Whether it was the Hub that said no (and not a network that led nowhere).


def explain(error: BaseException) -> Trouble:
    """Any error of `huggingface_hub`, in words."""
    for link in chain(error):
        if isinstance(link, InputError):
            return Trouble(str(link), passing=False)
        if isinstance(link, LocalTokenNotFoundError):
            return Trouble("nobody is logged in: log in with `hf auth login`", passing=False)
        if isinstance(link, HFValidationError):
            return Trouble(f"this is no name of a repository: {reason_of(link)}", passing=False)
        if isinstance(link, OfflineModeIsEnabled):
            return Trouble("HF_HUB_OFFLINE is set", passing=False, reached=False)
        response = getattr(link, "response", None)
        if isinstance(link, HfHubHTTPError) and response is not None:
            return _explain_answer(link, response.status_code)
        if isinstance(link, HTTPError):
            return Trouble(f"the Hub cannot be reached ({reason_of(link)})", passing=True, reached=False)
    if isinstance(error, FileNotFoundError):
        return Trouble(f"{error.filename} is not there any more", passing=False)
    return Trouble(reason_of(error), passing=True, reached=False)


def _explain_answer(error: HfHubHTTPError, status: int) -> Trouble:
    said = " ".join((error.server_message or reason_of(error)).split()).rstrip(".")
    if isinstance(error, RepositoryNotFoundError):
        return Trouble("there is no such repository, or your token may not see it", passing=False)
    if status == 401:
        return Trouble("the Hub does not know your token: log in with `hf auth login`", passing=False)
    if status == 403:
        tokens = f"{constants.ENDPOINT}/settings/tokens"
        hint = f"your token may not write there: {said}. Make one that may ({tokens}), and log in with `hf auth login`"
        return Trouble(hint, passing=False)
    if status in (409, 412):
        return Trouble(f"somebody else wrote there at the same time ({said})", passing=True)
    if status in _PASSING:
        return Trouble(f"the Hub answers {status} ({said})", passing=True, reached=False)
    return Trouble(f"the Hub refuses it ({status}: {said})", passing=False)


@contextlib.contextmanager
def understood(setting: str, name: str) -> Iterator[None]:
    """Raise errors of the Hub as an `InputError` that names the setting and the repository."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # All of them come from huggingface_hub.
        raise InputError(f"`{setting}` {name}: {explain(error).reason}.") from error


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """`huggingface_hub` waits for an answer for ever; within this context, no longer than this."""
    client = get_session()
    before, client.timeout = client.timeout, seconds
    try:
        yield
    finally:
        client.timeout = before


def download_file(name: str, file: str) -> Path | None:
    """
    A file of a repository `USER/NAME`; `None` if it has none of that path, or `HF_HUB_OFFLINE` is set and the cache has
    none. Raises `InputError` where there is no such repository, or the Hub cannot be asked.
    """
    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise InputError(f"{file} of {name}: {explain(error).reason}.") from error
        return None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"no folder here, nor from the Hub: {explain(error).reason}.") from error


def download_checkpoint(name: str, token: str | None = None) -> Path:
    """
    The last checkpoint that a run has pushed to `USER/NAME`, as a folder here. Raises `InputError` where there is none,
    or the Hub cannot be asked. The token is by default that of `hf auth login`, or of the environment.
    """
    with understood("resume_from_checkpoint", name), patience(PATIENCE):
        files = HfApi(token=token).list_repo_files(name)
        folders = {path.split("/")[0] for path in files if "/" in path}
        steps = {int(match[1]): match[0] for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder))}
        if (chosen := LAST_CHECKPOINT if LAST_CHECKPOINT in folders else steps[max(steps)] if steps else None) is None:
            raise InputError(
                f"`resume_from_checkpoint`: {name} on the Hub holds no checkpoint, only the model. A run pushes its "
                "checkpoints with `--hub_strategy checkpoint`; to start from the weights, give --finetune."
            )
        return Path(snapshot_download(name, allow_patterns=f"{chosen}/*", token=token)) / chosen


def is_name(given: str) -> bool:
    """Whether this may be a repository, `USER/NAME`, and is not plainly a folder."""
    return given.count("/") == 1 and not given.startswith(".") and not Path(given).is_absolute()


def find_token(given: str | None) -> str:
    """The token to write with. Raises `InputError` where there is none."""
    if token := given or get_token():
        return token
    raise InputError("`push_to_hub` needs an account of the Hub: log in with `hf auth login`, or set HF_TOKEN.")
