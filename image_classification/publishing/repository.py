# SPDX-License-Identifier: Apache-2.0
"""A repository of the Hugging Face Hub: what a branch of it holds, and commits to it."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError


# What the Hub itself puts into a new repository.
OF_THE_HUB = {".gitattributes"}


@dataclass
class Content:
    """What a branch of a repository holds."""

    head: str  # Its last commit.
    private: bool  # Whether only its owners see it.
    blobs: dict[str, str]  # The git oid of each file, without what the Hub itself puts there.
    record: dict[str, Any] | None = None  # What was pushed from here, if anything was, and somebody did not break it.
    pushed_last: bool = False  # Whether the last commit was pushed from here: each of those writes the record.

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
    A repository (`USER/NAME`, a `model` or a `space`), and one branch of it; `record` is the file that says what was
    pushed from here: JSON, with `files`. The token is by default that of `hf auth login`, or of the environment.
    """

    def __init__(self, name: str, record: str, kind="model", revision: str | None = None, token: str | None = None):
        self.name, self.kind, self.revision, self._record = name, kind, revision, record
        self.api = HfApi(token=token)
        self._where: dict[str, Any] = {"repo_id": name, "repo_type": kind, "revision": revision}

    @property
    def url(self) -> str:
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{self.api.endpoint}/{prefix}{self.name}" + (f"/tree/{self.revision}" if self.revision else "")

    def look(self) -> Content | None:
        """What is there now; `None` where there is no such repository. `RevisionNotFoundError`: it lacks the branch."""
        try:
            info: Any = self.api.repo_info(**self._where, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        blobs = {file.rfilename: file.blob_id for file in info.siblings or [] if file.rfilename not in OF_THE_HUB}
        content = Content(info.sha, bool(info.private), blobs)
        if self._record in blobs:
            at = {**self._where, "revision": info.sha}
            with tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(**at, filename=self._record, local_dir=folder)
                content.record = _read_record(Path(path).read_bytes())
            found: Any = self.api.get_paths_info(paths=[self._record], expand=True, **at)[0]
            content.pushed_last = found.last_commit.oid == info.sha
        return content

    def commit(self, files: dict[str, Path | bytes], delete: list[str], message: str, parent: str | None) -> CommitInfo:
        """
        Write `files` (by their path in the repository, a file here or its content) and delete others in one commit.
        None is made where nothing changes, or where `parent` is not the last one any more.
        """
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += map(CommitOperationDelete, delete)
        what: Any = {"operations": operations, "commit_message": message, "parent_commit": parent}
        return self.api.create_commit(**self._where, **what)
