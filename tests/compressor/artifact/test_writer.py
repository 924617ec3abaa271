from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from compressor.artifact.reader import read_artifact, read_digest
from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import DenseRows, TensorDelta
from compressor.errors import OutputError
from tests.compressor.artifacts import AUX, CONFIG, deltas, same_delta, write_artifact


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def neighbours(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


def test_writer_same_input_in_any_order_gives_identical_bytes(tmp_path: Path) -> None:
    one = write_artifact(tmp_path / "one")
    two = write_artifact(tmp_path / "two", order=lambda made: made[::-1])
    assert one == two == read_digest(tmp_path / "one")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert neighbours(tmp_path / "one") == ["one", "two"]


def test_writer_readme_is_told_the_bytes_of_all_other_files(tmp_path: Path) -> None:
    write_artifact(tmp_path / "d")
    others = sum(p.stat().st_size for p in (tmp_path / "d").iterdir() if p.name != "README.md")
    assert (tmp_path / "d" / "README.md").read_text() == f"# card, {others} bytes\n"


def test_writer_written_tensors_are_what_is_published(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        payload = sum(writer.add(delta).n_bytes for delta in deltas())
        written = writer.write_tensors()
        writer.finish(CONFIG)
    size = (tmp_path / "d" / "delta.safetensors").stat().st_size
    assert size == written.n_bytes == payload + written.header_bytes
    assert written.header_bytes > 0


def test_writer_tensors_written_again_replace_the_first(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        staged = [writer.add(delta) for delta in deltas()]
        writer.write_tensors()
        writer.write_tensors(staged[:2])
        writer.finish(CONFIG)
    names = sorted(delta.name for delta in deltas()[:2])
    assert [delta.name for delta in read_artifact(tmp_path / "d").tensors] == names


def test_writer_without_tensors_writes_a_readable_artifact(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        writer.finish(CONFIG)
    artifact = read_artifact(tmp_path / "d")
    assert artifact.tensors == ()
    assert not (tmp_path / "d" / "README.md").exists()


def test_writer_interrupted_run_resumes_to_identical_bytes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "whole")
    out = tmp_path / "d"
    with ArtifactWriter(out, run_key="key") as writer:
        for delta in deltas()[:3]:
            writer.add(delta, 0.5)
    assert not out.exists()
    with ArtifactWriter(out, run_key="key") as writer:
        assert len(writer.staging) == 3
        for number, delta in enumerate(deltas()):
            staged = writer.reuse(delta.name)
            assert (staged is not None) == (number < 3)
            if staged is None:
                writer.add(delta, 0.5)
            else:
                assert staged.entry.error == 0.5
                same_delta(staged.read(), delta)
        writer.finish(CONFIG, AUX, lambda size: f"# card, {size} bytes\n".encode())
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert neighbours(out) == ["d", "whole"]


def _staged_run(out: Path) -> list[Path]:
    with ArtifactWriter(out, run_key="key") as writer:
        for delta in deltas():
            writer.add(delta)
    return sorted((out.parent / f".{out.name}.partial").glob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_writer_torn_part_is_done_again(tmp_path: Path, damage: str) -> None:
    part = _staged_run(tmp_path / "d")[2]
    raw = bytearray(part.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
    part.write_bytes({"cut": raw[:-3], "empty": b"", "flip": raw}[damage])
    with ArtifactWriter(tmp_path / "d", run_key="key") as writer:
        assert len(writer.staging) == len(deltas()) - 1
    assert not part.exists()


def test_writer_another_run_key_starts_afresh(tmp_path: Path) -> None:
    _staged_run(tmp_path / "d")
    with ArtifactWriter(tmp_path / "d", run_key="other") as writer:
        assert len(writer.staging) == 0
    with ArtifactWriter(tmp_path / "d", run_key="key") as writer:
        assert len(writer.staging) == 0


def test_writer_second_run_at_once_raises_and_the_first_goes_on(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="key") as first:
        first.add(deltas()[0])
        with (
            pytest.raises(OutputError, match="another run"),
            ArtifactWriter(tmp_path / "d", run_key="key"),
        ):
            pass
        first.finish(CONFIG)
    assert len(read_artifact(tmp_path / "d").tensors) == 1


def test_writer_existing_output_raises_before_any_work(tmp_path: Path) -> None:
    digest = write_artifact(tmp_path / "d")
    with pytest.raises(OutputError, match="exists"):
        write_artifact(tmp_path / "d")
    assert read_digest(tmp_path / "d") == digest
    assert neighbours(tmp_path / "d") == ["d"]


def test_writer_overwrite_replaces_an_artifact(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        old = writer.finish(CONFIG)
    new = write_artifact(tmp_path / "d", overwrite=True)
    assert read_digest(tmp_path / "d") == new != old
    assert neighbours(tmp_path / "d") == ["d"]


def test_writer_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_artifact(tmp_path / "d")
    read_artifact(tmp_path / "d")


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_writer_overwrite_never_replaces_anything_else(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "d"
    precious = out
    if kind == "file":
        out.write_text("precious")
    elif kind == "folder":
        out.mkdir()
        precious = out / "thesis.txt"
        precious.write_text("precious")
    else:
        write_artifact(tmp_path / "real")
        out.symlink_to(tmp_path / "real")
        precious = tmp_path / "real" / "README.md"
    before = precious.read_text()
    with pytest.raises(OutputError, match="not a delta artifact"):
        write_artifact(out, overwrite=True)
    assert precious.read_text() == before


def test_writer_foreign_auxiliary_file_raises(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        for name in ("modeling.py", "../x", "README.md", "SHA256SUMS", "model.safetensors"):
            with pytest.raises(OutputError):
                writer.finish(CONFIG, {name: b""})
    assert not (tmp_path / "d").exists()


def test_writer_unstorable_dtype_raises(tmp_path: Path) -> None:
    values = torch.zeros(3, dtype=torch.complex64)
    delta = TensorDelta("w", (3,), (3,), False, (), DenseRows(0, values))
    with (
        ArtifactWriter(tmp_path / "d", run_key="k") as writer,
        pytest.raises(OutputError, match="w: exact"),
    ):
        writer.add(delta)


def test_writer_unwritable_parent_raises_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_artifact(tmp_path / "file" / "d")


class FailingCalls:
    """Let a function of `os` fail at its n-th call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, fail_at: int) -> None:
        self.calls = 0
        self.failed = False
        real = getattr(os, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == fail_at:
                self.failed = True
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def _try_run(out: Path, made: list[TensorDelta]) -> bool:
    try:
        with ArtifactWriter(out, run_key="key", overwrite=True) as writer:
            for delta in made:
                if writer.reuse(delta.name) is None:
                    writer.add(delta, 0.5)
            writer.finish(CONFIG, AUX)
    except OutputError:
        return False
    return True


@pytest.mark.parametrize("name", ["open", "fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_writer_os_error_at_any_call_leaves_the_output_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    out = tmp_path / "d"
    if overwrite:
        with ArtifactWriter(out, run_key="k") as writer:
            writer.finish(CONFIG)
    before = snapshot(out) if overwrite else None
    made = deltas()
    for fail_at in range(1, 60):
        with monkeypatch.context() as patch:
            failing = FailingCalls(patch, name, fail_at)
            finished = _try_run(out, made)
        if not finished:
            assert failing.failed
            assert (snapshot(out) if out.exists() else None) == before
            assert not (tmp_path / ".d.replaced").exists()
        else:
            assert len(read_artifact(out).tensors) == len(made)
            if not failing.failed:
                break  # the run has fewer calls than that: every one was tried
            # Only tidying up failed. Back to the start.
            shutil.rmtree(out)
            if before is not None:
                out.mkdir()
                for file, raw in before.items():
                    (out / file).write_bytes(raw)
        assert not (tmp_path / ".d.lock").exists()
        assert not (tmp_path / ".d.partial" / "artifact").exists()
        shutil.rmtree(tmp_path / ".d.partial", ignore_errors=True)
    else:
        pytest.fail("never ran through")
    assert fail_at > (1 if name == "rename" else 5)
    assert hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest() == read_digest(out)
    assert neighbours(out) == ["d"]
