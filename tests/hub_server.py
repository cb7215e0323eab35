# SPDX-License-Identifier: Apache-2.0
"""
The part of the Hugging Face Hub's API that `huggingface_hub` uses to push and to load, over HTTP on this machine.

Accounts, repositories of every type with branches and commits, preupload, Git LFS (in one part), commits in ndjson, and
downloads with the Hub's headers and redirects. Xet storage is not spoken: with `HF_HUB_DISABLE_XET=1`
`huggingface_hub` uses Git LFS. Everything is kept in memory.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_writes", "hf_reads", "hf_other"
ACCOUNTS = {
    TOKEN: {"name": "me", "orgs": ["lab"], "role": "write"},
    READ_TOKEN: {"name": "me", "orgs": ["lab"], "role": "read"},
    OTHER_TOKEN: {"name": "other", "orgs": [], "role": "write"},
}
LFS_PATTERNS = ("*.7z", "*.bin", "*.ckpt", "*.npz", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*tfevents*")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LARGE = 10 * 2**20


@dataclass(frozen=True)
class File:
    """
    Args:
        data: its content.
        lfs: whether the repository holds a pointer, and the content lies in large file storage.
    """

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def blob(self) -> str:
        """The oid in git: of the content, or of the pointer to it."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass
class Commit:
    oid: str
    parent: "Commit | None"
    title: str
    files: dict[str, File]

    def last(self, path: str) -> "Commit":
        """The last commit that changed a file."""
        commit = self
        while commit.parent is not None and commit.parent.files.get(path) == self.files[path]:
            commit = commit.parent
        return commit


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, File], branch: str = "main") -> Commit:
        commit = Commit(uuid.uuid4().hex + uuid.uuid4().hex[:8], self.branches.get(branch), title, files)
        self.branches[branch] = self.commits[commit.oid] = commit
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds, without what the Hub itself puts there."""
        found = self.branches[branch].files
        return {path: file.data for path, file in found.items() if path != ".gitattributes"}

    def titles(self, branch: str = "main") -> list[str]:
        """Of the commits, the oldest first."""
        titles, commit = [], self.branches[branch]
        while commit is not None:
            titles.append(commit.title)
            commit = commit.parent
        return titles[::-1]


@dataclass
class Failure:
    """
    Args:
        request: a regular expression for `METHOD /path`.
        status: what is answered, or `drop` (the connection breaks after a part of the request), or `lost` (the request
            is carried out, and the connection breaks before the answer).
        times: how often.
        message: of the answer.
    """

    request: str
    status: int | str
    times: int
    message: str


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**(headers or {}), **({"X-Error-Code": code} if code else {}), "X-Error-Message": message}


class Dropped(Exception):
    """The connection is to break here."""


class HubServer:
    """The server, while this context is open."""

    def __init__(self, port: int = 0):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.failures: list[Failure] = []
        # Held by a test, it stops what writes to the Hub.
        self.gate = threading.Lock()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage_endpoint(self) -> str:
        """Another host, as the Hub's storage is: clients neither follow there for metadata nor send their token."""
        return f"http://localhost:{self.server.server_port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What leads a program here."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return settings | ({"HF_TOKEN": token} if token else {})

    def add(self, name: str, files: dict[str, bytes] | None = None, kind: str = "model", private: bool = False):
        """A repository, with a first commit of the Hub's and one of these files."""
        repository = Repository(kind, name, private)
        first = repository.commit("initial commit", {".gitattributes": File(GITATTRIBUTES, False)})
        if files:
            content = {path: File(data, self.is_large(path, data)) for path, data in files.items()}
            self.storage |= {file.sha256: file.data for file in content.values() if file.lfs}
            repository.commit("Somebody's", first.files | content)
        self.repositories[kind, name] = repository
        return repository

    def change(self, name: str, changes: dict[str, bytes | None], kind: str = "model", branch: str = "main") -> None:
        """A commit of somebody else's: new contents, or `None` for a deleted file."""
        repository = self.repositories[kind, name]
        files = dict(repository.branches[branch].files)
        for path, data in changes.items():
            files.pop(path, None)
            if data is not None:
                files[path] = File(data, self.is_large(path, data))
        repository.commit("Somebody else's", files, branch)

    def fail(self, request: str, status: int | str, times: int = 1, message: str = "told so") -> None:
        """Let the next requests that match fail; `times` of 0 ends it."""
        self.failures = [failure for failure in self.failures if failure.request != request]
        if times:
            self.failures.append(Failure(request, status, times, message))

    def is_large(self, path: str, sample: bytes, size: int | None = None) -> bool:
        name = path.rpartition("/")[2]
        patterns = [re.escape(pattern).replace(r"\*", ".*") for pattern in LFS_PATTERNS]
        matches = any(re.fullmatch(pattern, name) for pattern in patterns)
        return matches or (len(sample) if size is None else size) > LARGE or b"\0" in sample

    def count(self, request: str) -> int:
        """How many requests matched a regular expression."""
        return sum(bool(re.search(request, line)) for line in self.requests)


_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
# Method, path, and the method of `Handler` that answers. `repo` is a type's plural and a name, `revision` is quoted.
_API, _REVISION = r"/api/(?P<types>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_PLAIN = r"/(?:(?P<types>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/{_REVISION}", "info"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{_API}/commits/{_REVISION}", "commits"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("POST", rf"{_API}/branch/(?P<branch>.+)", "branch"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("POST", rf"{_PLAIN}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/lfs-verify/(?P<oid>\w+)", "lfs_verify"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("GET", r"/lfs/(?P<oid>\w+)", "lfs_get"),
    ("GET", rf"{_PLAIN}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("GET", rf"/api/resolve-cache/(?P<types>\w+)/(?P<name>[^/]+/[^/]+)/{_REVISION}/(?P<path>.+)", "resolve_cache"),
]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        line = f"{self.command} {url.path}"
        try:
            failure = self.log(line)
            if failure is not None and failure.status == "drop":
                self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
                raise Dropped
            self.body = self.read()
            if failure is not None and failure.status != "lost":
                raise Refused(failure.status, failure.message)
            self.route(url.path)
            if failure is not None:
                raise Dropped
            status, headers, content = self.reply
        except Refused as refused:
            status, headers, content = refused.status, refused.headers, json.dumps({"error": refused.message}).encode()
            headers["Content-Type"] = "application/json"
        except Dropped:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log(self, line: str) -> Failure | None:
        with self.hub.lock:
            self.hub.requests.append(line)
            for failure in self.hub.failures:
                if failure.times and re.search(failure.request, line):
                    failure.times -= 1
                    return failure
        return None

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = io.BytesIO()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body.write(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return body.getvalue()

    def route(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path) if verb == method else None
            if match:
                found = {key: value for key, value in match.groupdict().items() if value is not None}
                if "name" in found:
                    kind = _TYPES[found.pop("types", "models")]
                    found["repository"] = self.repository(kind, unquote(found.pop("name")))
                if "revision" in found:
                    found["commit_"] = self.revision(found["repository"], unquote(found.pop("revision")))
                if method in ("POST", "PUT") and name not in ("whoami", "validate_yaml", "paths_info"):
                    with self.hub.gate:
                        pass
                with self.hub.lock:
                    getattr(self, name)(**found)
                return
        raise Refused(404, f"This server does not know {self.command} {path}")

    def json(self, content, status: int = 200, headers: dict | None = None) -> None:
        self.reply = (status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())

    # Who asks, and for what.

    def account(self) -> dict | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        self.hub.authorizations.add(authorization)
        account = ACCOUNTS.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    def may_write(self, namespace: str) -> None:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in (account["name"], *account["orgs"]):
            raise Refused(403, f"You don't have the rights to write to the namespace {namespace}")
        if account["role"] != "write":
            raise Refused(403, "Your token has not the permission to write")

    def repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name.removesuffix(".git")))
        account = self.account()
        if found is not None and found.private:
            namespace = name.split("/")[0]
            if account is None or namespace not in (account["name"], *account["orgs"]):
                found = None
        if found is None:
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        return found

    def revision(self, repository: Repository, revision: str) -> Commit:
        found = repository.branches.get(revision) or repository.commits.get(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # The API.

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        token = {"role": account["role"], "displayName": "test"}
        orgs = [{"name": name, "roleInOrg": "write"} for name in account["orgs"]]
        auth = {"type": "access_token", "accessToken": token}
        self.json({"type": "user", "id": "1", "name": account["name"], "orgs": orgs, "auth": auth})

    def validate_yaml(self) -> None:
        errors = []
        try:
            metadata = front_matter(json.loads(self.body)["content"])
            if not isinstance(metadata, dict):
                errors.append("the metadata is no mapping")
            else:
                errors += check_metadata(metadata)
        except yaml.YAMLError as error:
            errors.append(str(error))
        errors = [{"message": message} for message in errors]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        asked = json.loads(self.body)
        account = self.account() or {"name": "?"}
        namespace = asked.get("organization") or account["name"]
        kind, name = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name if kind == 'model' else f'{kind}s/{name}'}"
        self.may_write(namespace)
        if (kind, name) in self.hub.repositories:
            self.json({"error": f"You already created this {kind} repo", "url": url}, 409)
            return
        if kind == "space" and not asked.get("sdk"):
            raise Refused(400, "A Space needs an SDK")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, kind=kind, private=private)
        self.json({"url": url, "name": name, "id": name})

    def info(self, repository: Repository, commit_: Commit | None = None) -> None:
        commit = commit_ or repository.branches["main"]
        siblings = []
        for path, file in sorted(commit.files.items()):
            entry = {"rfilename": path}
            if self.query.get("blobs"):
                entry |= {"size": len(file.data), "blobId": file.blob}
                if file.lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            siblings.append(entry)
        card = commit.files.get("README.md")
        metadata = (front_matter(card.data.decode()) if card else None) or {}
        content = {
            "_id": "1",
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": siblings,
            "tags": metadata.get("tags", []),
            "cardData": metadata,
            **{key: metadata[key] for key in ("pipeline_tag", "library_name", "model-index") if key in metadata},
        }
        self.json(content)

    def refs(self, repository: Repository) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
            for name, commit in repository.branches.items()
        ]
        self.json({"branches": branches, "tags": [], "converts": []})

    def entry(self, commit: Commit, path: str, expand: bool) -> dict:
        file = commit.files[path]
        entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
        if expand:
            last = commit.last(path)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": "2026-01-01T00:00:00.000Z"}
        return entry

    def tree(self, repository: Repository, commit_: Commit, path: str = "") -> None:
        prefix = f"{unquote(path)}/" if path else ""
        inside = [name for name in sorted(commit_.files) if name.startswith(prefix)]
        if prefix and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        folders = sorted({name[: name.index("/", len(prefix))] for name in inside if "/" in name[len(prefix) :]})
        expand = self.query.get("expand", "false").lower() in ("true", "1")
        if self.query.get("recursive", "false").lower() not in ("true", "1"):
            inside = [name for name in inside if "/" not in name[len(prefix) :]]
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        self.json(entries + [self.entry(commit_, name, expand) for name in inside])

    def paths_info(self, repository: Repository, commit_: Commit) -> None:
        asked = parse_qs(self.body.decode())
        expand = asked.get("expand", ["false"])[0].lower() == "true"
        self.json([self.entry(commit_, path, expand) for path in asked["paths"] if path in commit_.files])

    def commits(self, repository: Repository, commit_: Commit) -> None:
        found, commit = [], commit_
        while commit is not None:
            date = "2026-01-01T00:00:00.000Z"
            found.append({"id": commit.oid, "title": commit.title, "message": "", "date": date, "authors": []})
            commit = commit.parent
        self.json(found)

    def branch(self, repository: Repository, branch: str) -> None:
        self.may_write(repository.name.split("/")[0])
        if unquote(branch) in repository.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[unquote(branch)] = self.revision(repository, start)
        self.json({})

    def preupload(self, repository: Repository, commit_: Commit) -> None:
        self.may_write(repository.name.split("/")[0])
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = self.hub.is_large(path, base64.b64decode(asked["sample"]), asked["size"])
            there = commit_.files.get(path)
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            files.append(entry | ({"oid": there.etag} if there is not None else {}))
        self.json({"files": files, "commitOid": commit_.oid})

    def commit(self, repository: Repository, commit_: Commit) -> None:
        self.may_write(repository.name.split("/")[0])
        assert self.headers["Content-Type"] == "application/x-ndjson"
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        branch = next((name for name, head in repository.branches.items() if head is commit_), None)
        branch = unquote(urlsplit(self.path).path.rpartition("/")[2]) if branch is not None else None
        if branch not in repository.branches:
            raise Refused(400, "Commits go to a branch")
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != commit_.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(commit_.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refused(400, f"The large file {value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.storage[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:
                raise Refused(400, f"This server does not know the operation {operation['key']}")
        made = repository.commit(header["value"]["summary"], files, branch)
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{repository.name}/commit/{made.oid}"
        self.json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    # Large file storage.

    def lfs_batch(self, repository: Repository) -> None:
        self.may_write(repository.name.split("/")[0])
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size, where = item["oid"], item["size"], self.hub.storage_endpoint
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.storage:
                verify = {"href": f"{self.hub.endpoint}/lfs-verify/{oid}"}
                answer["actions"] = {"upload": {"href": f"{where}/lfs/{oid}"}, "verify": verify}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "The token does not belong to the storage")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not what its oid says")
        self.hub.storage[oid] = self.body
        self.json({})

    def lfs_verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.storage.get(oid, b"")) != asked["size"]:
            raise Refused(404, "The file was not uploaded")
        self.json({})

    def lfs_get(self, oid: str) -> None:
        self.reply = (200, {"ETag": f'"{oid}"'}, self.hub.storage[oid])

    # Downloads.

    def resolve(self, repository: Repository, commit_: Commit, path: str) -> None:
        file, headers = self.file(commit_, path)
        if file.lfs:
            headers |= {"X-Linked-Size": len(file.data), "X-Linked-Etag": f'"{file.sha256}"'}
            self.reply = (302, {**headers, "Location": f"{self.hub.storage_endpoint}/lfs/{file.sha256}"}, b"")
        else:
            cached = f"/api/resolve-cache/{repository.kind}s/{repository.name}/{commit_.oid}/{path}"
            self.reply = (307, {**headers, "Location": cached}, b"")

    def resolve_cache(self, repository: Repository, commit_: Commit, path: str) -> None:
        file, headers = self.file(commit_, path)
        self.reply = (200, {**headers, "ETag": f'"{file.etag}"'}, file.data)

    def file(self, commit: Commit, path: str) -> tuple[File, dict[str, str]]:
        headers = {"X-Repo-Commit": commit.oid}
        found = commit.files.get(unquote(path))
        if found is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        return found, headers


def front_matter(card: str) -> dict | None:
    """The metadata of a model card."""
    match = re.match(r"---\n(.*?)\n---", card, re.S)
    return yaml.safe_load(match[1]) if match else None


def check_metadata(metadata: dict) -> Iterator[str]:
    """What the Hub asks of a card's metadata, where it concerns us."""
    for entry in metadata.get("model-index", []):
        if not isinstance(entry.get("name"), str):
            yield '"model-index[0].name" is required'
        for result in entry.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                yield '"results.task.type" is required'
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                yield '"results.dataset.type" and "name" are required'
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    yield '"results.metrics.type" and "value" are required'
    for name in metadata.get("datasets", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            yield f'"datasets" holds {name}, which is no id'
    base = metadata.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        yield f'"base_model" is {base}, which is no id'
