# SPDX-License-Identifier: Apache-2.0
"""
Where a run is pushed to: whose a repository of the Hub is, and commits that overwrite nothing of anybody else's.

A record in the repository says what was pushed there, and by which run. Started as a program, this module carries out
one push, which it reads from its standard input: see `publisher.py`.
"""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id

from ..errors import InputError, more, reason_of
from ..files import sha256
from ..hub import LAST_CHECKPOINT, PATIENCE, PATIENCE_OF_A_PUSH, explain, patience
from .repository import Content, Repository


# Says which run the model is of, and which files are its.
RECORD = ".karat_vit_run.json"
CARD = "README.md"
# Seconds before a failed push is tried again. huggingface_hub itself repeats most requests for half a minute.
WAITS = (2, 8, 30)


class Conflict(InputError):
    """Somebody else wrote to the repository."""


@dataclass
class Destination:
    """Where a run is pushed to."""

    name: str  # `USER/NAME`; or `NAME`, while the Hub could not say whose token it is.
    run: str  # The identity of the run.
    token: str = field(repr=False)
    revision: str | None = None  # The branch; default `main`.
    private: bool | None = None  # Whether only its owners see a repository that is made. `True` refuses a public one.
    overwrite: bool = False  # Write where somebody else did, too.

    @property
    def repository(self) -> Repository:
        return Repository(self.name, RECORD, revision=self.revision, token=self.token)

    def resolve(self) -> None:
        """Find out whose token it is, which completes the name. Raises `InputError` where it may only read."""
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
        Make sure that there is the repository with its branch, and that this run may write to it: its last commit is
        this run's, or it holds nothing, or `overwrite` is set; else a `Conflict` is raised. `push` names that commit as
        the parent of its own: the Hub refuses it where somebody was faster.
        """
        repository, main = self.repository, Repository(self.name, RECORD, token=self.token)
        try:
            if (content := repository.look()) is None:
                repository.api.create_repo(self.name, private=self.private, exist_ok=True)
                content = repository.look()
        except RevisionNotFoundError:
            content = None
        if (there := content or main.look()) is None:
            raise Conflict(f"`push_to_hub`: {self.name} was made, and cannot be seen with your token.")
        if self.private and not there.private:
            raise Conflict(
                f"`hub_private_repo`: {main.url} is public. Make it private there ({main.url}/settings), choose "
                "another --hub_model_id, or leave the flag out."
            )
        if content is None and self.revision is not None:
            # A new branch begins with the files of `main`, which keeps them, and is this run's.
            repository.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            record = {"run": self.run, "files": there.ours}
            begun = repository.commit({RECORD: json.dumps(record).encode()}, [], f"Begin {self.revision}", there.head)
            return replace(there, head=begun.oid, record=record, pushed_last=True)
        if self.overwrite or not there.blobs:
            return there
        if there.record is None:
            found = sorted(there.blobs)
            holds = f"holds files that no run pushed ({', '.join(found[:3])}{more(found, 3)})"
        elif there.record.get("run") != self.run:
            holds = "holds the model of another run"
        elif not there.pushed_last:
            holds = "was changed by somebody after this run's last push"
        else:
            return there
        raise Conflict(
            f"`push_to_hub`: {repository.url} {holds}. Choose another repository with --hub_model_id, a new branch of "
            "it with --hub_revision, or replace what is in the way with --hub_overwrite (its history keeps it)."
        )

    def push(self, files: dict[str, Path], message: str) -> dict[str, Any]:
        """
        Push the files of the run, in one commit, if `claim` allows it. What an earlier push of it put there and is not
        needed any more goes, but not its other checkpoints. Returns the repository's `url`, and whether it `changed`.
        """
        content = self.claim()
        ours = content.record if content.record is not None and content.record.get("run") == self.run else {}
        last = any(path.startswith(f"{LAST_CHECKPOINT}/") for path in files)
        kept = [path for path in content.ours if ours and "/" in path]
        stays = {path for path in kept if not (last and path.startswith(f"{LAST_CHECKPOINT}/"))}
        # Every commit changes it: by the sums of the files, or where somebody else's commit is the last, by its name.
        record = {"run": self.run, "onto": ours.get("onto") if content.pushed_last and ours else content.head}
        record["files"] = dict.fromkeys(stays, "") | {path: sha256(file) for path, file in files.items()}
        written: dict[str, Path | bytes] = {**files, RECORD: json.dumps(record, indent=1, sort_keys=True).encode()}
        stale = sorted(set(content.ours) - stays - files.keys())
        commit = self.repository.commit(written, stale, message, content.head)
        return {"url": self.repository.url, "changed": commit.oid != content.head}

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
    Raises `InputError` where it cannot be pushed there. Where the Hub cannot be reached, returns a warning: then that
    is left to the first push.
    """
    try:
        validate_repo_id(destination.name)
    except HFValidationError as error:
        raise InputError(
            f"The repository would be called {destination.name}, which the Hub does not take ({reason_of(error)}). "
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


def push_with_patience(
    destination: Destination, files: dict[str, Path], message: str, waits: list[float]
) -> dict[str, Any]:
    """
    Push, and try again after each of the waits (in seconds) where that may help. Without files, only complete the name.
    Returns the repository's `name`, and what `Destination.push` does; or `error`, why it was not pushed, and whether
    that is a `conflict`.
    """
    waits = list(waits)
    while True:
        try:
            with patience(PATIENCE_OF_A_PUSH):
                if "/" not in destination.name:
                    destination.resolve()
                return {"name": destination.name, **(destination.push(files, message) if files else {})}
        except Exception as error:
            trouble = explain(error)
            if not waits or not trouble.passing:
                return {"error": trouble.reason, "conflict": isinstance(error, Conflict)}
            time.sleep(waits.pop(0))


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
    job = {"destination": dataclasses.asdict(destination), "files": files, "message": message, "waits": waits}
    return json.dumps(job, default=str) + "\n"


if __name__ == "__main__":
    main()
