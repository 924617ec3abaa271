"""Which places are allowed: what else a text might mean is refused before it is compared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.errors import ConfigError, Forbidden, InvalidRequest
from server.fleet.place import Allowed, allowed_of

PREFIXES = ("hf://org", "hf://other/one", "s3://bucket/deltas", "https://host.example/d", "gs://b")


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("org/name", "hf://org/name"),
        ("org/name@v1", "hf://org/name@v1"),
        ("hf://other/one", "hf://other/one"),
        ("s3://bucket/deltas/a/", "s3://bucket/deltas/a"),
        ("S3://bucket/deltas/a", "s3://bucket/deltas/a"),
        ("https://HOST.example:443/d/x", "https://host.example/d/x"),
        ("gs://b/x/y", "gs://b/x/y"),
    ],
)
def test_place_within_a_prefix_is_allowed(source: str, place: str) -> None:
    assert str(Allowed(PREFIXES).place(source)) == place


@pytest.mark.parametrize(
    "source",
    [
        "hf://org2/name",
        "hf://other/one-more",
        "s3://bucket/deltas-of-others/a",
        "s3://bucket",
        "s3://bucket2/deltas/a",
        "http://host.example/d/x",
        "https://host.example:8443/d/x",
        "https://host.example.evil/d/x",
        "https://evil/host.example/d/x",
        "/etc",
        "file:///etc",
    ],
)
def test_place_beside_every_prefix_is_forbidden_and_names_the_setting(source: str) -> None:
    with pytest.raises(Forbidden, match="--allow-source"):
        Allowed(PREFIXES).place(source)


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/deltas/../secrets",
        "s3://bucket/deltas/./a",
        "s3://bucket//deltas/a",
        "s3://bucket/deltas/%2e%2e/a",
        "s3://bucket/deltas/*",
        "s3://key:secret@bucket/deltas/a",
        "https://user@host.example/d/x",
        "https://host.example/d/x?token=1",
        "https://host.example/d/x#y",
        "https://host.example\\@evil/d/x",
        "https://host.example:99999/d",
        "https:///d",
        "hf://org/name@v1/../../x",
        "ftp://host/x",
        "name",
        "",
        "s3://bucket/deltas/a\nb",
        "x" * 3000,
    ],
)
def test_text_with_another_meaning_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest):
        Allowed((*PREFIXES, "https://host.example")).place(source)


def test_revision_is_for_the_hub_and_for_one_only() -> None:
    assert Allowed(PREFIXES).place("org/name", "v1").revision == "v1"
    for source, revision in (("org/name@v1", "v2"), ("gs://b/x", "v1"), ("org/name", "a/../b")):
        with pytest.raises(InvalidRequest):
            Allowed(PREFIXES).place(source, revision)


def test_local_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "root" / "out")
    os.symlink(tmp_path / "root", tmp_path / "alias")
    allowed = Allowed((str(tmp_path / "alias"),))
    assert allowed.place(str(tmp_path / "alias" / "in")).path == str(tmp_path / "root" / "in")
    with pytest.raises(Forbidden):
        allowed.place(str(tmp_path / "root" / "out"))


def test_prefix_that_cannot_be_one_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match="--allow-source"):
        allowed_of(("https://user@host/",), [])
