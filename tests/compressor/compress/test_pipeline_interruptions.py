"""Runs that die: killed without warning, out of disk space, or beside another run.

The dying happens in forks of one helper process, so that torch is imported once and never forked
while its threads run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compressor.artifact import entropy
from compressor.artifact.staging import Staging
from compressor.atomic import RunLock
from compressor.checkpoint.layout import read_layout
from compressor.cli.app import app
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import ImpartError, OutputError
from compressor.merge.config import MergeConfig, MergeModel
from compressor.merge.merge import merge, merge_to_delta

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"codec": "blockdiag", "ratio": 10.0}
BEFORE_THE_SECOND_PASS = "between coding and the header"
KILLS = {
    "while a tensor is staged": (Staging, "add", 5),
    "to start afresh": (Staging, "add", 6),
    "between two files": (os, "fsync", 4),
    BEFORE_THE_SECOND_PASS: (entropy, "_header", 5),
}
STAGED = {
    "while a tensor is staged": 4,
    "between two files": None,  # all
    BEFORE_THE_SECOND_PASS: None,
}


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# --- in the helper process ----------------------------------------------------------------------


def die_at(owner: Any, name: str, nth: int) -> None:
    """Kill this process as the kernel would, at the nth call."""
    real = getattr(owner, name)
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, name, call)


def in_fork(work: Callable[[], object]) -> int:
    """Run `work` in a child; its exit code, 2 for an error of ours, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except ImpartError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def helper(base: str, tuned: str, folder: str) -> None:
    """Make every scenario's wreck in `folder`; print the exit codes as JSON."""
    read_layout(Path(base))  # the definition's modules are then imported once, not in every fork
    codes: dict[str, int] = {}
    for what, (owner, name, nth) in KILLS.items():

        def killed(what: str = what, owner: Any = owner, name: str = name, nth: int = nth) -> None:
            die_at(owner, name, nth)
            compress(base, tuned, Path(folder) / what, Options(**SETTINGS))

        codes[what] = in_fork(killed)

    def replacing() -> None:
        compress(base, tuned, Path(folder) / "replaced", Options(**SETTINGS | {"ratio": 12}))
        die_at(os, "rename", 2)  # the old one is out of the way, the new one not in place
        compress(base, tuned, Path(folder) / "replaced", Options(**SETTINGS, overwrite=True))

    codes["replaced"] = in_fork(replacing)
    config = MergeConfig(base, (MergeModel(tuned),), method="ta")
    jobs = {
        "full disk": lambda: compress(base, tuned, f"{folder}/full disk", Options(**SETTINGS)),
        "full disk, merging": lambda: merge(config, f"{folder}/full disk, merging"),
    }
    for what, job in jobs.items():

        def limited(job: Callable[[], object] = job) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be larger
            job()

        codes[what] = in_fork(limited)
    print(json.dumps(codes))


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrecks(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, int], str]:
    folder = tmp_path_factory.mktemp("wrecks")
    call = f"helper({str(tiny_llama)!r}, {str(tiny_llama_ft)!r}, {str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import helper; {call}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def whole_run(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int]:
    """The files of a run that nothing interrupted, and how many parts it staged."""
    out = tmp_path_factory.mktemp("expected") / "delta"
    with pytest.MonkeyPatch.context() as patch:
        added = count_added(patch)
        compress(tiny_llama, tiny_llama_ft, out, Options(**SETTINGS))
    return snapshot(out), len(added)


@pytest.fixture
def expected(whole_run: tuple[dict[str, bytes], int]) -> dict[str, bytes]:
    return whole_run[0]


def count_added(patch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are added to any staging folder from now on."""
    added: list[str] = []
    real = Staging.add

    def add(self: Staging, key: str, *arguments: Any) -> Any:
        added.append(key)
        return real(self, key, *arguments)

    patch.setattr(Staging, "add", add)
    return added


@pytest.mark.parametrize("what", STAGED)
def test_compress_killed_shows_nothing_and_the_next_run_gives_identical_bytes(
    wrecks: tuple[Path, dict[str, int], str],
    whole_run: tuple[dict[str, bytes], int],
    tiny_llama: Path,
    tiny_llama_ft: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, codes, _ = wrecks
    assert codes[what] == -signal.SIGKILL
    assert not (folder / what).exists()
    staged = len(list((folder / f".{what}.partial").glob("*.part")))
    assert staged == (STAGED[what] or whole_run[1]) or what == BEFORE_THE_SECOND_PASS
    added = count_added(monkeypatch)
    compress(tiny_llama, tiny_llama_ft, folder / what, Options(**SETTINGS))
    expected, n_added = whole_run
    assert len(added) == n_added - staged  # what was done is not done again
    assert snapshot(folder / what) == expected
    assert not list(folder.glob(f".{what}*"))


def test_compress_killed_and_not_resumed_does_everything_again(
    wrecks: tuple[Path, dict[str, int], str],
    whole_run: tuple[dict[str, bytes], int],
    tiny_llama: Path,
    tiny_llama_ft: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, codes, _ = wrecks
    out = folder / "to start afresh"
    assert codes[out.name] == -signal.SIGKILL
    staged = {p.name for p in (folder / f".{out.name}.partial").glob("*.part")}
    assert len(staged) == 5
    added = count_added(monkeypatch)
    arguments = ["--codec", "blockdiag", "--ratio", "10", "--no-resume", "--quiet"]
    arguments.append("--no-certificate")  # as the run that nothing interrupted
    inputs = [str(path) for path in (tiny_llama, tiny_llama_ft, out)]
    done = CliRunner().invoke(app, ["compress", *inputs, *arguments])
    assert done.exit_code == 0, done.stderr
    expected, n_added = whole_run
    assert len(added) == n_added
    assert snapshot(out) == expected
    assert not list(folder.glob(f".{out.name}*"))


def test_compress_killed_while_replacing_leaves_a_whole_artifact_after_the_next_run(
    wrecks: tuple[Path, dict[str, int], str],
    expected: dict[str, bytes],
    tiny_llama: Path,
    tiny_llama_ft: Path,
) -> None:
    folder, codes, _ = wrecks
    assert codes["replaced"] == -signal.SIGKILL
    assert (folder / ".replaced.replaced" / "SHA256SUMS").is_file()
    compress(tiny_llama, tiny_llama_ft, folder / "replaced", Options(**SETTINGS, overwrite=True))
    assert snapshot(folder / "replaced") == expected
    assert not list(folder.glob(".replaced*"))


@pytest.mark.parametrize("what", ["full disk", "full disk, merging"])
def test_full_disk_is_an_error_and_shows_nothing(
    wrecks: tuple[Path, dict[str, int], str],
    expected: dict[str, bytes],
    tiny_llama: Path,
    tiny_llama_ft: Path,
    what: str,
) -> None:
    folder, codes, stderr = wrecks
    assert codes[what] == 2
    assert not (folder / what).exists()
    assert "File too large" in stderr
    if what == "full disk":
        compress(tiny_llama, tiny_llama_ft, folder / what, Options(**SETTINGS))
        assert snapshot(folder / what) == expected
    assert not list(folder.glob(f".{what}*"))


def test_second_run_on_one_output_stops_and_harms_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    config = MergeConfig(str(tiny_llama), (MergeModel(str(tiny_llama_ft)),), method="ta")
    scratch = tmp_path / ".delta.merged"
    (scratch / "delta").mkdir(parents=True)
    (scratch / "delta" / "half.safetensors").write_bytes(b"of the first run")
    with RunLock(scratch), pytest.raises(OutputError, match="another run"):
        merge_to_delta(config, tmp_path / "delta", Options(**SETTINGS))
    assert (scratch / "delta" / "half.safetensors").is_file()
    with RunLock(tmp_path / "model"), pytest.raises(OutputError, match="another run"):
        merge(config, tmp_path / "model")
    with RunLock(tmp_path / "delta"), pytest.raises(OutputError, match="another run"):
        compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", Options(**SETTINGS))


def test_merge_to_delta_existing_output_stops_before_any_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "thesis.txt").write_text("the only copy")
    config = MergeConfig(str(tiny_llama), (MergeModel("/no/such/model"),))
    with pytest.raises(OutputError, match="exists"):
        merge_to_delta(config, tmp_path / "delta", Options(**SETTINGS))
