"""A Hub of a few local folders: the routes of huggingface.co that a download and a commit need, on
loopback.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves `repos`: (repository, revision) -> folder. `downloads` are the files asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.downloads: list[str] = []
        self.root: Path | None = None  # where repositories that are made lie; None: none may be
        self.objects: dict[str, bytes] = {}  # of LFS, by their sha256
        self.commits: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, folder: Path, *revisions: str) -> str:
        """Publish a folder under its commit and under `revisions` (default: main)."""
        commit = hashlib.sha1(f"{repo} {folder}".encode()).hexdigest()
        for revision in (commit, *(revisions or ("main",))):
            self.repos[repo, revision] = folder
        return commit

    def commit(self, repo: str, revision: str) -> str:
        folder = self.repos[repo, revision]
        return hashlib.sha1(f"{repo} {folder}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.server.root is None:
            self._refuse(403, "Forbidden", True)
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._lfs(json.loads(body))
        elif "/preupload/" in path:
            self._json({"files": [_mode(file) for file in json.loads(body)["files"]]})
        elif "/commit/" in path:
            repo, _, revision = path.removeprefix("api/models/").partition("/commit/")
            self._commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "EntryNotFound", True)

    def do_PUT(self) -> None:
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[self.path.rpartition("/")[2]] = body
        self._send(200, b"", True, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, asked: dict[str, str]) -> None:
        hub, repo = self.server, f"{asked['organization']}/{asked['name']}"
        status = 409 if any(known == repo for known, _ in hub.repos) else 200
        if status == 200:
            assert hub.root is not None
            folder = hub.root / repo.replace("/", "--")
            folder.mkdir()
            hub.add(repo, folder)
        self._json({"url": f"{hub.url}/{repo}", "name": repo}, status)

    def _lfs(self, asked: dict[str, list[dict[str, object]]]) -> None:
        def offer(item: dict[str, object]) -> dict[str, object]:
            href = f"{self.server.url}/lfs/{item['oid']}"
            return item | {"actions": {"upload": {"href": href}}}

        self._json({"transfer": "basic", "objects": [offer(item) for item in asked["objects"]]})

    def _commit(self, repo: str, revision: str, lines: list[dict[str, dict[str, str]]]) -> None:
        hub = self.server
        folder = hub.repos[repo, revision]
        for line in lines:
            value, kind = line["value"], str(line["key"])
            if kind == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                (folder / value["path"]).write_bytes(hub.objects[value["oid"]])
            elif kind == "deletedFile":
                (folder / value["path"]).unlink()
        hub.commits.append(repo)
        oid = hub.commit(repo, revision)
        self._json({"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), True, {"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"), with_body)
        elif "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._file(repo, revision, name, with_body)
        else:
            self._refuse(404, "EntryNotFound", with_body)

    def _api(self, path: str, with_body: bool) -> None:
        for route in ("/revision/", "/tree/"):
            repo, found, revision = path.partition(route)
            if found:
                break
        if not self._known(repo, revision, with_body):
            return
        hub = self.server
        folder = hub.repos[repo, revision]
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        if route == "/tree/":
            body: object = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
        else:
            siblings = [{"rfilename": name} for name in names]
            body = {"id": repo, "sha": hub.commit(repo, revision), "siblings": siblings}
        self._send(200, json.dumps(body).encode(), with_body, {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str, with_body: bool) -> None:
        if not self._known(repo, revision, with_body):
            return
        file = self.server.repos[repo, revision] / name
        if not file.is_file():
            self._refuse(404, "EntryNotFound", with_body)
            return
        if with_body:
            self.server.downloads.append(f"{repo}/{name}")
        body, status = file.read_bytes(), 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            body, status = body[int(asked[1]) : int(asked[2]) + 1], 206
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": self.server.commit(repo, revision)}
        self._send(status, body, with_body, headers)

    def _known(self, repo: str, revision: str, with_body: bool) -> bool:
        hub = self.server
        if repo in hub.gated:
            self._refuse(403, "GatedRepo", with_body)
        elif not any(known == repo for known, _ in hub.repos):
            self._refuse(401, "RepoNotFound", with_body)
        elif (repo, revision) not in hub.repos:
            self._refuse(404, "RevisionNotFound", with_body)
        else:
            return True
        return False

    def _refuse(self, status: int, code: str, with_body: bool) -> None:
        self._send(status, b"{}", with_body, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _mode(file: dict[str, object]) -> dict[str, object]:
    is_large = str(file["path"]).endswith(".safetensors")
    mode = "lfs" if is_large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Run a fake Hub on a free port."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
