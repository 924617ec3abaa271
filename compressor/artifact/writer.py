"""Writing a delta artifact: tensors staged one by one, resumable, then published at once.

Beside the output ``NAME`` stand, while a run lasts or after it was interrupted:

    .NAME.lock       held by the running writer
    .NAME.partial/   one verified part per finished tensor, and ``run`` naming what run it is

A later run with the same `run_key` takes the finished parts over and writes the same bytes as an
uninterrupted one; with another key it starts afresh.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from compressor.artifact.config import (
    DeltaConfig,
    TensorEntry,
    TermEntry,
    dump_config,
    dump_entry,
    load_entry,
)
from compressor.artifact.entropy import CodedTensors, code_tensors
from compressor.artifact.files import (
    CHECKSUMS,
    CONFIG,
    README,
    TENSORS,
    format_checksums,
    is_auxiliary,
)
from compressor.artifact.reader import build_delta
from compressor.artifact.tensor_file import (
    METADATA,
    Stored,
    header_bytes,
    is_storable,
    parse_tensor_file,
    storage_order,
    tensor_file_chunks,
)
from compressor.atomic import (
    RunLock,
    publish_directory,
    recover_directory,
    write_new,
)
from compressor.codecs import TensorDelta
from compressor.errors import ImpartError, OutputError

_ENTRY_KEY = "entry"
_SUFFIX = ".part"
_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """One staged tensor: its entry, and where its tensors lie in its file."""

    entry: TensorEntry
    path: Path
    tensors: dict[str, Stored]
    data_start: int


class ArtifactWriter:
    """Use as a context manager; `finish` publishes.

    out        the artifact directory to be
    run_key    names inputs and settings; staged tensors of a run with another key are discarded
    overwrite  replace an artifact that is already there (never anything else)
    resume     take over what an interrupted run with the same key has staged

    Entering takes the lock and raises OutputError if another run holds it or `out` exists.
    Leaving without `finish` keeps the staged tensors for the next run.
    """

    def __init__(
        self, out: str | Path, *, run_key: str, overwrite: bool = False, resume: bool = True
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._staging = self.out.with_name(f".{self.out.name}.partial")
        self._run_key = run_key
        self._overwrite = overwrite
        self._resume = resume
        self._parts: dict[str, _Part] = {}
        self._coded: CodedTensors | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(RunLock(self.out))
                recover_directory(self.out)
                self._check_output()
                self._take_over()
            except OSError as error:
                raise OutputError(f"cannot write {self.out}: {error.strerror}") from error
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # --- staging --------------------------------------------------------------------------------

    def staged(self) -> dict[str, TensorEntry]:
        """Return the tensors already written, by name, in their final order."""
        return {name: self._parts[name].entry for name in sorted(self._parts)}

    def staged_bytes(self, name: str) -> int:
        """Payload bytes of one staged tensor."""
        return sum(stored.n_bytes for stored in self._parts[name].tensors.values())

    def add(self, delta: TensorDelta, error: float | None = None) -> TensorEntry:
        """Write one tensor. error is the relative Frobenius error of its dW."""
        assert delta.name not in self._parts
        entry = TensorEntry(
            name=delta.name,
            shape=tuple(delta.shape),
            base_shape=tuple(delta.base_shape),
            transposed=delta.transposed,
            terms=tuple(TermEntry(term.codec, term.params()) for term in delta.terms),
            exact_row_start=None if delta.exact is None else delta.exact.row_start,
            error=error,
        )
        tensors = parts_of(delta)
        metadata = {_ENTRY_KEY: dump_entry(entry)}
        entry = load_entry(metadata[_ENTRY_KEY].encode())  # as a reader will see it
        digest = hashlib.sha256()
        for chunk in tensor_file_chunks(tensors, metadata):
            digest.update(chunk)
        path = self._staging / f"{_short(delta.name.encode())}-{digest.hexdigest()}{_SUFFIX}"
        # Not flushed: a part that a crash tore does not match the hash in its name.
        write_new(path, tensor_file_chunks(tensors, metadata), sync=False)
        header = header_bytes(tensors, metadata)
        self._parts[delta.name] = _Part(entry, path, _places(tensors), len(header))
        return entry

    def read_staged(self, name: str) -> TensorDelta:
        """Read one staged tensor back, decoded and validated as a reader of the artifact would."""
        part = self._parts[name]
        file = parse_tensor_file(part.path.read_bytes(), what=f"staged {name}")
        return build_delta(part.entry, {key: file.tensor(key) for key in file.tensors})

    def code(self, group_of: Callable[[str, bool], str]) -> CodedTensors:
        """Entropy code what was added; `finish` publishes that if its `config` has a coding.

        group_of  (name, whether of its exact rows) -> group in the byte table
        """
        names = sorted(self._parts)

        def key_group(key: str) -> str:
            index, _, inner = key.partition(".")
            return group_of(names[int(index)], inner == "exact")

        final = self._final_tensors()
        self._coded = code_tensors(final, key_group, self._reader(), self._staging / "coded")
        return self._coded

    def coded_bytes(self) -> int:
        """Return the size ``delta.safetensors`` has after `code`."""
        assert self._coded is not None
        return self._coded.n_bytes

    def tensor_file_bytes(self) -> int:
        """Return the size ``delta.safetensors`` would have now as it is, header included."""
        final = self._final_tensors()
        return len(header_bytes(final, METADATA)) + sum(s.n_bytes for s in final.values())

    # --- publishing -----------------------------------------------------------------------------

    def finish(
        self,
        config: DeltaConfig,
        aux: Mapping[str, bytes] | None = None,
        readme: bytes | Callable[[int], bytes] = b"",
    ) -> str:
        """Write all files, put the directory into place, and return its digest.

        config  its `tensors` are filled in from what was added; with a coding, `code` came before
        aux     tokenizer files and the like, by name
        readme  the model card, or a function of the bytes of all other files that returns it
        """
        aux = dict(aux or {})
        for name in aux:
            if not is_auxiliary(name):
                raise OutputError(f"{name} cannot travel in a delta artifact")
        complete = config.with_tensors(tuple(self.staged().values()))
        folder = self._staging / "artifact"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            sums, size = {}, 0
            for name, chunks in self._files(complete, aux):
                digest = hashlib.sha256()
                size += write_new(folder / name, _hashed(chunks, digest.update))
                sums[name] = digest.hexdigest()
            listing = format_checksums(sums)
            size += write_new(folder / CHECKSUMS, [listing])
            card = readme if isinstance(readme, bytes) else readme(size)
            if card:
                write_new(folder / README, [card])
            publish_directory(folder, self.out)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(f"cannot write {self.out.name}: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(self._staging, ignore_errors=True)
        return hashlib.sha256(listing).hexdigest()

    def _files(
        self, config: DeltaConfig, aux: Mapping[str, bytes]
    ) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
        yield TENSORS, self._tensor_chunks() if config.coding is None else self._coded_chunks()
        yield CONFIG, [dump_config(config)]
        for name in sorted(aux):
            yield name, [aux[name]]

    def _final_tensors(self) -> dict[str, Stored]:
        return {
            f"{index}.{key}": stored
            for index, name in enumerate(sorted(self._parts))
            for key, stored in self._parts[name].tensors.items()
        }

    def _tensor_chunks(self) -> Iterator[bytes | memoryview]:
        """Stream delta.safetensors out of the parts."""
        final = self._final_tensors()
        yield header_bytes(final, METADATA)
        read = self._reader()
        for key in storage_order(final):
            yield from read(key)

    def _coded_chunks(self) -> Iterator[bytes]:
        """Stream delta.safetensors out of what `code` left."""
        assert self._coded is not None
        yield self._coded.header
        left = self._coded.n_bytes - len(self._coded.header)
        yield from _read_range(self._coded.path, 0, left, "entropy coded tensors")

    def _reader(self) -> Callable[[str], Iterator[bytes]]:
        """A function that streams one tensor of delta.safetensors out of its part."""
        by_index = [self._parts[name] for name in sorted(self._parts)]

        def read(key: str) -> Iterator[bytes]:
            index, _, inner = key.partition(".")
            part = by_index[int(index)]
            stored = part.tensors[inner]
            start = part.data_start + stored.start
            return _read_range(part.path, start, stored.n_bytes, f"part of {part.entry.name}")

        return read

    # --- opening --------------------------------------------------------------------------------

    def _check_output(self) -> None:
        if not (self.out.exists() or self.out.is_symlink()):
            return
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            return  # an empty directory, made for us
        if not self._overwrite:
            raise OutputError(f"{self.out} exists; remove it or ask for it to be overwritten")
        if self.out.is_symlink() or not (self.out / CHECKSUMS).is_file():
            raise OutputError(f"{self.out} exists and is not a delta artifact; not overwritten")

    def _take_over(self) -> None:
        """Collect what an interrupted run with the same key has staged; else start afresh."""
        marker = self._staging / "run"
        key = _short(self._run_key.encode()).encode()
        if not self._resume or not marker.is_file() or marker.read_bytes() != key:
            if self._staging.exists():
                shutil.rmtree(self._staging)
            self._staging.mkdir()
            write_new(marker, [key])
            return
        for path in sorted(self._staging.glob(f"*{_SUFFIX}")):
            part = _read_part(path)
            if part is None:
                path.unlink()
            else:
                self._parts[part.entry.name] = part


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


def _places(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Where each tensor lies in a file written by `tensor_file_chunks`."""
    places, offset = {}, 0
    for key in storage_order(tensors):
        tensor = tensors[key]
        places[key] = Stored(tensor.dtype, tuple(tensor.shape), offset, offset + tensor.nbytes)
        offset += tensor.nbytes
    return places


def _read_part(path: Path) -> _Part | None:
    """Verify one staged part; None if it is not whole (a run killed while writing it)."""
    raw = path.read_bytes()
    if path.name.removesuffix(_SUFFIX).partition("-")[2] != hashlib.sha256(raw).hexdigest():
        return None
    try:
        file = parse_tensor_file(raw)
        entry = load_entry(file.metadata.get(_ENTRY_KEY, "").encode())
    except ImpartError:
        return None
    return _Part(entry, path, file.tensors, len(raw) - len(file.data))


def _read_range(path: Path, start: int, n_bytes: int, what: str) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while n_bytes:
            chunk = stream.read(min(n_bytes, _COPY_BYTES))
            if not chunk:
                raise OutputError(f"staged {what} was cut short")
            n_bytes -= len(chunk)
            yield chunk


def _hashed(
    chunks: Iterable[bytes | memoryview], update: Callable[[bytes | memoryview], None]
) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        update(chunk)
        yield chunk


def _short(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:24]
