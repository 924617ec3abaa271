"""What may lie in the deltas directory, over HTTP: listings and other variants do not feel it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.metrics.series import Metrics
from tests.compressor.artifacts import edit_config, seal
from tests.server.api.conftest import Live
from tests.server.api.test_openai_client_real_engine import live

__all__ = ["live"]  # a fixture: the real engine
LISTINGS = ("/v1/models", "/v1/deltas", "/metrics")


def get(live: Live, path: str) -> httpx.Response:
    return httpx.get(f"{live.url}{path}", timeout=60)


def rescan(live: Live) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/deltas/rescan", timeout=60)


def complete(live: Live, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "The", "max_tokens": 2}
    return httpx.post(f"{live.url}/v1/completions", json=body, timeout=60)


@contextmanager
def folder(live: Live, name: str) -> Iterator[Path]:
    """A copy of the good artifact under another name, of a digest of its own."""
    deltas: Path = live.engine._settings.deltas
    copy = shutil.copytree(deltas / "tuned", deltas / name)
    edit_config(copy, lambda record: record.update(created_by=ascii(name)))
    try:
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        assert rescan(live).status_code == 200


def assert_well(live: Live) -> None:
    for path in LISTINGS:
        assert get(live, path).status_code == 200, path
    assert complete(live, "tuned").status_code == 200


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "\u202egpj".encode(), b"a\nb", b"a b"])
def test_folder_of_any_name_is_listed_and_disturbs_nobody(live: Live, name: bytes) -> None:
    with folder(live, os.fsdecode(name)):
        listed = rescan(live)
        assert listed.status_code == 200
        by_state = {d["id"]: d["state"] for d in listed.json()["data"]}
        assert by_state["tuned"] in ("ready", "registered")
        assert list(by_state.values()).count("failed") == 1
        assert_well(live)


def hot(path: Path) -> None:
    (path / "generation_config.json").write_text('{"temperature": "hot"}')
    seal(path)


def no_penalty(path: Path) -> None:
    (path / "generation_config.json").write_text('{"repetition_penalty": 0}')
    seal(path)


def long_fidelity(path: Path) -> None:
    edit_config(path, lambda record: record["fidelity"].update(note="x" * (20 << 20)))


def unknown_key(path: Path) -> None:
    edit_config(path, lambda record: record.update(note=1))


@pytest.mark.parametrize("damage", [hot, no_penalty, long_fidelity, unknown_key])
def test_artifact_that_says_what_it_may_not_is_listed_with_the_reason(
    live: Live, damage: Callable[[Path], None]
) -> None:
    with folder(live, "bad") as path:
        damage(path)
        listed = rescan(live)
        assert len(listed.content) < 10_000
        (bad,) = (d for d in listed.json()["data"] if d["id"] == "bad")
        assert bad["state"] == "failed"
        for _ in range(2):
            answer = complete(live, "bad")
            assert answer.status_code == 424
            assert "retry-after" not in answer.headers
            assert bad["error"] in answer.json()["error"]["message"]
        assert_well(live)


def test_directory_that_is_gone_is_said_and_the_names_are_served_on(live: Live) -> None:
    deltas: Path = live.engine._settings.deltas
    deltas.rename(deltas.with_name("moved"))
    try:
        answer = rescan(live)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert "No such file or directory" in error["message"]
        assert str(deltas) not in error["message"]
        assert answer.headers["retry-after"]
        assert_well(live)
    finally:
        deltas.with_name("moved").rename(deltas)
    assert rescan(live).status_code == 200


def test_states_of_many_failed_variants_are_bounded(live: Live) -> None:
    deltas: Path = live.engine._settings.deltas
    folders = [deltas / f"not-a-delta-{i}" for i in range(300)]
    for one in folders:
        one.mkdir()
    try:
        assert rescan(live).status_code == 200
        metrics = Metrics()
        metrics.watch(live.engine, 8)
        lines = [li for li in metrics.render().splitlines() if li.startswith(b"impart_variant_st")]
        assert len(lines) == 256
        assert complete(live, "not-a-delta-7").status_code == 424
    finally:
        for one in folders:
            one.rmdir()
        rescan(live)
