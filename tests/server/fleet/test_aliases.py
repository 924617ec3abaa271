"""Aliases: what they stand for, for whom, and what they stood for before."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Conflict, InvalidRequest, ModelNotFound, StateUnwritable
from server.fleet.aliases import Alias, Aliases, AliasTarget, versioned
from server.fleet.store import FleetStore

MODELS = {"base", "one", "two", "one@0123abcd"}


def made(store: FleetStore | None = None) -> Aliases:
    return Aliases(store or FleetStore(None), MODELS.__contains__)


def to(*models: str) -> tuple[AliasTarget, ...]:
    return tuple(AliasTarget(model=model) for model in models)


def test_alias_stands_for_what_it_was_pointed_to_last():
    aliases = made()
    aliases.put("support:prod", to("one"))
    aliases.put("support:prod", to("two"))
    assert aliases.get("support:prod") == Alias("support:prod", to("two"))
    assert [alias.name for alias in aliases.all()] == ["support:prod"]
    aliases.delete("support:prod")
    assert aliases.get("support:prod") is None


def test_rollback_takes_the_last_change_back_and_again_takes_that_back():
    aliases = made()
    aliases.put("prod", to("one"))
    with pytest.raises(Conflict, match="stood for nothing before"):
        aliases.roll_back("prod")
    aliases.put("prod", to("two"))
    assert aliases.roll_back("prod").targets == to("one")
    assert aliases.roll_back("prod").targets == to("two")
    aliases.delete("prod")
    assert aliases.roll_back("prod").targets == to("two")
    assert len(aliases.history("prod")) == 6
    with pytest.raises(ModelNotFound):
        aliases.roll_back("never")


@pytest.mark.parametrize(
    ("name", "targets", "error"),
    [
        ("one", to("two"), Conflict),
        ("base", to("two"), Conflict),
        ("a b", to("two"), InvalidRequest),
        ("a/b", to("two"), InvalidRequest),
        (":a", to("two"), InvalidRequest),
        ("x" * 129, to("two"), InvalidRequest),
        ("prod", to("three"), InvalidRequest),
        ("prod", to("one@ffffffff"), InvalidRequest),
        ("prod", to("prod"), InvalidRequest),
        ("prod", to("other"), InvalidRequest),
    ],
)
def test_alias_that_cannot_be_is_refused_and_nothing_changes(name, targets, error):
    aliases = made()
    aliases.put("other", to("one"))
    with pytest.raises(error):
        aliases.put(name, targets)
    assert [alias.name for alias in aliases.all()] == ["other"]


def test_aliases_are_kept_over_a_restart_and_what_is_not_understood_is_left_out(tmp_path, caplog):
    store = FleetStore(tmp_path)
    made(store).put("prod", to("one@0123abcd"))
    store.put("alias", "odd", {"targets": "one"})
    store.close()
    again = made(FleetStore(tmp_path))
    assert [alias.name for alias in again.all()] == ["prod"]
    assert again.get("prod").targets == to("one@0123abcd")
    assert "the alias odd is stored in a form" in caplog.text


def test_change_that_cannot_be_kept_is_not_made(monkeypatch):
    store = FleetStore(None)
    aliases = made(store)
    aliases.put("prod", to("one"))

    def refuse(*_: object) -> None:
        raise StateUnwritable("full")

    monkeypatch.setattr(store, "put", refuse)
    with pytest.raises(StateUnwritable):
        aliases.put("prod", to("two"))
    assert aliases.get("prod").targets == to("one")


def weighted(*weights: float) -> Alias:
    targets = (AliasTarget(model=str(i), weight=w) for i, w in enumerate(weights))
    return Alias("prod", tuple(targets))


@given(st.text(min_size=1), st.floats(0.01, 100), st.floats(0.01, 100))
def test_same_caller_gets_the_same_target_and_moves_only_with_the_share(caller, low, high):
    low, high = sorted((low, high))
    first, second = weighted(low, 1.0), weighted(high, 1.0)
    assert first.choose(caller) == first.choose(caller)
    if first.choose(caller) == "0":  # whose share has grown
        assert second.choose(caller) == "0"


def test_shares_of_many_callers_are_the_weights_and_nobody_in_particular_is_drawn():
    alias = weighted(1, 3)
    for callers in ([f"c{i}" for i in range(4000)], [""] * 4000):
        counts = Counter(map(alias.choose, callers))
        assert 0.21 < counts["0"] / 4000 < 0.29


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("a@0123abcd", ("a", "0123abcd")),
        ("base:a@sha256:0123abcd", ("base:a", "0123abcd")),
        ("a@0123abc", None),
        ("a@0123ABCD", None),
        ("a", None),
        ("@0123abcd", None),
        ("a@b@0123abcd", None),
        ("a@" + "0" * 65, None),
    ],
)
def test_version_is_a_name_and_the_beginning_of_a_digest(model, parts):
    assert versioned(model) == parts
