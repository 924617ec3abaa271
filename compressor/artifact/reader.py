"""Reading a delta artifact: the one module the server shares with the compressor.

An artifact is a directory:

    delta.safetensors    the terms' tensors, keys ``<tensor>.<term>.<part>`` and ``<tensor>.exact``,
                         as they are or entropy coded (`coded_file`)
    delta_config.json    what they mean; see `DeltaConfig`
    tokenizer*, chat_template.jinja, generation_config.json, ...   where they differ from the base
    README.md            model card; the only file that is not covered by the digest
    certificate.json     what the fine-tune says to a few prompts, if that was recorded
    SHA256SUMS           of all the others; its own sha256 is the artifact's digest, its identity

Every file is read once into memory, compared with its checksum, and that buffer is parsed: what
was verified is what is used, whatever happens to the file meanwhile. A server opens an artifact
before it needs the weights: `open_artifact` reads all but the tensors, `read_terms` the tensors.
Both return the digest, so that the caller can tell whether they have read the same artifact.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compressor.artifact.certificate import Certificate, parse_certificate
from compressor.artifact.coded_file import decode_frames
from compressor.artifact.config import BaseInfo, DeltaConfig, TensorEntry, TermEntry, parse_config
from compressor.artifact.files import (
    CERTIFICATE,
    CONFIG,
    TENSORS,
    check_files,
    check_listing,
    check_sums,
    open_directory,
    read_checksums,
    read_verified,
)
from compressor.artifact.identity import base_identity
from compressor.artifact.settings_files import SETTINGS_FILES, check_settings_file
from compressor.artifact.tensor_file import (
    VERSION_KEY,
    TensorFile,
    parse_tensor_file,
)
from compressor.checkpoint.companions import COMPANIONS
from compressor.codecs import DenseRows, TensorDelta, term_class
from compressor.codecs.validate import is_finite
from compressor.errors import Corrupt, NonFinite, UnsupportedVersion, WrongBase, WrongShape

__all__ = [
    "Artifact",
    "BaseInfo",
    "DeltaConfig",
    "OpenedArtifact",
    "TensorEntry",
    "TermEntry",
    "base_identity",
    "check_bytes",
    "describe_artifact",
    "open_artifact",
    "read_artifact",
    "read_config",
    "read_digest",
    "read_terms",
]

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class OpenedArtifact:
    """All of an artifact but its tensors, verified: see `Artifact`, whose fields these are."""

    config: DeltaConfig
    digest: str
    path: Path
    n_bytes: int
    aux: dict[str, bytes]
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact in memory.

    tensors  one per entry of ``config.tensors``, in that order
    digest   sha256 of ``SHA256SUMS``
    n_bytes  of the whole directory on disk, model card included
    aux      the other files by name: tokenizer, chat template, generation config
    certificate  what the fine-tune says to a few prompts, if the artifact has it
    """

    config: DeltaConfig
    tensors: tuple[TensorDelta, ...]
    digest: str
    path: Path
    n_bytes: int
    aux: dict[str, bytes]
    certificate: Certificate | None = None


def read_digest(path: str | Path) -> str:
    """Return the digest an artifact claims; reads ``SHA256SUMS`` only.

    Raises NotADelta if there is none, Corrupt if it does not parse.
    """
    with open_directory(Path(path)) as directory:
        return read_checksums(directory)[1]


def check_bytes(path: str | Path) -> None:
    """Compare every file with its checksum, without keeping any of it.

    Raises NotADelta, Corrupt, TooLarge, Unreadable.
    """
    with open_directory(Path(path)) as directory:
        sums, _ = read_checksums(directory)
        check_listing(directory, sums)
        check_sums(directory, sums)


def read_config(path: str | Path) -> DeltaConfig:
    """Return the verified configuration without reading the tensors."""
    with open_directory(Path(path)) as directory:
        sums, _ = read_checksums(directory)
        return parse_config(bytes(read_verified(directory, CONFIG, sums)))


def describe_artifact(path: str | Path, *, base_identity: str) -> OpenedArtifact:
    """Check what can be checked of an artifact without reading its large files: which files there
    are, the configuration, and the files of settings (`settings_files`), which `aux` holds.

    Raises as `read_artifact` does for these.
    """
    with open_directory(Path(path)) as directory:
        opened, sums = _open(directory, Path(path), base_identity, SETTINGS_FILES)
        check_files(directory, sums)
    return opened


def open_artifact(path: str | Path, *, base_identity: str | None = None) -> OpenedArtifact:
    """Read and verify the configuration and the text files; `delta.safetensors` is not touched.

    Raises as `read_artifact` does for these files.
    """
    with open_directory(Path(path)) as directory:
        return _open(directory, Path(path), base_identity)[0]


def read_terms(
    path: str | Path, *, base_identity: str | None = None, n_threads: int = 1
) -> Artifact:
    """Read and validate the configuration and the tensors. The text files are not touched, `aux` is
    empty. Raises as `read_artifact` does for the files that are read.
    """
    return _read(Path(path), base_identity, n_threads, with_text=False)


def read_artifact(
    path: str | Path, *, base_identity: str | None = None, n_threads: int = 1
) -> Artifact:
    """Read and validate a whole artifact.

    base_identity  refuse (WrongBase) an artifact made for any other base
    n_threads      that decode tensors at once

    Raises NotADelta, Unreadable, Corrupt, TooLarge, UnsupportedVersion, WrongBase, WrongShape or
    NonFinite;
    the base and every declared size are checked before the tensors are decoded.
    """
    return _read(Path(path), base_identity, n_threads, with_text=True)


def _open(
    directory: int,
    path: Path,
    base_identity: str | None,
    texts: Collection[str] = COMPANIONS,
) -> tuple[OpenedArtifact, dict[str, str]]:
    """Everything but the tensors, and the checksums to verify those with.

    texts  which of the other files to read
    """
    sums, digest = read_checksums(directory)
    n_bytes = check_listing(directory, sums)
    config = parse_config(bytes(read_verified(directory, CONFIG, sums)))
    if base_identity is not None and config.base.identity != base_identity:
        raise WrongBase(
            f"made for base {config.base.name_or_path!r:.80} "
            f"({config.base.identity[:12]}), not for this one ({base_identity[:12]})"
        )
    names = sorted(sums.keys() & set(texts))
    aux = {name: bytes(read_verified(directory, name, sums)) for name in names}
    for name in names:
        check_settings_file(name, aux[name])
    certificate = None
    if CERTIFICATE in sums:
        certificate = parse_certificate(bytes(read_verified(directory, CERTIFICATE, sums)))
    return OpenedArtifact(config, digest, path, n_bytes, aux, certificate), sums


def _read(path: Path, base_identity: str | None, n_threads: int, *, with_text: bool) -> Artifact:
    with open_directory(path) as directory:
        opened, sums = _open(directory, path, base_identity, COMPANIONS if with_text else ())
        stored = parse_tensor_file(read_verified(directory, TENSORS, sums))
    config = opened.config
    stored = _uncoded(stored, config, n_threads)
    tensors = _decode(config, stored, n_threads)
    return Artifact(
        config, tensors, opened.digest, path, opened.n_bytes, opened.aux, opened.certificate
    )


def _uncoded(stored: TensorFile, config: DeltaConfig, n_threads: int) -> TensorFile:
    """The tensors as they are; their file is of the version that the configuration says."""
    version = stored.metadata.get(VERSION_KEY)
    if version != str(config.format_version):
        raise UnsupportedVersion(
            f"{TENSORS}: {VERSION_KEY} {version!r:.20}, {CONFIG} says {config.format_version}"
        )
    return stored if config.coding is None else decode_frames(stored, n_threads)


def _decode(config: DeltaConfig, stored: TensorFile, n_threads: int) -> tuple[TensorDelta, ...]:
    keys = _by_index(stored.tensors, len(config.tensors), TENSORS)

    def decode(index: int) -> TensorDelta:
        parts = {inner: stored.tensor(f"{index}.{inner}") for inner in keys[index]}
        return build_delta(config.tensors[index], parts)

    indices = range(len(config.tensors))
    if n_threads == 1:
        return tuple(map(decode, indices))
    with ThreadPoolExecutor(n_threads, "delta-decoder") as pool:
        return tuple(pool.map(decode, indices))


def _by_index(keys: Iterable[str], count: int, what: str) -> list[list[str]]:
    """Sort keys ``<index>.<rest>`` into `count` lists of their rests."""
    found: list[list[str]] = [[] for _ in range(count)]
    for key in keys:
        index, _, rest = key.partition(".")
        if not _INDEX.fullmatch(index) or int(index) >= count:
            raise Corrupt(f"{what}: nothing in {CONFIG} explains the tensor {key!r:.80}")
        found[int(index)].append(rest)
    return found


def build_delta(entry: TensorEntry, parts: dict[str, Tensor]) -> TensorDelta:
    """Rebuild one tensor's delta from its entry and its stored parts, validating everything.

    parts  ``<term>.<part>`` and ``exact``
    """
    exact = _exact_rows(entry, parts.pop("exact", None))
    by_term = _by_index(parts, len(entry.terms), entry.name)
    shape = entry.base_shape
    terms = []
    for index, term in enumerate(entry.terms):
        tensors = {name: parts[f"{index}.{name}"] for name in by_term[index]}
        try:
            terms.append(
                term_class(term.codec).from_parts((shape[0], shape[1]), term.params, tensors)
            )
        except (Corrupt, WrongShape, NonFinite, UnsupportedVersion) as error:
            raise type(error)(f"{entry.name}: {error}") from error
    return TensorDelta(entry.name, entry.shape, shape, entry.transposed, tuple(terms), exact)


def _exact_rows(entry: TensorEntry, values: Tensor | None) -> DenseRows | None:
    start = entry.exact_row_start
    if (start is None) != (values is None):
        raise Corrupt(f"{entry.name}: exact rows are in one of {CONFIG} and {TENSORS} only")
    if start is None or values is None:
        return None
    end = start + (values.shape[0] if values.ndim else 0)
    if tuple(values.shape[1:]) != entry.shape[1:] or not start < end <= entry.shape[0]:
        raise WrongShape(
            f"{entry.name}: exact rows {list(values.shape)} from {start} do not fit "
            f"{list(entry.shape)}"
        )
    if entry.shape[0] > entry.base_shape[0] and end < entry.shape[0]:
        raise WrongShape(f"{entry.name}: rows added to the base's are not all stored")
    if not values.dtype.is_floating_point:
        raise WrongShape(f"{entry.name}: exact rows are {values.dtype}")
    if not is_finite(values):
        raise NonFinite(f"{entry.name}: exact rows hold NaN or infinity")
    return DenseRows(start, values)
