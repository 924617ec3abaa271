"""Sizes and overrides are read as people write them."""

from __future__ import annotations

import pytest

from server.setting_kinds import parse_overrides, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("7", 7), ("500MB", 500_000_000), ("1.5 GiB", 3 << 29), (" 2kib ", 2048),
        ("1TB", 10**12), ("3b", 3),
    ],
)  # fmt: skip
def test_parse_size_counts_bytes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 PB", "0x10", "1e9", "4GiBs"])
def test_parse_size_of_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("size", ["4GiB", "512MiB", "1KiB", "1000", "0"])
def test_size_text_is_read_back_as_written(size):
    assert size_text(parse_size(size)) == size


def test_parse_overrides_takes_a_list_or_a_line():
    modes = {"a": "apply", "b=c": "reconstruct"}
    assert parse_overrides(["a=apply"]) == parse_overrides("a=apply ") == {"a": "apply"}
    assert parse_overrides(modes) is modes
