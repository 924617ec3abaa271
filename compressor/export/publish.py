"""Artifacts to the Hub and back: verified before they leave, and before they are seen here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.artifact.config import BaseInfo
from compressor.artifact.files import (
    CERTIFICATE,
    CHECKSUMS,
    CONFIG,
    README,
    SIGNATURES,
    TENSORS,
    open_directory,
    read_checksums,
)
from compressor.artifact.reader import read_artifact
from compressor.atomic import RunLock, publish_directory, recover_directory
from compressor.checkpoint.companions import COMPANIONS
from compressor.checkpoint.hub import HubRef, commit_files, download, parse_ref
from compressor.checkpoint.outputs import check_free
from compressor.errors import InputError, OutputError
from compressor.printable import printable

SCHEME = "hf://"
FILES = (CONFIG, TENSORS, CHECKSUMS, README, SIGNATURES, CERTIFICATE, *COMPANIONS)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is on the Hub now. notes: for the user."""

    url: str
    digest: str
    n_bytes: int
    notes: tuple[str, ...]


def hub_ref(text: str) -> HubRef:
    """Read ``hf://org/name``, with ``@revision`` or not. Raises InputError."""
    ref = parse_ref(text.removeprefix(SCHEME))
    if ref is None or not text.startswith(SCHEME) or "/" not in ref.repo:
        raise InputError(f"{text}: expected hf://org/name or hf://org/name@revision")
    return ref


def push_artifact(delta: Path, target: str, *, private: bool | None = None) -> Pushed:
    """Verify the artifact `delta` and make it all that the repository holds of an artifact.

    target   ``hf://org/name``, with a branch or not; the repository is made if there is none
    private  of one that is made; None: as the Hub does it for the owner

    One commit, so that nobody sees half of it. Raises an ArtifactError for an artifact that is not
    whole, InputError for a repository that holds something else.
    """
    ref = hub_ref(target)
    artifact = read_artifact(delta)
    with open_directory(delta) as directory:
        names = [*read_checksums(directory)[0], CHECKSUMS]
    names += [name for name in (README, SIGNATURES) if (delta / name).is_file()]
    url = commit_files(ref, delta, names, replaced=FILES, check=_check_kept, private=private)
    return Pushed(url, artifact.digest, artifact.n_bytes, tuple(_notes(artifact.config.base)))


def pull_artifact(source: str, out: Path, *, overwrite: bool = False) -> str:
    """Fetch an artifact from ``hf://org/name`` into the directory `out`; return its digest.

    Nothing appears there before all of it is verified. Raises CheckpointError if it cannot be
    fetched, an ArtifactError if it is not whole.
    """
    ref = hub_ref(source)
    check_free(out, overwrite=overwrite)
    if out.is_symlink() or (out.exists() and any(out.iterdir()) and not _is_artifact(out)):
        raise OutputError(f"{out} exists and is not a delta artifact; not overwritten")
    staged = out.with_name(f".{out.name}.pulled")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with RunLock(out):
            recover_directory(out)
            download(ref, staged, FILES)  # what an interrupted run has fetched stays there
            shutil.rmtree(staged / ".cache", ignore_errors=True)
            try:
                digest = read_artifact(staged).digest
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
            publish_directory(staged, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    return digest


def _is_artifact(path: Path) -> bool:
    return (path / CHECKSUMS).is_file()


def _notes(base: BaseInfo) -> Iterator[str]:
    if parse_ref(base.name_or_path) is None or "/" not in base.name_or_path:
        yield (
            f"warning: the model card names the base {printable(base.name_or_path)}, which is no "
            "Hub id; correct base_model there, or compress with --base-name"
        )


def _check_kept(there: Sequence[str]) -> None:
    """Refuse a repository with other files: what is pulled from it would be no artifact."""
    other = [name for name in there if name not in FILES and not name.startswith(".")]
    if other:
        raise InputError(
            f"the repository holds {other[0]}, which is no part of an artifact; push to one of "
            "the artifact's own"
        )
