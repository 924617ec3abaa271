"""`impart-serve compile` says what it does, and its exit code whether all kernels are ready."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import __main__
from server.compile import compile_app
from server.ops.cpu import check
from server.ops.cpu.check import wanted_kernels
from server.ops.cpu.features import host_target
from server.process import logs

WANTED = frozenset(wanted_kernels(host_target()))


@pytest.mark.parametrize("usable", [WANTED, WANTED - {"rows"}])
def test_compile_ends_with_what_is_ready_and_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usable: frozenset[str]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(check, "usable_kernels", lambda: usable)
    monkeypatch.setattr(logs, "configure", lambda level, style: None)
    done = CliRunner().invoke(compile_app())
    assert done.exit_code == (0 if usable == WANTED else 1)
    assert (
        f"{len(usable)} of {len(WANTED)} CPU kernels for {host_target()} are ready" in done.output
    )


def test_compile_without_a_folder_to_keep_them_in_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(logs, "configure", lambda level, style: None)
    done = CliRunner().invoke(compile_app())
    assert done.exit_code == 1
    assert "set NUMBA_CACHE_DIR" in done.output


def test_impart_serve_compile_is_no_setting_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["impart-serve", "compile", "--help"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    assert "impart-serve compile" in capsys.readouterr().out
