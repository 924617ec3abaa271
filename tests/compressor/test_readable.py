"""What is said of files that may not be read, as a user who may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.readable import why_unreadable
from tests.unprivileged import UID, forbid, open_folder, run_unprivileged

IMPORTS = """
import sys
from pathlib import Path
from compressor.readable import why_unreadable
"""
ASK = "print(why_unreadable(Path(sys.argv[1])))"


def asked(path: Path) -> str:
    done = run_unprivileged(IMPORTS, ASK, [str(path)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def uid() -> int:
    return UID if os.geteuid() == 0 else os.geteuid()


def test_why_unreadable_file_and_folder_that_can_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert why_unreadable(tmp_path) is None
    assert why_unreadable(tmp_path / "file") is None


def test_why_unreadable_names_what_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in (why_unreadable(tmp_path / "none") or "")


def test_why_unreadable_forbidden_file_is_named_with_the_user_and_the_remedy() -> None:
    with open_folder() as folder:
        (folder / "weights").touch()
        forbid(folder / "weights")
        said = asked(folder / "weights")
        assert f"{folder}/weights may not be read" in said
        assert f"(uid {uid()})" in said
        assert f"chmod -R a+rX {folder}/weights" in said
        assert f"--user {os.geteuid()}" in said


@pytest.mark.parametrize("mode", [0, 0o444], ids=["no list", "list, no entry"])
def test_why_unreadable_blames_the_outermost_folder_that_is_closed(mode: int) -> None:
    with open_folder() as folder:
        inside = folder / "closed" / "inside"
        inside.mkdir(parents=True)
        (inside / "weights").touch()
        inside.parent.chmod(mode)
        try:
            for path in (inside / "weights", inside, inside.parent):
                assert f"{folder}/closed may not be read" in asked(path), path
        finally:
            inside.parent.chmod(0o755)
