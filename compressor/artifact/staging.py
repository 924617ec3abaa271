"""Encoded tensors on disk until an artifact is published: each written once, verified, resumable.

A part is a small safetensors file of one tensor, named by what was asked for (its key) and by the
hash of its bytes. Whoever asks for the same key again, in a later pass, another trial of `auto` or
a later run, finds the part instead of encoding once more; nobody keeps decoded tensors.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compressor.artifact.config import TensorEntry, dump_entry, entry_of, load_entry
from compressor.artifact.reader import build_delta
from compressor.artifact.tensor_file import (
    Stored,
    header_bytes,
    is_storable,
    parse_tensor_file,
    storage_order,
    tensor_file_chunks,
)
from compressor.atomic import write_new
from compressor.codecs import TensorDelta
from compressor.errors import ImpartError, OutputError

_ENTRY_KEY = "entry"
_SUFFIX, _UNFINISHED = ".part", ".tmp"
_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """One encoded tensor on disk.

    entry       what the configuration will say of it
    parts       by their keys in delta.safetensors without the tensor's index
    data_start  where the parts' offsets count from in the file
    """

    entry: TensorEntry
    path: Path
    parts: dict[str, Stored]
    data_start: int

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def n_bytes(self) -> int:
        """Of all parts."""
        return sum(stored.n_bytes for stored in self.parts.values())

    def read(self) -> TensorDelta:
        """Return the tensor, decoded and validated as by a reader of the artifact."""
        file = parse_tensor_file(self.path.read_bytes(), what=f"staged {self.name}")
        return build_delta(self.entry, {key: file.tensor(key) for key in file.tensors})

    def chunks(self, key: str) -> Iterator[bytes]:
        """Stream one part's bytes."""
        stored = self.parts[key]
        n_bytes = stored.n_bytes
        with self.path.open("rb") as stream:
            stream.seek(self.data_start + stored.start)
            while n_bytes:
                chunk = stream.read(min(n_bytes, _COPY_BYTES))
                if not chunk:
                    raise OutputError(f"the staged part of {self.name} was cut short")
                n_bytes -= len(chunk)
                yield chunk


class StagedDeltas(Mapping[str, TensorDelta]):
    """Staged tensors by name, read anew at each access: a whole model's are never in memory.

    changed  tensors in memory, which stand for the staged ones of the same names
    """

    def __init__(
        self, staged: Iterable[StagedTensor] = (), changed: Mapping[str, TensorDelta] | None = None
    ) -> None:
        self.staged = {tensor.name: tensor for tensor in staged}
        self.changed = dict(changed or {})

    def __getitem__(self, name: str) -> TensorDelta:
        return self.changed[name] if name in self.changed else self.staged[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.staged | self.changed)

    def __len__(self) -> int:
        return len(self.staged | self.changed)

    def entries(self) -> tuple[TensorEntry, ...]:
        """What the configuration says of the staged ones, by name."""
        return tuple(self.staged[name].entry for name in sorted(self.staged))

    def with_changes(self, changed: Mapping[str, TensorDelta]) -> StagedDeltas:
        """Return the same tensors but for these."""
        return StagedDeltas(self.staged.values(), self.changed | dict(changed))


class Staging:
    """The parts of one run in a folder of their own.

    run_key  names the inputs: parts of a run with another key are discarded
    resume   take over what an interrupted run with the same key left
    """

    def __init__(self, folder: Path, run_key: str, *, resume: bool = True) -> None:
        self.folder = folder
        self._known: dict[str, StagedTensor] = {}
        marker, name = folder / "run", _short(run_key).encode()
        if resume and marker.is_file() and marker.read_bytes() == name:
            self._take_over()
            return
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        write_new(marker, [name])

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> StagedTensor | None:
        """Return what was added under `key`, in this run or one that it took over."""
        return self._known.get(_short(key))

    def add(self, key: str, delta: TensorDelta, error: float | None = None) -> StagedTensor:
        """Write one tensor under `key`, which replaces what was there.

        error  the relative Frobenius error of its dW
        """
        tensors = parts_of(delta)
        metadata = {_ENTRY_KEY: dump_entry(entry_of(delta, error))}
        digest = hashlib.sha256()
        # Not flushed: a part that a crash tore does not match the hash in its name.
        unfinished = self.folder / f"{_short(key)}{_UNFINISHED}"
        write_new(unfinished, hashed(tensor_file_chunks(tensors, metadata), digest), sync=False)
        path = self.folder / f"{_short(key)}-{digest.hexdigest()}{_SUFFIX}"
        before = self._known.get(_short(key))
        try:
            unfinished.replace(path)
            if before is not None and before.path != path:
                before.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {path.name}: {error.strerror}") from error
        staged = StagedTensor(
            entry=load_entry(metadata[_ENTRY_KEY].encode()),  # as a reader will see it
            path=path,
            parts=_places(tensors),
            data_start=len(header_bytes(tensors, metadata)),
        )
        self._known[_short(key)] = staged
        return staged

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_over(self) -> None:
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            path.unlink()
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            staged = _read_part(path)
            if staged is None:
                path.unlink()
            else:
                self._known[path.name.partition("-")[0]] = staged


def parts_of(delta: TensorDelta) -> dict[str, Tensor]:
    """Return what is stored of one tensor: ``<term>.<part>`` and ``exact``."""
    tensors = {
        f"{index}.{name}": part
        for index, term in enumerate(delta.terms)
        for name, part in term.tensors().items()
    }
    if delta.exact is not None:
        tensors["exact"] = delta.exact.values
    for key, part in tensors.items():
        if not is_storable(part.dtype):
            raise OutputError(f"{delta.name}: {key} is {part.dtype}, which the format lacks")
    return tensors


def hashed(
    chunks: Iterable[bytes | memoryview], digest: hashlib._Hash
) -> Iterator[bytes | memoryview]:
    """Pass the chunks on and hash them."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _places(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Where each tensor lies in a file written by `tensor_file_chunks`."""
    places, offset = {}, 0
    for key in storage_order(tensors):
        tensor = tensors[key]
        places[key] = Stored(tensor.dtype, tuple(tensor.shape), offset, offset + tensor.nbytes)
        offset += tensor.nbytes
    return places


def _read_part(path: Path) -> StagedTensor | None:
    """Verify one part; None if it is not whole (a run killed while writing it)."""
    raw = path.read_bytes()
    if path.name.removesuffix(_SUFFIX).partition("-")[2] != hashlib.sha256(raw).hexdigest():
        return None
    try:
        file = parse_tensor_file(raw)
        entry = load_entry(file.metadata.get(_ENTRY_KEY, "").encode())
    except ImpartError:
        return None
    return StagedTensor(entry, path, file.tensors, len(raw) - len(file.data))


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:24]
