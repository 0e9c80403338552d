"""A Hub on the loopback: as much of the Hub's HTTP as the real client needs to push and to pull a model.

Repositories live in memory, one list of commits each. Speaks only what the client asks.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Commit:
    """A state of a repository: file contents by path."""

    files: dict[str, bytes]

    @property
    def oid(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Repository:
    """A model on the Hub; ``commits`` from the first to the newest."""

    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit({".gitattributes": b""})])


class LoopbackHub:
    """Context manager that serves; ``url`` is its address.

    Attributes:
        tokens: token to ``"read"`` or ``"write"``.
        repositories: ``org/name`` to :class:`Repository`.
        requests: ``METHOD path`` of each request so far.
        drop: path fragment to how many requests with it are still to be cut off without an answer.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drop: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Requests,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Files of a repository's newest commit."""
        return self.repositories[repo_id].commits[-1].files


class _Requests(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        for part, left in self.hub.drop.items():
            if part in path and left:
                self.hub.drop[part] = left - 1
                self.close_connection = True
                return
        if self.command == "PUT":
            return self._store(path, body)
        data = json.loads(body) if body and "ndjson" not in self.headers.get("Content-Type", "") else {}
        writes = ("/api/repos/create", "/info/lfs/objects/batch", "/preupload/main", "/commit/main")
        if path.endswith(writes) and self._rights() != "write":
            status = 401 if self._rights() is None else 403
            return self._refuse(status, None, {401: "Invalid credentials", 403: "You have read access only"}[status])
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(data)
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(data)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self._rights() is None):
            return self._refuse(401 if self._rights() is None else 404, "RepoNotFound", "Repository not found")
        if rest[:1] == ["preupload"]:
            return self._preupload(repository, data)
        if rest[:1] == ["commit"]:
            return self._commit(repository, repo_id, body)
        return self._read(repository, repo_id, rest)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _rights(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _create(self, data: dict) -> None:
        repo_id = f"{data['organization']}/{data['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(data.get("private")) or data.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private)
        return self._json(answer)

    def _preupload(self, repository: Repository, data: dict) -> None:
        files = repository.commits[-1].files
        answers = []
        for path in (file["path"] for file in data["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            known = {"oid": _oid(path, files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return self._json({"files": answers})

    def _batch(self, data: dict) -> None:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in data["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        return self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _store(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, None, "content does not match its oid")
        self.hub.large[oid] = body
        return self._json({})

    def _commit(self, repository: Repository, repo_id: str, body: bytes) -> None:
        files = dict(repository.commits[-1].files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(Commit(files))
        oid = repository.commits[-1].oid
        return self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def _read(self, repository: Repository, repo_id: str, rest: list[str]) -> None:
        kind, revision, name = (*rest[:2], "/".join(rest[2:])) if len(rest) > 1 else ("", "main", "")
        newest = repository.commits[-1]
        commit = newest if revision == "main" else next((c for c in repository.commits if c.oid == revision), None)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"no revision {revision}")
        if kind == "tree":
            return self._json([_entry(path, content) for path, content in sorted(commit.files.items())])
        if kind == "resolve":
            if name not in commit.files:
                return self._refuse(404, "EntryNotFound", f"no file {name}", {"X-Repo-Commit": commit.oid})
            content = commit.files[name]
            headers = {"ETag": f'"{_oid(name, content)}"', "X-Repo-Commit": commit.oid}
            return self._send(200, content, "application/octet-stream", headers)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private}
        return self._json({**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _json(self, data: object, status: int = 200, kind: str = "application/json") -> None:
        self._send(status, json.dumps(data).encode(), kind)

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    oid = _oid(path, content)
    large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 100}} if path.endswith(".safetensors") else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}


def _oid(path: str, content: bytes) -> str:
    """What the Hub calls a file's content by: git's hash, of a large one SHA-256."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
