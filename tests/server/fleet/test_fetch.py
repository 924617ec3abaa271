"""What comes from a place: resumed, held to its checksums, and bounded before it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import ArtifactRefused, SourceNotFound, StorageFull
from server.fleet.fetch import fetch_delta, read_sums
from server.fleet.files import PlaceFiles
from server.fleet.folder import ManagedFolder
from server.fleet.place import Allowed
from tests.compressor.artifacts import seal, write_artifact


class Counted(PlaceFiles):
    """Notes what is read, and may stop in the middle of a file."""

    n_bytes = 0
    stop_after: int | None = None

    def read(self, name, start=0, end=None):
        for piece in super().read(name, start, end):
            for begin in range(0, len(piece), 100):
                part = piece[begin : begin + 100]
                self.n_bytes += len(part)
                if self.stop_after is not None and self.n_bytes > self.stop_after:
                    raise ConnectionError("the network went away")
                yield part


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "source")
    return tmp_path / "source"


def files_of(source: Path) -> Counted:
    allowed = Allowed((str(source),))
    return Counted(allowed.place(str(source)), allowed)


def folder_in(tmp_path: Path, budget: int = 1 << 20) -> ManagedFolder:
    (tmp_path / "state").mkdir(exist_ok=True)
    return ManagedFolder(tmp_path / "state", budget)


def same(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in right.iterdir())
    return sorted(path.name for path in left.iterdir()) == names and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


def test_fetch_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, source: Path) -> None:
    files, folder = files_of(source), folder_in(tmp_path)
    raw = read_sums(files)
    total = sum(file.stat().st_size for file in source.iterdir())
    files.stop_after = total - 300
    with pytest.raises(ConnectionError):
        fetch_delta(files, raw, "a", folder, 1 << 20)
    folder = folder_in(tmp_path)  # the server has been started again
    again = files_of(source)
    staged = fetch_delta(again, raw, "a", folder, 1 << 20)
    assert same(staged, source)
    assert again.n_bytes < total / 2
    moved = folder.publish(staged, "a")
    assert moved is None
    assert [path.name for path in folder.path.iterdir()] == ["a"]


def test_beginning_of_other_bytes_is_fetched_again(tmp_path: Path, source: Path) -> None:
    files, folder = files_of(source), folder_in(tmp_path)
    raw = read_sums(files)
    staged = fetch_delta(files, raw, "a", folder, 1 << 20)
    (staged / "delta.safetensors").write_bytes(b"?" * 50)
    assert same(fetch_delta(files, raw, "a", folder, 1 << 20), source)


def test_what_differs_from_its_checksum_is_not_kept(tmp_path: Path, source: Path) -> None:
    files, folder = files_of(source), folder_in(tmp_path)
    raw = read_sums(files)
    (source / "delta.safetensors").write_bytes(b"?" * 50)
    with pytest.raises(ArtifactRefused, match="checksum"):
        fetch_delta(files, raw, "a", folder, 1 << 20)
    assert not list(folder.path.rglob("delta.safetensors"))


def test_size_is_known_before_anything_is_taken(tmp_path: Path, source: Path) -> None:
    files = files_of(source)
    raw = read_sums(files)
    before = files.n_bytes
    with pytest.raises(ArtifactRefused, match="--max-artifact-bytes"):
        fetch_delta(files, raw, "a", folder_in(tmp_path), 1000)
    with pytest.raises(StorageFull, match="--disk-budget-bytes"):
        fetch_delta(files, raw, "a", folder_in(tmp_path, budget=1000), 1 << 20)
    assert files.n_bytes == before


def test_file_that_the_sums_name_must_be_there(tmp_path: Path, source: Path) -> None:
    files = files_of(source)
    raw = read_sums(files)
    (source / "tokenizer.json").unlink()
    with pytest.raises(SourceNotFound, match=r"tokenizer\.json"):
        fetch_delta(files, raw, "a", folder_in(tmp_path), 1 << 20)
    seal(source)
    for bad in (b"", b"no sums\n", b"0" * 64 + b"  ../../x\n"):
        with pytest.raises(ArtifactRefused):
            fetch_delta(files, bad, "a", folder_in(tmp_path), 1 << 20)
