"""The wheel, built and installed into an environment of its own, away from this checkout.

The environment sees the libraries of the one that runs the tests, but not its copy of the project:
what is imported there came out of the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "compressor", "server")
DATA = (
    "compressor/py.typed",
    "server/py.typed",
    "compressor/measure/default_texts.jsonl",
    "compressor/report/report.html.jinja",
    "server/ledger/migrations/versions/v0001_first_tables.py",
)


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel."""

    bin: Path
    wheel: Path

    def run(self, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        name, *rest = command
        return subprocess.run(
            [str(self.bin / name), *rest],
            cwd=cwd,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=120,
        )


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("pip")  # an environment made by another tool may be without
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building writes beside the sources
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", str(folder / "venv"), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = {p.parent for p in (folder / "venv").rglob("impart_serve-*.dist-info")}
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "libraries.pth").write_text("\n".join(sorted(libraries)))
    return Installed(scripts, wheel)


def test_wheel_holds_the_data_files_and_nothing_of_the_checkout(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert set(DATA) <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"compressor", "server"}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("impart", "--help"), "compress"),
        (("impart-serve", "--help"), "--deltas"),
        (("python", "-m", "server", "--help"), "--deltas"),
        (("python", "-m", "compressor", "--help"), "compress"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_installed_command_from_another_folder_answers(
    installed: Installed, tmp_path: Path, command: tuple[str, ...], says: str
) -> None:
    done = installed.run(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_installed_packages_are_the_wheels_own_and_find_their_data(
    installed: Installed, tmp_path: Path
) -> None:
    code = (
        "import compressor, server\n"
        "from importlib.resources import files\n"
        "print(compressor.__file__, server.__file__, sep='\\n')\n"
        f"assert all(files('compressor').parent.joinpath(name).is_file() for name in {DATA!r})"
    )
    done = installed.run(tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    environment = installed.bin.parent.resolve()
    for line in done.stdout.splitlines():
        assert Path(line).resolve().is_relative_to(environment)


def test_ledger_is_made_and_read_by_the_installed_package(
    installed: Installed, tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from server.ledger.database import open_database\n"
        "open_database(Path('state'), None)"
    )
    made = installed.run(tmp_path, "python", "-c", code)
    assert made.returncode == 0, made.stderr
    shown = installed.run(tmp_path, "impart-serve", "usage", "--state-dir", "state", "--by", "")
    assert shown.stdout.splitlines()[1].split() == ["0", "0", "0", "0"], shown.stderr


def test_folder_with_a_server_package_of_its_own_keeps_it_and_the_script_is_ours(
    installed: Installed, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").touch()
    (tmp_path / "server" / "__main__.py").write_text("print('theirs')")
    assert installed.run(tmp_path, "python", "-m", "server").stdout == "theirs\n"
    assert "--deltas" in installed.run(tmp_path, "python", "-P", "-m", "server", "--help").stdout
    assert "--deltas" in installed.run(tmp_path, "impart-serve", "--help").stdout


def test_hooks_fetch_nothing_and_run_in_the_projects_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/python -m ")
