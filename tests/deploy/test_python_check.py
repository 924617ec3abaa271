"""What `make` says on an interpreter or a system that cannot run the project, and when."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy import python_check

ROOT = Path(__file__).resolve().parent.parent.parent
# An interpreter of which only one thing is different.
OTHER = """#!/bin/sh
exec "{python}" -c 'import runpy, sys
{change}
runpy.run_path(sys.argv[1], run_name="__main__")' "$@"
"""


def outside_make() -> dict[str, str]:
    """This process's environment as a person's shell has it: these tests run under `make test`."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    return {name: value for name, value in os.environ.items() if name not in ours}


def make_with(folder: Path, change: str) -> tuple[int, list[str]]:
    """Run `make test` in a bare copy with that interpreter; its exit status and lines."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "deploy/python_check.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    other = folder / "python3"
    other.write_text(OTHER.format(python=sys.executable, change=change), "utf-8")
    other.chmod(0o755)
    done = subprocess.run(
        ["make", "test", "PYTHON=./python3"],
        cwd=folder,
        env=outside_make(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sys.version_info = (3, 10, 4)", r"3\.11, 3\.12, 3\.13 or 3\.14 is needed"),
        ("sys.version_info = (3, 15, 0)", r"no(t all)? .*3\.11, 3\.12, 3\.13 or 3\.14 is needed"),
        ('sys.modules["ensurepip"] = None', r"apt install python3-venv"),
    ],
)
def test_make_on_an_unusable_python_says_so_first_and_makes_nothing(
    tmp_path: Path, change: str, expected: str
) -> None:
    status, lines = make_with(tmp_path / "with space é", change)
    assert status != 0
    assert re.search(expected, lines[0])
    assert not (tmp_path / "with space é" / ".venv").exists()


def test_make_without_the_interpreter_names_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "test", "VENV=" + str(tmp_path / "none"), "PYTHON=no-such-python"],
        cwd=ROOT,
        env=outside_make(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "apt install python3 python3-venv" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("system", "machine", "soabi", "fits"),
    [
        ("Linux", "x86_64", "cpython-312-x86_64-linux-gnu", True),
        ("Linux", "aarch64", "cpython-313-aarch64-linux-gnu", True),
        ("Darwin", "arm64", "cpython-312-darwin", True),
        ("Linux", "x86_64", "cpython-312-x86_64-linux-musl", False),
        ("Linux", "armv7l", "cpython-312-arm-linux-gnueabihf", False),
        ("Darwin", "x86_64", "cpython-312-darwin", False),
    ],
)
def test_problem_system_without_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, soabi: str, fits: bool
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(
        python_check.sysconfig, "get_config_var", {"SOABI": soabi, "Py_GIL_DISABLED": 0}.get
    )
    monkeypatch.setattr(python_check, "_venv", lambda: None)
    said = python_check.problem()
    assert (said is None) == fits
    assert fits or machine in said


def test_problem_free_threaded_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_check.sysconfig, "get_config_var", lambda name: 1)
    assert "free-threaded" in python_check.problem()


def test_python_check_old_interpreters_can_read_it() -> None:
    source = (ROOT / "deploy" / "python_check.py").read_text("utf-8")
    tree = ast.parse(source, feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.AnnAssign)]


def test_versions_named_everywhere_are_the_same() -> None:
    oldest, newest = (
        f"{major}.{minor}" for major, minor in (python_check.OLDEST, python_check.NEWEST)
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["requires-python"] == f">={oldest}"
    minors = range(python_check.OLDEST[1], python_check.NEWEST[1] + 1)
    named = re.findall(r"3\.\d+", python_check.WORKING)
    assert named == [f"3.{minor}" for minor in minors]
    for text in ("README.md", "Makefile", "CONTRIBUTING.md"):
        assert f"{oldest} to {newest}" in (ROOT / text).read_text("utf-8"), text
