"""Failures of directories are remembered until their files change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.deltas.failures import Failure
from server.deltas.fingerprint import MAX_ENTRIES, KnownFailures, fingerprint_of

BAD = Failure("it is bad", "mend it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("content")
    return tmp_path / "one"


def rewrite(folder: Path) -> None:
    """The same size, and the same time of its content."""
    file = folder / "file"
    status = file.stat()
    file.write_text("CONTENT")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def permit(folder: Path) -> None:
    (folder / "file").chmod(0o600)
    (folder / "file").chmod(0o640)


def replace_by_name(folder: Path) -> None:
    (folder / "new").write_text("content")
    (folder / "new").rename(folder / "file")


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    (folder / "file").write_text("content")


@pytest.mark.parametrize("change", [rewrite, permit, replace_by_name, replace_folder])
def test_failure_is_known_until_a_file_changes(
    folder: Path, change: Callable[[Path], None]
) -> None:
    known = KnownFailures()
    known.note(folder, "text", fingerprint_of(folder), BAD)
    assert known.of(folder, "text") is BAD
    assert known.of(folder, "weights") is None
    change(folder)
    assert known.of(folder, "text") is None
    assert len(known) == 0


def test_failure_of_a_folder_that_nobody_could_list_is_not_kept(tmp_path: Path) -> None:
    known = KnownFailures()
    assert fingerprint_of(tmp_path / "nowhere") is None
    known.note(tmp_path / "nowhere", "text", None, BAD)
    assert len(known) == 0


def test_keep_forgets_all_others(folder: Path, tmp_path: Path) -> None:
    known = KnownFailures()
    for path in (folder, tmp_path):
        known.note(path, "text", fingerprint_of(path), BAD)
    known.keep({folder})
    assert (len(known), known.of(folder, "text")) == (1, BAD)


def test_fingerprint_of_many_files_is_bounded(tmp_path: Path) -> None:
    for i in range(MAX_ENTRIES + 50):
        (tmp_path / str(i)).touch()
    found = fingerprint_of(tmp_path)
    assert found is not None
    assert len(found) == MAX_ENTRIES + 1
