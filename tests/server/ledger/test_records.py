"""Ids in order, and the day of a time."""

from __future__ import annotations

from server.ledger.records import new_row_id, utc_day
from tests.server.ledger.rows import NOON


def test_row_ids_are_all_different_and_as_long_as_their_column() -> None:
    ids = {new_row_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(one) for one in ids} == {32}


def test_day_is_utcs_whatever_the_machines_time_zone() -> None:
    assert utc_day(NOON) == "2026-11-01"
    assert utc_day(NOON + 43_199) == "2026-11-01"
    assert utc_day(NOON + 43_200) == "2026-11-02"
