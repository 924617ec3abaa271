"""One artifact at places of every kind, each behind a real server on loopback."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from compressor.artifact.reader import read_artifact, read_digest
from server.errors import Forbidden, ServeError, SourceNotFound, SourceUnreachable
from server.fleet.fetch import fetch_delta, read_sums
from server.fleet.files import PlaceFiles
from server.fleet.folder import ManagedFolder
from server.fleet.place import Allowed
from tests.compressor.artifacts import write_artifact
from tests.hub import serving


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "one"
    write_artifact(path)
    return path


class Handler(SimpleHTTPRequestHandler):
    """Without ranges; `/away/...` leads elsewhere, `/broken/...` fails."""

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def _answer(self, usual: Callable[[], None]) -> None:
        if self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/away/", "/one/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/broken/"):
            self.send_error(503)
        else:
            usual()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def web(artifact: Path) -> Iterator[str]:
    handler = partial(Handler, directory=str(artifact.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def s3(artifact: Path) -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for file in artifact.iterdir():
            client.upload_file(str(file), "bucket", f"deltas/one/{file.name}")
        yield "s3://bucket/deltas"
        server.stop()


@pytest.fixture(scope="module")
def hub(artifact: Path) -> Iterator[str]:
    with serving() as made, pytest.MonkeyPatch.context() as patch:
        made.add("org/one", artifact, "v1")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield "hf://org"


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    root: str = request.getfixturevalue(request.param)
    return root


def fetched(source: str, prefix: str, tmp_path: Path, **more: Any) -> Path:
    allowed = Allowed((prefix,))
    files = PlaceFiles(allowed.place(source, **more), allowed)
    raw = read_sums(files)
    assert raw is not None
    tmp_path.mkdir(exist_ok=True)
    return fetch_delta(files, raw, "a", ManagedFolder(tmp_path, 1 << 20), 1 << 20)


@pytest.mark.parametrize("place", ["web", "s3", "hub"], indirect=True)
def test_artifact_comes_whole_and_goes_on_where_it_was_cut_off(
    place: str, artifact: Path, tmp_path: Path
) -> None:
    more = {"revision": "v1"} if place.startswith("hf:") else {}
    staged = fetched(f"{place}/one", place, tmp_path / "state", **more)
    assert read_digest(staged) == read_digest(artifact)
    read_artifact(staged)
    tensors = staged / "delta.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    read_artifact(fetched(f"{place}/one", place, tmp_path / "state", **more))


@pytest.mark.parametrize("place", ["web", "s3", "hub"], indirect=True)
def test_nothing_there_is_told_from_no_answer(place: str, tmp_path: Path) -> None:
    allowed = Allowed((place,))
    try:
        found = read_sums(PlaceFiles(allowed.place(f"{place}/none"), allowed))
    except SourceNotFound:  # of the Hub, a repository that there is not
        found = None
    assert found is None
    if place.startswith("http"):
        with pytest.raises(SourceUnreachable):
            read_sums(PlaceFiles(allowed.place(f"{place}/broken"), allowed))


def test_redirect_leads_nowhere(web: str) -> None:
    allowed = Allowed((web,))
    with pytest.raises(Forbidden, match="redirects"):
        read_sums(PlaceFiles(allowed.place(f"{web}/away"), allowed))


def test_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    allowed = Allowed(("gs://bucket",))
    with pytest.raises(ServeError, match=r"impart-serve\[gcs\]"):
        PlaceFiles(allowed.place("gs://bucket/x"), allowed)
