"""The documentation's table of settings is what Settings declares."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from server.settings import Settings
from tests.settings_table import page, table, written_table


def test_page_has_the_table_that_settings_declares() -> None:
    assert written_table(page().read_text()) == table(), "run `make settings-table`"


def test_table_has_a_row_for_every_setting() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", table(), re.MULTILINE)
    assert rows == [field.name for field in fields(Settings)]


@pytest.mark.parametrize(
    "row",
    [
        "| `base` | PATH | required |",
        "| `port` | N | 8000 |",
        "| `delta_budget_bytes` | SIZE | 4GiB |",
        "| `prefix_cache` | SWITCH | on |",
        "| `request_timeout_s` | SECONDS | 300 |",
        "| `device` | auto, cpu, cuda | auto |",
        "| `limits_storage` | URL | memory:// |",
        "| `max_batch_tokens` | TOKENS | 256 on the CPU, 2048 on CUDA |",
    ],
)
def test_table_shows_kind_and_default(row: str) -> None:
    assert row in table()


def test_written_table_ends_where_the_rows_end() -> None:
    text = "## Other\n| a |\n## Settings\n\ntext\n\n| setting | x |\n|---|---|\n| `a` | b |\n\nend"
    assert written_table(text) == "| setting | x |\n|---|---|\n| `a` | b |\n"
