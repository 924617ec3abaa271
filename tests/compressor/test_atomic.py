from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from compressor.atomic import (
    RunLock,
    publish_directory,
    recover_directory,
    replace_file,
    replaced_name,
    write_new,
)
from compressor.errors import OutputError


def chunks_then_failure():
    yield b"first"
    raise OSError(5, "Input/output error")


def test_write_new_writes_all_chunks_and_returns_the_size(tmp_path: Path) -> None:
    assert write_new(tmp_path / "f", [b"ab", memoryview(b"cd"), b""]) == 4
    assert (tmp_path / "f").read_bytes() == b"abcd"


def test_write_new_existing_file_raises_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(OutputError):
        write_new(tmp_path / "f", [b"new"])
    assert (tmp_path / "f").read_text() == "old"


def test_write_new_failing_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Input/output error"):
        write_new(tmp_path / "f", chunks_then_failure())
    assert os.listdir(tmp_path) == []


def test_replace_file_leaves_another_name_of_the_old_file_as_it_was(tmp_path: Path) -> None:
    for text in (b"old", b"new"):
        replace_file(tmp_path / "f", text)
        if text == b"old":
            os.link(tmp_path / "f", tmp_path / "kept")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert (tmp_path / "kept").read_bytes() == b"old"
    with pytest.raises(OutputError, match="cannot write"):
        replace_file(tmp_path / "nowhere" / "f", b"")


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_write_new_failing_system_call_leaves_nothing(tmp_path, monkeypatch, call: str) -> None:
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match="No space left"):
            write_new(tmp_path / "f", [b"x"])
    assert os.listdir(tmp_path) == []


def test_write_new_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_new(tmp_path / "f", [b""])
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "f").write_text(text)
    return path


def test_publish_directory_replaces_and_removes_the_old(tmp_path: Path) -> None:
    final = _folder(tmp_path / "final", "old")
    publish_directory(_folder(tmp_path / "new", "new"), final)
    assert (final / "f").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_publish_directory_failing_rename_keeps_the_old(tmp_path, monkeypatch, fail_at) -> None:
    final, new = _folder(tmp_path / "final", "old"), _folder(tmp_path / "new", "new")
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == fail_at:
            raise OSError(5, "Input/output error")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OutputError):
            publish_directory(new, final)
    assert (final / "f").read_text() == "old"
    assert not replaced_name(final).exists()


def test_recover_directory_after_a_crash_between_renames_restores_the_old(tmp_path: Path) -> None:
    final = tmp_path / "final"
    _folder(replaced_name(final), "old")
    recover_directory(final)
    assert (final / "f").read_text() == "old"
    _folder(replaced_name(final), "older")
    recover_directory(final)
    assert (final / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["final"]
    recover_directory(final)


def test_run_lock_second_holder_raises_until_the_first_leaves(tmp_path: Path) -> None:
    with RunLock(tmp_path / "x"):
        with pytest.raises(OutputError, match="another run"), RunLock(tmp_path / "x"):
            pass
        with RunLock(tmp_path / "y"):
            pass
    with RunLock(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []


def _hold(path: str, ready) -> None:
    with RunLock(Path(path)):
        ready.set()
        signal.pause()


def test_run_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "x"), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(OutputError), RunLock(tmp_path / "x"):
        pass
    process.kill()
    process.join(60)
    assert (tmp_path / ".x.lock").exists()
    with RunLock(tmp_path / "x"):
        pass


def test_run_lock_is_left_by_whoever_ends_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "x")
    lock.__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with RunLock(tmp_path / "x"):
        pass


def test_run_lock_below_a_file_raises_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot lock x"), RunLock(tmp_path / "file" / "x"):
        pass
