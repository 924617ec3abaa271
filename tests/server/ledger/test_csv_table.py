"""CSV: no cell is a formula, and every other text comes back."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.csv_table import csv_text


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")', "\uff1d1"],
)
def test_cell_that_would_be_a_formula_begins_with_an_apostrophe(text: str) -> None:
    (_, cells) = csv.reader(io.StringIO(csv_text(["name"], [{"name": text}]), newline=""))
    assert cells == [f"'{text}"]


@given(st.text().filter(lambda text: not text.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))))
def test_other_text_comes_back_as_it_was(text: str) -> None:
    if text[:1] in "\uff1d\uff0b\uff0d\uff20" and text:
        return
    (_, cells) = csv.reader(io.StringIO(csv_text(["n", "t"], [{"t": text, "n": -1}]), newline=""))
    assert cells == ["-1", text]


def test_missing_value_is_an_empty_cell_and_no_row_a_header_alone() -> None:
    assert csv_text(["a", "b"], [{"a": None, "b": 0}]) == "a,b\r\n,0\r\n"
    assert csv_text(["a", "b"], []) == "a,b\r\n"
