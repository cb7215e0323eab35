# SPDX-License-Identifier: Apache-2.0
"""
Repositories of the Hugging Face Hub: whose content one is, and commits that overwrite nothing of anybody else's.

A record in the repository says what was pushed there, and by which run. Started as a program, this module carries out
one push, which it reads from its standard input: see `publishing.py`.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # Of the HTTP library that huggingface_hub uses: httpx, or httpx2.
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, logging, validate_repo_id

from .errors import InputError, more


# Says which run the model is of, and which files are its.
RECORD = ".karat_vit_run.json"
CARD = "README.md"
LAST_CHECKPOINT = "last-checkpoint"
# What the Hub itself puts into a new repository.
OF_THE_HUB = {".gitattributes"}
# Seconds before a failed push is tried again. huggingface_hub itself repeats most requests for half a minute.
WAITS = (2, 8, 30)
# Seconds without a byte after which a request has failed; before training, and in a push.
PATIENCE, PATIENCE_OF_A_PUSH = 20, 300
# Answers after which another try may succeed: too slow, somebody else wrote at the same time, too many, an outage.
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}


class Conflict(InputError):
    """The repository holds what this push would overwrite."""


@dataclass
class Trouble:
    """
    What went wrong, for people.

    Args:
        reason: why, with what to do where that is known.
        passing: whether another try may succeed.
        reached: whether it was the Hub that said no (and not a network that led nowhere).
    """

    reason: str
    passing: bool
    reached: bool = True


def explain(error: BaseException) -> Trouble:
    """Any error of `huggingface_hub`, in words."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, InputError):
            return Trouble(str(link), passing=False)
        if isinstance(link, LocalTokenNotFoundError):
            return Trouble("nobody is logged in: log in with `hf auth login`", passing=False)
        if isinstance(link, HFValidationError):
            return Trouble(f"this is no name of a repository: {_first_line(link)}", passing=False)
        if isinstance(link, OfflineModeIsEnabled):
            return Trouble("HF_HUB_OFFLINE is set", passing=False, reached=False)
        response = getattr(link, "response", None)
        if isinstance(link, HfHubHTTPError) and response is not None:
            return _explain_answer(link, response.status_code)
        if isinstance(link, HTTPError):
            return Trouble(f"the Hub cannot be reached ({_first_line(link)})", passing=True, reached=False)
    if isinstance(error, FileNotFoundError):
        return Trouble(f"{error.filename} is not there any more", passing=False)
    return Trouble(_first_line(error), passing=True, reached=False)


def _explain_answer(error: HfHubHTTPError, status: int) -> Trouble:
    said = " ".join((error.server_message or _first_line(error)).split()).rstrip(".")
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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


@dataclass
class Content:
    """
    What a branch of a repository holds.

    Args:
        head: its last commit.
        private: whether only its owners see it.
        blobs: the git oid of each file, without what the Hub itself puts there.
        record: what was pushed from here, if anything was; `None` also where somebody made it unreadable.
    """

    head: str
    private: bool
    blobs: dict[str, str]
    record: dict[str, Any] | None

    @property
    def ours(self) -> list[str]:
        """The files in it that were pushed from here."""
        return [path for path in (self.record or {}).get("files", []) if path in self.blobs]


def _read_record(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), (dict, list)) else None


class Repository:
    """
    A repository, and one branch of it.

    Args:
        name: `USER/NAME`.
        record: the file that says what was pushed from here: JSON, with `files`.
        kind: `model` or `space`.
        revision: the branch; default `main`.
        token: default that of `hf auth login`, or of the environment.
    """

    def __init__(
        self, name: str, record: str, kind: str = "model", revision: str | None = None, token: str | None = None
    ):
        self.name, self.kind, self.revision, self._record = name, kind, revision, record
        self.api = HfApi(token=token)
        self._where = {"repo_id": name, "repo_type": kind, "revision": revision}

    @property
    def url(self) -> str:
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{self.api.endpoint}/{prefix}{self.name}" + (f"/tree/{self.revision}" if self.revision else "")

    def look(self) -> Content | None:
        """
        What is there now; `None` where there is no such repository.

        Raises:
            RevisionNotFoundError: there is, without this branch.
        """
        try:
            info = self.api.repo_info(**self._where, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        blobs = {file.rfilename: file.blob_id for file in info.siblings or [] if file.rfilename not in OF_THE_HUB}
        record = None
        if self._record in blobs:
            at = {**self._where, "revision": info.sha}
            with tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(**at, filename=self._record, local_dir=folder)
                record = _read_record(Path(path).read_bytes())
        return Content(info.sha, bool(info.private), blobs, record)

    def changed(self, content: Content) -> set[str]:
        """Of the files that were pushed from here, those that somebody has changed or deleted since."""
        (record,) = self.api.get_paths_info(
            self.name, [self._record], repo_type=self.kind, revision=content.head, expand=True
        )
        pushed = record.last_commit.oid  # Every push writes the record.
        if pushed == content.head:
            return set()
        info = self.api.repo_info(**{**self._where, "revision": pushed}, files_metadata=True)
        before = {file.rfilename: file.blob_id for file in info.siblings or []}
        return {path for path in content.record["files"] if before.get(path) != content.blobs.get(path)}

    def commit(self, files: dict[str, Path | bytes], delete: list[str], message: str, parent: str | None) -> CommitInfo:
        """
        Write and delete files in one commit. Nothing is committed where nothing changes.

        Args:
            files: by their path in the repository, a file here or its content.
            delete: paths in the repository.
            message: of the commit.
            parent: the commit that must still be the last one, or nothing is written.
        """
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in delete]
        return self.api.create_commit(
            **self._where, operations=operations, commit_message=message, parent_commit=parent
        )


@dataclass
class Destination:
    """
    Where a run is pushed to.

    Args:
        name: `USER/NAME`; or `NAME`, while the Hub could not say whose token it is.
        run: the identity of the run.
        token: what it may be written with.
        revision: the branch; default `main`.
        private: of a repository that is made: whether only its owners see it. `True` also refuses a public one.
        overwrite: whether to replace what is not this run's.
    """

    name: str
    run: str
    token: str = field(repr=False)
    revision: str | None = None
    private: bool | None = None
    overwrite: bool = False

    @property
    def repository(self) -> Repository:
        return Repository(self.name, RECORD, revision=self.revision, token=self.token)

    def resolve(self) -> None:
        """
        Find out whose token it is, which completes the name.

        Raises:
            InputError: the token may only read.
        """
        account = HfApi(token=self.token).whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(
                "`push_to_hub`: your token may only read. Make one that may write "
                f"({constants.ENDPOINT}/settings/tokens), and log in with `hf auth login`."
            )
        if "/" not in self.name:
            self.name = f"{account['name']}/{self.name}"

    def claim(self) -> Content:
        """
        Make sure that there is the repository with its branch, and that this run may write to it.

        Raises:
            Conflict: it holds what is not this run's.
        """
        repository, main = self.repository, Repository(self.name, RECORD, token=self.token)
        try:
            content = repository.look()
            if content is None:
                repository.api.create_repo(self.name, private=self.private, exist_ok=True)
                content = repository.look()
        except RevisionNotFoundError:
            content = None
        there = content or main.look()
        if there is None:
            raise Conflict(f"`push_to_hub`: {self.name} was made, and cannot be seen with your token.")
        if self.private and not there.private:
            raise Conflict(
                f"`hub_private_repo`: {main.url} is public. Make it private there ({main.url}/settings), choose "
                "another --hub_model_id, or leave the flag out."
            )
        if content is None:
            return self._branch(there)
        self._check(content)
        return content

    def _branch(self, main: Content) -> Content:
        """A new branch begins with the files of `main`, which keeps them, and is this run's from its first commit."""
        repository = self.repository
        repository.api.create_branch(self.name, branch=self.revision, exist_ok=True)
        began = sorted(main.blobs.keys() - set(main.ours))
        record = json.dumps({"run": self.run, "files": dict.fromkeys(main.ours, ""), "began_with": began})
        repository.commit({RECORD: record.encode()}, [], f"Begin {self.revision}", main.head)
        return repository.look()

    def _check(self, content: Content) -> None:
        if self.overwrite or not content.blobs:
            return
        if content.record is None:
            holds = f"files that no run pushed ({_some(content.blobs)})"
        elif content.record.get("run") != self.run:
            holds = "the model of another run"
        else:
            return
        raise Conflict(
            f"`push_to_hub`: {self.repository.url} holds {holds}. Choose another repository with --hub_model_id, a new "
            "branch of it with --hub_revision, or replace what is there with --hub_overwrite (its history keeps it)."
        )

    def push(self, files: dict[str, Path], message: str) -> dict[str, Any]:
        """
        Push the files of the run, in one commit. What an earlier push of it put there and is not needed any more goes,
        but not its other checkpoints; what somebody added stays, and so does a card that somebody edited.

        Returns:
            `url` of the repository; `kept`: whether the card is somebody's; `changed`: whether anything was new.

        Raises:
            Conflict: the repository holds what is not this run's, or what somebody changed or added in its way.
        """
        content = self.claim()
        record = content.record if content.record and content.record.get("run") == self.run else {}
        last = any(path.startswith(f"{LAST_CHECKPOINT}/") for path in files)
        replaced = {
            path
            for path in content.ours
            if not record or "/" not in path or (last and path.startswith(f"{LAST_CHECKPOINT}/"))
        }
        changed, kept = set(), False
        if record and not self.overwrite:
            changed = self.repository.changed(content) | self._in_the_way(files, content)
            kept = CARD in changed or bool(record.get("card_kept"))
            if others := sorted(changed & (files.keys() | replaced) - {CARD}):
                raise Conflict(
                    f"`push_to_hub`: in {self.repository.url}, somebody changed or added {_some(others)} after the "
                    "last push. Choose another repository with --hub_model_id, or replace them with --hub_overwrite "
                    "(the repository's history keeps them)."
                )
        sums = {path: _sha256(file) for path, file in files.items()}
        # What somebody changed of earlier checkpoints is theirs from now on.
        stays = {path: record["files"][path] for path in content.ours if path not in replaced | changed}
        new = {"run": self.run, "files": dict(sorted((stays | sums).items()))} | ({"card_kept": True} if kept else {})
        if began := record.get("began_with"):
            new["began_with"] = began
        written = {path: file for path, file in files.items() if not (kept and path == CARD)}
        written[RECORD] = (json.dumps(new, indent=1) + "\n").encode()
        stale = sorted(replaced - sums.keys() - ({CARD} if kept else set()))
        commit = self.repository.commit(written, stale, message, content.head)
        return {"url": self.repository.url, "kept": kept, "changed": commit.oid != content.head}

    def _in_the_way(self, files: dict[str, Path], content: Content) -> set[str]:
        """Of the files to be pushed, those that somebody else has put there, though this run has pushed others."""
        return (files.keys() & content.blobs.keys()) - set(content.ours) - set(content.record.get("began_with", ()))

    def command(self, folder: Path) -> str:
        """The command that pushes a finished run's folder by hand."""
        words = ["hf", "upload", self.name, str(folder), ".", *(["--revision", self.revision] if self.revision else [])]
        words += ["--private"] if self.private else []  # Else it would make a public repository, where there is none.
        return shlex.join([*words, *(word for pattern in NOT_PUSHED for word in ("--exclude", pattern))])


# What of a run's folder does not go to the Hub: checkpoints, the trackers' files, what is of this machine, and an image
# whose licence nobody here knows.
NOT_PUSHED = ("checkpoint-*", "runs/*", "run.json", "sample.png", ".*")


def prepare(destination: Destination) -> str | None:
    """
    Before training: check the token, complete the name, make the repository, and see that nothing is overwritten.

    Returns:
        A warning where the Hub cannot be reached, so that this is left to the first push.

    Raises:
        InputError: it cannot be pushed there.
    """
    try:
        validate_repo_id(destination.name)
    except HFValidationError as error:
        raise InputError(
            f"The repository would be called {destination.name}, which the Hub does not take ({_first_line(error)}). "
            "Give --hub_model_id, as USER/NAME or NAME."
        ) from error
    try:
        with patience(PATIENCE):
            destination.resolve()
            destination.claim()
    except InputError:
        raise
    except Exception as error:
        trouble = explain(error)
        if trouble.reached and not trouble.passing:
            raise InputError(f"`push_to_hub` to {destination.name}: {trouble.reason}.") from error
        return (
            f"`push_to_hub` to {destination.name}: {trouble.reason}. The run trains, and tries again when it pushes; "
            "the same command pushes what is missing later."
        )
    return None


def download_checkpoint(name: str, token: str | None = None) -> Path:
    """
    The last checkpoint that a run has pushed, as a folder here.

    Args:
        name: `USER/NAME`.
        token: default that of `hf auth login`, or of the environment.

    Raises:
        InputError: there is none, or the Hub cannot be asked.
    """
    with understood("resume_from_checkpoint", name), patience(PATIENCE):
        files = HfApi(token=token).list_repo_files(name)
        folders = {path.split("/")[0] for path in files if "/" in path}
        steps = {int(match[1]): match[0] for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder))}
        chosen = LAST_CHECKPOINT if LAST_CHECKPOINT in folders else steps[max(steps)] if steps else None
        if chosen is None:
            raise InputError(
                f"`resume_from_checkpoint`: {name} on the Hub holds no checkpoint, only the model. A run pushes its "
                "checkpoints with `--hub_strategy checkpoint`; to start from the weights, give --finetune."
            )
        return Path(snapshot_download(name, allow_patterns=f"{chosen}/*", token=token)) / chosen


def is_name(given: str) -> bool:
    """Whether this may be a repository, `USER/NAME`, and is not plainly a folder."""
    return given.count("/") == 1 and not given.startswith(".") and not Path(given).is_absolute()


def find_token(given: str | None) -> str:
    """
    The token to write with.

    Raises:
        InputError: there is none.
    """
    token = given or get_token()
    if not token:
        raise InputError(
            "`push_to_hub` needs an account of the Hub: log in with `hf auth login`, or set the environment variable "
            "HF_TOKEN."
        )
    return token


def push_with_patience(
    destination: Destination, files: dict[str, Path], message: str, waits: list[float]
) -> dict[str, Any]:
    """
    Push, and try again after each of the waits (in seconds) where that may help. Without files, only complete the name.

    Returns:
        `name` of the repository, and what `Destination.push` returns; or `error`, why it was not pushed, and whether
        that is a `conflict`.
    """
    for wait in (*waits, None):
        try:
            with patience(PATIENCE_OF_A_PUSH):
                if "/" not in destination.name:
                    destination.resolve()
                return {"name": destination.name, **(destination.push(files, message) if files else {})}
        except Exception as error:
            trouble = explain(error)
            if wait is None or not trouble.passing:
                return {"error": trouble.reason, "conflict": isinstance(error, Conflict)}
            time.sleep(wait)


def _sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(paths) -> str:
    paths = sorted(paths)
    return ", ".join(paths[:3]) + more(paths, 3)


def main() -> None:
    """One push: a line of JSON on standard input describes it, and its result goes to standard output."""
    disable_progress_bars()
    logging.set_verbosity_error()
    job = json.loads(sys.stdin.readline())  # A data worker may have a copy of the pipe, so its end may not come.
    files = {path: Path(file) for path, file in job["files"].items()}
    with contextlib.redirect_stdout(sys.stderr):  # Whatever a library prints is not the result.
        result = push_with_patience(Destination(**job["destination"]), files, job["message"], job["waits"])
    json.dump(result, sys.stdout)


def describe(destination: Destination, files: dict[str, Path], message: str, waits: tuple[float, ...]) -> str:
    """A push as `main` reads it."""
    job = {
        "destination": dataclasses.asdict(destination),
        "files": {path: str(file) for path, file in files.items()},
        "message": message,
        "waits": waits,
    }
    return json.dumps(job) + "\n"


if __name__ == "__main__":
    main()
