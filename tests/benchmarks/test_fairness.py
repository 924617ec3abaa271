"""The fairness benchmark: what it counts, its tenants file and its tables; no server is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fairness import WEIGHTS, Ask, Figures, jain, table, write_tenants
from server.tenants.directory import Directory


def test_service_is_what_came_within_the_window() -> None:
    ask = Ask(0.0, 64, [1.0, 2.0, 3.0, 4.0])
    assert ask.ttft_s == 1.0
    assert ask.served(0.0, 10.0) == 64 + 2 * 4
    assert ask.served(1.5, 3.5) == 2 * 2  # its prompt was computed before
    assert Ask(0.0, 64).served(0.0, 10.0) == 0


@pytest.mark.parametrize(
    ("values", "index"), [([5, 5, 5], 1.0), ([1, 0, 0], 1 / 3), ([1, 3], 0.8), ([3, 4], 0.98)]
)
def test_jains_index_is_one_for_equals_and_a_share_for_one_that_has_all(
    values: list[float], index: float
) -> None:
    assert jain(values) == pytest.approx(index)


def test_tenants_file_is_one_that_the_server_takes(tmp_path: Path) -> None:
    keys = write_tenants(tmp_path / "tenants.toml")
    known = {tenant.name: tenant.weight for tenant in Directory(tmp_path / "tenants.toml").tenants}
    assert known == WEIGHTS
    assert keys.keys() == WEIGHTS.keys()
    assert len(set(keys.values())) == len(keys)


def test_tables_compare_the_flood_with_the_quiet_server() -> None:
    quiet = {
        "alone": [Ask(0.0, 1, [0.1, 0.2])] * 3,
        "flood": [Ask(0.0, 1, [0.3, 0.5])] * 3,
    }
    lines = table({"fair": Figures(quiet, {"a": 3, "b": 4}, {"flood": 100, "heavy": 290})})
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines.splitlines()]
    assert rows[2] == ["fair", "alone", "3", "100 / 100 / 100", "100 / 100"]
    assert rows[-1] == ["fair", "3.00 / 3.00", "2.00 / 2.00", "0.9800", "2.90"]
