"""``impart keygen`` and ``impart sign``: who vouches for an artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import DeltaArg, look_at, reporting


@reporting
def keygen(
    keyfile: Annotated[
        Path, typer.Argument(help="File for the private key; the public one goes to KEYFILE.pub.")
    ],
) -> None:
    """Make an Ed25519 key to sign artifacts with."""
    from compressor.artifact.signature import generate_key, load_public_key
    from compressor.errors import OutputError

    private, public = generate_key()
    shown = keyfile.with_name(f"{keyfile.name}.pub")
    try:
        for path, content, mode in ((keyfile, private, 0o600), (shown, public, 0o644)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
    except FileExistsError as error:
        raise OutputError(f"{error.filename} exists; keys are never overwritten") from error
    except OSError as error:
        raise OutputError(f"cannot write {error.filename}: {error.strerror}") from error
    typer.echo(f"{keyfile}: private key, keep it secret")
    typer.echo(f"{shown}: public key {load_public_key(shown).id}")


@reporting
def sign(
    delta: DeltaArg,
    key: Annotated[Path, typer.Option(help="Private key of impart keygen.", metavar="KEYFILE")],
) -> None:
    """Vouch for DELTA as it is now: verify every byte of it and sign its digest."""
    look_at(deltas=[delta])
    from compressor.artifact.files import SIGNATURES
    from compressor.artifact.reader import read_artifact
    from compressor.artifact.signature import (
        dump_signatures,
        load_private_key,
        read_signatures,
        signature_of,
    )
    from compressor.atomic import replace_file
    from compressor.errors import InputError

    private = load_private_key(key)
    digest = read_artifact(delta).digest
    before, found = read_signatures(delta)
    if found != digest:
        raise InputError(f"{delta} changed while it was signed; run again")
    own = signature_of(digest, private)
    others = [one for one in before if one.key_id != own.key_id]
    replace_file(delta / SIGNATURES, dump_signatures([*others, own]))
    typer.echo(f"{delta}: signed by key {own.key_id}")
    typer.echo(f"digest {digest}")
