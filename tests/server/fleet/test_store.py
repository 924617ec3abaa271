"""What operators said of variants is there after a restart, with all that it was before."""

from __future__ import annotations

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.errors import ConfigError, StateUnwritable
from server.fleet import store as module
from server.fleet.store import FILE_NAME, FleetStore


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    made = FleetStore(tmp_path / "state" if request.param == "file" else None)
    yield made
    made.close()


def test_document_is_what_was_put_last(store):
    assert store.get("alias", "prod") is None
    store.put("alias", "prod", {"targets": ["a"]})
    store.put("alias", "prod", {"targets": ["b"], "é": 1})
    store.put("variant", "prod", {"pinned": True})
    assert store.get("alias", "prod") == {"targets": ["b"], "é": 1}
    assert store.all("alias") == {"prod": {"targets": ["b"], "é": 1}}
    store.delete("alias", "prod")
    store.delete("alias", "never")
    assert store.all("alias") == {}
    assert store.all("variant") == {"prod": {"pinned": True}}


def test_any_thread_may_ask(store):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store.put("alias", f"a{n}", {"n": n}), range(20)))
        found = list(pool.map(lambda n: store.get("alias", f"a{n}"), range(20)))
    assert found == [{"n": n} for n in range(20)]
    assert len(store.all("alias")) == 20


def test_history_tells_each_change_newest_first_and_none_that_changed_nothing(store):
    store.put("alias", "prod", {"n": 1}, actor="cli")
    store.put("alias", "prod", {"n": 1})
    store.put("alias", "prod", {"n": 2})
    store.delete("alias", "prod", actor="signal")
    told = [(c.actor, c.before, c.after) for c in store.history("alias", "prod")]
    assert told == [
        ("signal", {"n": 2}, None),
        ("admin", {"n": 1}, {"n": 2}),
        ("cli", None, {"n": 1}),
    ]
    assert store.history("alias", "other") == []


def test_history_is_bounded_for_each_name(store, monkeypatch):
    monkeypatch.setattr(module, "MAX_HISTORY", 3)
    store.put("alias", "other", {"n": 0})
    for n in range(10):
        store.put("alias", "prod", {"n": n})
    assert [c.after for c in store.history("alias", "prod")] == [{"n": 9}, {"n": 8}, {"n": 7}]
    assert len(store.history("alias", "other")) == 1


def test_state_is_kept_over_a_restart_in_a_folder_of_its_own_mode(tmp_path):
    folder = tmp_path / "new" / "state"
    first = FleetStore(folder)
    first.put("variant", "a", {"pinned": True})
    first.close()
    second = FleetStore(folder)
    assert second.get("variant", "a") == {"pinned": True}
    assert second.is_persistent
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert os.stat(folder / FILE_NAME).st_mode & 0o777 == 0o600


def test_file_of_a_newer_version_or_none_at_all_is_refused_by_name(tmp_path):
    FleetStore(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="written by a newer version"):
        FleetStore(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / FILE_NAME).write_text("no database, but a text of some length" * 100)
    with pytest.raises(ConfigError, match=r"variants\.db cannot be used"):
        FleetStore(other)
    with pytest.raises(ConfigError, match="Not a directory"):
        FleetStore(tmp_path / FILE_NAME / "below")


def test_change_that_cannot_be_kept_is_not_made(tmp_path):
    store = FleetStore(tmp_path)
    store.put("variant", "a", {"n": 1})
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateUnwritable, match="full"):
        store.put("variant", "a", {"n": "x" * 100_000})
    assert store.get("variant", "a") == {"n": 1}
    assert len(store.history("variant", "a")) == 1


def test_store_is_asked_from_any_thread(store):
    with ThreadPoolExecutor(1) as other:
        other.submit(store.put, "alias", "prod", {"n": 1}).result()
    assert store.get("alias", "prod") == {"n": 1}
