"""A small Hub on loopback that speaks the HTTP API well enough for the real ``huggingface_hub``.

Model repos only, held in memory: commits are snapshots (path -> blob) with a sha, branches and tags
point at them. Files are stored as regular blobs or as LFS objects that have to be uploaded and
verified before a commit may name them. A commit is applied whole or not at all. Every request and
the number of body bytes that were sent for it are recorded, and failures can be injected.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
WRITER, READER = "hf_writer", "hf_reader"
LFS_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".pt")
LFS_SIZE = 10 * 2**20
PAGE = 3
TIME = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """One file's content; LFS files are named by sha256, regular ones by git's sha1."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @property
    def git_oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        text = json.dumps(
            [parent, title, len(self.commits), sorted((p, b.git_oid) for p, b in files.items())]
        )
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def history(self, branch: str = "main") -> list[Commit]:
        """Commits of ``branch``, newest first."""
        found, sha = [], self.branches.get(branch)
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorized: bool
    range: str | None
    status: int
    sent_bytes: int


@dataclass
class Failure:
    """Answers requests that match with ``status``, or drops the connection (``status`` None)."""

    method: str
    pattern: str
    status: int | None
    times: int


class Refused(Exception):
    """An error answer, with the headers from which the client makes its exceptions."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer(ThreadingHTTPServer):
    """The Hub's state and its HTTP server; ``endpoint`` is its address."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.honour_ranges = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where redirects to LFS objects lead: another host, as the Hub's storage is."""
        return f"http://localhost:{self.server_port}/lfs"

    def fail(self, method: str, pattern: str, status: int | None = None, times: int = 1) -> None:
        """Make the next ``times`` matching requests fail; ``status`` None drops the connection."""
        self.failures.append(Failure(method, pattern, status, times))

    def take_failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.method == method and re.search(failure.pattern, path) and failure.times:
                    failure.times -= 1
                    return failure
        return None

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **state: bool) -> Repo:
        """Make a repo directly, without requests."""
        repo = self.repos[repo_id] = Repo(**state)
        blobs = {path: Blob(data, is_lfs(path, len(data))) for path, data in (files or {}).items()}
        repo.add("main", "initial commit", blobs)
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repo at a revision."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return {path: blob.content for path, blob in commit.files.items()}

    def sent_bytes(self, pattern: str) -> int:
        """Body bytes sent in answer to GET requests whose path matches ``pattern``."""
        return sum(r.sent_bytes for r in self.requests if re.search(pattern, r.path))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Start a hub on a free port and stop it afterwards."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_online(hub: HubServer, home: Path, script: str, standard_input: str | None = None) -> str:
    """Run a script against this Hub and return what it printed.

    In a process of its own: addresses and offline mode are read when the client is imported.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN": WRITER,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=standard_input,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: requests are recorded instead."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # Requests

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self._read_body()
        failure = self.server.take_failure(method, url.path)
        if failure is not None and failure.status is None:
            self._record(method, 0, 0)
            self.close_connection = True
            self.connection.close()
            return
        try:
            if failure is not None:
                raise Refused(failure.status or 500, None, "injected failure")
            with self.server.lock:
                self._route(method, unquote(url.path), url.path, body)
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self, method: str, path: str, raw_path: str, body: bytes) -> None:
        name = r"(?P<repo>[\w.-]+/[\w.-]+)"
        routes = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("POST", r"/api/repos/create", self._create_repo),
            ("POST", rf"/api/models/{name}/preupload/(?P<rev>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<rev>.+)", self._commit),
            ("POST", rf"/api/models/{name}/branch/(?P<rev>.+)", self._branch),
            ("POST", rf"/api/models/{name}/tag/(?P<rev>.+)", self._tag),
            ("POST", rf"/api/models/{name}/paths-info/(?P<rev>[^/]+)", self._paths_info),
            ("GET", rf"/api/models/{name}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", self._tree),
            ("GET", rf"/api/models/{name}/refs", self._refs),
            ("GET", rf"/api/models/{name}/revision/(?P<rev>.+)", self._info),
            ("GET", rf"/api/models/{name}", self._info),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_put),
            ("POST", r"/lfs/verify", self._lfs_verify),
            ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_get),
            ("HEAD", rf"/{name}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self._resolve),
            ("GET", rf"/{name}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self._resolve),
        )
        for verb, pattern, action in routes:
            # Slashes of a revision come quoted: match before unquoting.
            if verb == method and (match := re.fullmatch(pattern, raw_path)):
                parts = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                action(parts, body)
                return
        raise Refused(404, None, f"no such route: {method} {path}")

    # Who is asking

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return token

    def _need_writer(self) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        if token != WRITER:
            raise Refused(403, None, "Forbidden: you need a token with the write role.")

    def _repo(self, repo_id: str) -> Repo:
        token = self._token()
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            status = 401 if token is None else 404
            raise Refused(status, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, parts: dict[str, str]) -> tuple[Repo, Commit]:
        repo = self._repo(parts["repo"])
        commit = repo.find(parts.get("rev", "main"))
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {parts['rev']}")
        return repo, commit

    # The API

    def _whoami(self, parts: dict[str, str], body: bytes) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        role = "write" if token == WRITER else "read"
        auth = {"accessToken": {"displayName": "tests", "role": role}}
        self._json({"type": "user", "name": "user", "orgs": [], "auth": auth})

    def _validate_yaml(self, parts: dict[str, str], body: bytes) -> None:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        elif "\n---\n" not in content:
            answer = {"errors": [{"message": "the yaml block is not closed"}], "warnings": []}
            self._json(answer, status=400)
        else:
            self._json({"errors": [], "warnings": []})

    def _create_repo(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        wanted = json.loads(body)
        owner = wanted.get("organization") or "user"
        if owner != "user":
            raise Refused(403, None, f"You don't have the rights to create under {owner}")
        repo_id = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            self._json({**answer, "error": "You already created this model repo"}, status=409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.server.add_repo(repo_id, private=private)
        repo.add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors lfs\n", False)})
        self._json(answer)

    def _preupload(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        _, commit = self._at(parts)
        answer = []
        for file in json.loads(body)["files"]:
            here = commit.files.get(file["path"])
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = here.etag if here is not None else None
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answer})

    def _lfs_batch(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        self._repo(parts["repo"])
        answer = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                base = f"{self.server.endpoint}/lfs"
                entry["actions"] = {
                    "upload": {"href": f"{base}/{item['oid']}", "header": {}},
                    "verify": {"href": f"{base}/verify", "header": {}},
                }
            answer.append(entry)
        self._json({"transfer": "basic", "objects": answer})

    def _lfs_put(self, parts: dict[str, str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != parts["oid"]:
            raise Refused(400, None, "the bytes do not have the announced sha256")
        self.server.objects[parts["oid"]] = body
        self._send(200, b"", {"ETag": f'"{parts["oid"]}"'})

    def _lfs_verify(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        wanted = json.loads(body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, None, "the object was not uploaded, or has another size")
        self._json({})

    def _lfs_get(self, parts: dict[str, str], body: bytes) -> None:
        if "Authorization" in self.headers:
            # Storage links are signed; a token that arrives here has leaked.
            raise Refused(400, None, "Only one auth mechanism allowed")
        content = self.server.objects.get(parts["oid"])
        if content is None:
            found = [
                blob.content
                for repo in self.server.repos.values()
                for commit in repo.commits.values()
                for blob in commit.files.values()
                if blob.lfs and blob.sha256 == parts["oid"]
            ]
            if not found:
                raise Refused(404, None, "no such object")
            content = found[0]
        self._send_content(content, {"ETag": f'"{parts["oid"]}"'})

    def _commit(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        repo, head = self._at(parts)
        if parts["rev"] not in repo.branches:
            raise Refused(400, None, f"{parts['rev']} is not a branch")
        files, title = dict(head.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if not head.sha.startswith(value.get("parentCommit") or head.sha):
                    raise Refused(412, None, "A commit has happened since. Please refresh.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, None, f"LFS object of {value['path']} was never uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[value["path"]]
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {p: b for p, b in files.items() if not p.startswith(prefix)}
            else:
                raise Refused(400, None, f"unknown operation {key}")
        commit = repo.add(parts["rev"], title, files)
        url = f"{self.server.endpoint}/{parts['repo']}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _branch(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        repo = self._repo(parts["repo"])
        if parts["rev"] in repo.branches:
            raise Refused(409, None, "Reference already exists")
        start = repo.find(json.loads(body or b"{}").get("startingPoint") or "main")
        if start is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        repo.branches[parts["rev"]] = start.sha
        self._json({})

    def _tag(self, parts: dict[str, str], body: bytes) -> None:
        self._need_writer()
        repo, commit = self._at(parts)
        repo.tags[json.loads(body)["tag"]] = commit.sha
        self._json({})

    def _refs(self, parts: dict[str, str], body: bytes) -> None:
        repo = self._repo(parts["repo"])

        def entries(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
                for name, sha in refs.items()
            ]

        self._json(
            {
                "branches": entries("heads", repo.branches),
                "tags": entries("tags", repo.tags),
                "converts": [],
            }
        )

    def _info(self, parts: dict[str, str], body: bytes) -> None:
        repo, commit = self._at(parts)
        siblings: list[dict[str, object]] = []
        for path, blob in sorted(commit.files.items()):
            sibling: dict[str, object] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": len(blob.content), "blobId": blob.git_oid}
                if blob.lfs:
                    sibling["lfs"] = self._lfs_entry(blob, "sha256")
            siblings.append(sibling)
        self._json(
            {
                "id": parts["repo"],
                "modelId": parts["repo"],
                "author": parts["repo"].split("/")[0],
                "sha": commit.sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "lastModified": TIME,
                "createdAt": TIME,
                "tags": [],
                "siblings": siblings,
            }
        )

    @staticmethod
    def _lfs_entry(blob: Blob, key: str) -> dict[str, object]:
        return {key: blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}

    def _tree_entry(self, path: str, blob: Blob) -> dict[str, object]:
        entry: dict[str, object] = {
            "type": "file",
            "path": path,
            "size": len(blob.content),
            "oid": blob.git_oid,
        }
        if blob.lfs:
            entry["lfs"] = self._lfs_entry(blob, "oid")
        return entry

    def _tree(self, parts: dict[str, str], body: bytes) -> None:
        _, commit = self._at(parts)
        prefix = parts["path"] + "/" if "path" in parts else ""
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            folders = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(folders) + 1 if recursive else min(len(folders), 1) + 1):
                folder = prefix + "/".join(folders[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or not folders:
                entries[path] = self._tree_entry(path, blob)
        if prefix and not entries:
            raise Refused(404, "EntryNotFound", f"{parts['path']} does not exist")
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            query = f"recursive={recursive}&cursor={start + PAGE}"
            url = f"{self.server.endpoint}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(list(entries.values())[start : start + PAGE], headers=headers)

    def _paths_info(self, parts: dict[str, str], body: bytes) -> None:
        _, commit = self._at(parts)
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = [self._tree_entry(p, commit.files[p]) for p in paths if p in commit.files]
        self._json(found)

    def _resolve(self, parts: dict[str, str], body: bytes) -> None:
        repo, commit = self._at(parts)
        if repo.gated and self._token() != WRITER:
            raise Refused(403, "GatedRepo", f"Access to model {parts['repo']} is restricted.")
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(parts["path"])
        if blob is None:
            message = json.dumps({"error": "Entry not found"}).encode()
            self._send(404, message, {**headers, "X-Error-Code": "EntryNotFound"})
        elif blob.lfs:
            headers |= {
                "Location": f"{self.server.storage}/{blob.sha256}",
                "X-Linked-Size": str(len(blob.content)),
                "X-Linked-ETag": f'"{blob.etag}"',
            }
            self._send(302, b"", headers)
        else:
            self._send_content(blob.content, {**headers, "ETag": f'"{blob.etag}"'})

    # Answers

    def _json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(value).encode(), kind | (headers or {}))

    def _send_content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not self.server.honour_ranges:
            self._send(200, content, {**headers, "Accept-Ranges": "bytes"})
            return
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        if first >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        last = min(last, len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], {**headers, **span})

    def _record(self, method: str, status: int, sent_bytes: int) -> None:
        self.server.requests.append(
            Request(
                method=method,
                path=unquote(urlsplit(self.path).path),
                authorized="Authorization" in self.headers,
                range=self.headers.get("Range"),
                status=status,
                sent_bytes=sent_bytes,
            )
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._record(self.command, status, 0 if self.command == "HEAD" else len(body))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
