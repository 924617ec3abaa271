"""The fidelity certificate of an artifact: recorded when it is made, or added to one that is there.

Its bytes count in the artifact's size. While the tensors are planned a stand-in that is as long
takes its place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressor import __version__
from compressor.artifact.card import model_card
from compressor.artifact.certificate import Certificate, dump_certificate, room_for
from compressor.artifact.files import (
    CERTIFICATE,
    CHECKSUMS,
    README,
    SIGNATURES,
    format_checksums,
    open_directory,
    read_checksums,
    read_if_there,
)
from compressor.artifact.identity import base_identity
from compressor.artifact.reader import read_artifact
from compressor.atomic import RunLock, publish_directory, recover_directory, write_new
from compressor.checkpoint.files import Checkpoint
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, InputError, OutputError
from compressor.measure.golden import Recorder

_CREATED_BY = f"impart-serve {__version__}"


@dataclass(frozen=True, slots=True)
class Draft:
    """A certificate that lacks what only the delta tells.

    room  bytes that are as many as it will have
    """

    recorder: Recorder
    room: bytes

    def complete(self, deltas: Mapping[str, TensorDelta]) -> bytes:
        """Measure the delta and return ``certificate.json``."""
        found = self.recorder.golden.certificate(_CREATED_BY, self.recorder.measure(deltas))
        return dump_certificate(found, len(self.room))


def draft(
    base: Checkpoint, tuned: Checkpoint, own: Path | None, names: Collection[str]
) -> Draft | str:
    """Run the fine-tune and the base over the prompts; if that cannot be done here, say why.

    own    the user's prompts; then what cannot be done is an InputError
    names  of the parameters that the artifact will hold
    """
    try:
        recorder = Recorder(base, tuned, own)
        if inside := sorted(set(names) - recorder.names):
            raise CheckpointError(f"transformers keeps {inside[0]} inside a larger tensor")
    except CheckpointError as error:
        if own is None:
            return str(error)
        raise InputError(
            f"no certificate can be made of {own}: {error}; leave --certificate-prompts out"
        ) from error
    golden = recorder.golden
    return Draft(recorder, room_for(golden.prompts, _CREATED_BY, golden.texts, golden.dtype))


@dataclass(frozen=True, slots=True)
class Certified:
    """An artifact that was given a certificate: its digest before and now."""

    certificate: Certificate
    old_digest: str
    digest: str
    was_signed: bool


def add_certificate(
    base: str | Path, tuned: str | Path, delta: Path, own: Path | None = None
) -> Certified:
    """Give the artifact `delta` a certificate, in place of one that it may have.

    The tensors stay as they are. The digest changes, and so a signature is left behind. Raises
    CheckpointError if the models cannot be run here, and an ArtifactError for another base.
    """
    with Checkpoint(base) as base_files, Checkpoint(tuned) as tuned_files:
        artifact = read_artifact(delta, base_identity=base_identity(base_files.path))
        recorder = Recorder(base_files, tuned_files, own)
        outcome = recorder.measure({tensor.name: tensor for tensor in artifact.tensors})
    found = recorder.golden.certificate(_CREATED_BY, outcome)
    card = model_card if (delta / README).is_file() else None
    with RunLock(delta):
        recover_directory(delta)
        with open_directory(delta) as directory:
            sums, digest = read_checksums(directory)
            was_signed = read_if_there(directory, SIGNATURES) is not None
        if digest != artifact.digest:
            raise OutputError(f"{delta} changed while it was certified; run again")
        text = dump_certificate(found)
        listing = format_checksums(sums | {CERTIFICATE: hashlib.sha256(text).hexdigest()})
        fresh = {CERTIFICATE: text, CHECKSUMS: listing}
        if card is not None:
            kept = sum((delta / name).stat().st_size for name in sums if name != CERTIFICATE)
            n_bytes = kept + len(text) + len(listing)
            fresh[README] = card(artifact.config, n_bytes).encode()
        _replace(delta, [name for name in sums if name != CERTIFICATE], fresh)
    return Certified(found, digest, hashlib.sha256(listing).hexdigest(), was_signed)


def _replace(folder: Path, kept: Collection[str], fresh: Mapping[str, bytes]) -> None:
    """Put a folder of the files `kept` and `fresh` into the place of `folder`."""
    staged = folder.with_name(f".{folder.name}.certified")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for name in kept:
            _link(folder / name, staged / name)
        for name, content in fresh.items():
            write_new(staged / name, [content])
        publish_directory(staged, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as stream:
            write_new(target, iter(lambda: stream.read(8 << 20), b""))
