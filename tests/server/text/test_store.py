"""Folders of tokenizer files."""

from __future__ import annotations

from server.text.store import TokenizerStore


def test_equal_files_share_a_folder_and_others_do_not() -> None:
    store = TokenizerStore()
    one = store.put({"a": b"1", "b": b"2"})
    assert store.put({"b": b"2", "a": b"1"}) == one
    assert store.put({"a": b"12", "b": b""}) != one
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {"a": b"1", "b": b"2"}
    store.close()
    assert not one.parent.exists()
    store.close()
