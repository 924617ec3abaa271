"""Variants come and go over HTTP while a real engine serves."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from compressor.artifact.reader import read_digest
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from server.api.app import create_app
from server.engine.llm_engine import LLMEngine
from server.fleet.store import FleetStore
from server.settings import Settings
from tests.compressor.artifacts import edit_config
from tests.server.api.conftest import serve
from tests.server.helpers import FIELDS


@dataclass(frozen=True)
class Fleet:
    """A server, the folder it may take variants from, and its own."""

    http: httpx.Client
    sources: Path
    managed: Path

    def post(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/deltas", json=body)

    def entry(self, name: str) -> dict[str, object] | None:
        listed = self.http.get("/v1/deltas").json()["data"]
        return next((entry for entry in listed if entry["id"] == name), None)

    def complete(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "The", "max_tokens": 4, "temperature": 0}
        return self.http.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("fleet")
    compress(tiny_llama, tiny_llama_ft, root / "deltas" / "own", Options("blockdiag", ratio=9))
    (root / "sources").mkdir()
    shutil.copytree(root / "deltas" / "own", root / "sources" / "first")
    second = shutil.copytree(root / "deltas" / "own", root / "sources" / "second")
    edit_config(second, lambda record: record.update(created_by="second"))
    settings = Settings(
        base=tiny_llama,
        deltas=root / "deltas",
        state_dir=root / "state",
        allow_sources=(str(root / "sources"),),
        max_artifact_bytes=4 << 20,
        **FIELDS,
    )
    engine = LLMEngine.from_settings(settings)
    with serve(engine, settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield Fleet(http, root / "sources", root / "state" / "deltas")


def packed(folder: Path, *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def test_posted_variant_is_served_and_is_the_same_when_posted_again(fleet: Fleet) -> None:
    made = fleet.post(name="one", source=str(fleet.sources / "first"))
    assert made.status_code == 201, made.text
    assert made.json()["digest"] == read_digest(fleet.sources / "first")
    assert fleet.complete("one").json()["choices"] == fleet.complete("own").json()["choices"]
    again = fleet.post(name="one", source=str(fleet.sources / "first"))
    assert (again.status_code, again.json()["digest"]) == (200, made.json()["digest"])
    assert [path.name for path in fleet.managed.iterdir()] == ["one"]

    other = fleet.post(name="one", source=str(fleet.sources / "second"))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert fleet.entry("one")["digest"] == made.json()["digest"]
    replaced = fleet.post(name="one", source=str(fleet.sources / "second"), replace=True)
    assert replaced.status_code == 201
    assert fleet.entry("one")["digest"] == read_digest(fleet.sources / "second")

    assert fleet.http.post("/v1/deltas/one/pin").json()["pinned_by_admin"] is True
    assert fleet.http.delete("/v1/deltas/one").json()["deleted"] is True
    assert fleet.complete("one").status_code == 404
    assert fleet.http.delete("/v1/deltas/one").status_code == 404
    anew = fleet.post(name="one", source=str(fleet.sources / "first"))
    assert (anew.status_code, anew.json()["pinned"]) == (201, False)
    assert fleet.http.delete("/v1/deltas/one").status_code == 200


def test_request_that_runs_ends_on_what_was_deleted(fleet: Fleet) -> None:
    fleet.post(name="brief", source=str(fleet.sources / "first"))
    body = {"model": "brief", "prompt": "The", "max_tokens": 200, "ignore_eos": True}
    lines = []
    with fleet.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if not lines:
                deleted = httpx.delete(f"{fleet.http.base_url}/v1/deltas/brief", timeout=60)
                assert deleted.status_code == 200
            lines.append(line)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert fleet.complete("brief").status_code == 404


@pytest.mark.parametrize(
    ("name", "source", "status", "code"),
    [
        ("x", "/etc", 403, "insufficient_permissions"),
        ("x", "{sources}/../outside", 400, None),
        ("x", "https://example.com/x", 403, "insufficient_permissions"),
        ("x", "{sources}/none", 404, "source_not_found"),
        ("base", "{sources}/first", 409, "conflict"),
        ("own", "{sources}/first", 409, "conflict"),
        ("no/name", "{sources}/first", 409, "conflict"),
        ("x", "{sources}/damaged", 422, "artifact_refused"),
        ("x", "{sources}/other-base", 422, "artifact_refused"),
        ("x", "{sources}/linked", 403, "insufficient_permissions"),
    ],
)
def test_what_cannot_be_registered_says_why(
    fleet: Fleet, name: str, source: str, status: int, code: str | None
) -> None:
    sources = fleet.sources
    for folder in ("damaged", "other-base", "linked"):
        shutil.copytree(sources / "first", sources / folder, dirs_exist_ok=True)
    tensors = sources / "damaged" / "delta.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    edit_config(sources / "other-base", lambda r: r["base"].update(identity="cd" * 32))
    link = sources / "linked" / "SHA256SUMS"
    link.unlink()
    os.symlink("/etc/passwd", link)

    answer = fleet.post(name=name, source=source.format(sources=sources))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert "/etc/passwd" not in answer.text
    is_begun = code in ("source_not_found", "artifact_refused") or source.endswith("/linked")
    entry = fleet.entry("x")
    assert (entry is not None) == is_begun
    if entry is not None:
        assert (entry["state"], bool(entry["error"])) == ("failed", True)
        assert fleet.complete("x").status_code == 424
        assert fleet.http.delete("/v1/deltas/x").status_code == 200
    assert fleet.entry("x") is None
    assert not (fleet.managed / "x").exists()


def test_uploaded_tar_replaces_what_had_the_name(fleet: Fleet) -> None:
    for number, folder in enumerate(("first", "second", "second")):
        body = packed(fleet.sources / folder)
        answer = fleet.http.put("/v1/deltas/sent", content=iter([body[:9], body[9:]]))
        assert answer.status_code == (201, 201, 200)[number], answer.text
        assert answer.json()["digest"] == read_digest(fleet.sources / folder)
    assert fleet.complete("sent").status_code == 200
    fleet.http.delete("/v1/deltas/sent")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (member("../escape.json"), 422),
        (member("/tmp/escape.json"), 422),
        (member("added_tokens.json", tarfile.SYMTYPE), 422),
        (member("added_tokens.json", tarfile.CHRTYPE), 422),
        (member("delta.safetensors"), 422),
        (member("other.bin", size=5), 422),
        (member("merges.txt", size=5 << 20), 413),
    ],
)
def test_upload_that_is_no_artifact_is_refused_and_leaves_nothing(
    fleet: Fleet, extra: tarfile.TarInfo, status: int
) -> None:
    answer = fleet.http.put("/v1/deltas/bad", content=packed(fleet.sources / "first", extra))
    assert answer.status_code == status, answer.text
    assert not [path for path in fleet.managed.iterdir() if path.name.startswith((".bad.", "bad"))]


def test_who_does_not_wait_sees_the_state_and_joins_the_work(fleet: Fleet) -> None:
    body = {"name": "later", "source": str(fleet.sources / "first")}
    began = fleet.http.post("/v1/deltas", json=body, headers={"prefer": "respond-async"})
    assert (began.status_code, began.json()["state"]) == (202, "fetching")
    answers: list[int] = []
    asking = [
        threading.Thread(target=lambda: answers.append(fleet.post(**body).status_code))
        for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert set(answers) <= {200, 201}
    assert fleet.entry("later")["error"] is None
    assert fleet.complete("later").status_code == 200
    fleet.http.delete("/v1/deltas/later")


def test_restarted_server_has_what_was_registered_and_goes_on_with_what_was_not(
    tiny_llama: Path, fleet: Fleet, tmp_path: Path
) -> None:
    shutil.copytree(fleet.sources / "first", tmp_path / "state" / "deltas" / "kept")
    store = FleetStore(tmp_path / "state")
    source = {"source": f"file://{fleet.sources / 'second'}", "revision": None}
    store.put("fetch", "begun", {**source, "replace": False})
    settings = Settings(
        base=tiny_llama,
        state_dir=tmp_path / "state",
        allow_sources=(str(fleet.sources),),
        **FIELDS,
    )
    engine = LLMEngine.from_settings(settings)
    app = create_app(engine, settings, fleet=store)

    async def main() -> None:
        app.state.api.registrar.resume()
        while store.all("fetch"):
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert {info.name: info.error for info in engine.models()[1:]} == {"begun": None, "kept": None}
