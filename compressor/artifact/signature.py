"""``SHA256SUMS.sig``: who vouches for an artifact, by Ed25519 over its digest.

The digest covers every byte that is used, so a signature of it does. It lies beside ``SHA256SUMS``
and is in no checksum: an artifact can be signed, or signed anew, without becoming another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.artifact.files import SIGNATURES, open_directory, read_checksums, read_if_there
from compressor.errors import Corrupt, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNATURES = 16
_LINE = re.compile(r"ed25519 ([0-9a-f]{32}) ([A-Za-z0-9+/]{86}==)")
_CONTEXT = "impart-delta-signature 1"
_MAX_KEY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One who may vouch for artifacts. raw: the 32 bytes of RFC 8032."""

    raw: bytes

    @property
    def id(self) -> str:
        """What signatures name the key by: 32 hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()[:32]

    def accepts(self, signature: bytes, digest: str) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, signed_bytes(digest))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Signature:
    """One line of the file."""

    key_id: str
    raw: bytes


def signed_bytes(digest: str) -> bytes:
    """What is signed for an artifact of this digest."""
    return f"{_CONTEXT}\n{digest}\n".encode("ascii")


def generate_key() -> tuple[bytes, bytes]:
    """Return a new private key (PKCS #8) and its public one (SubjectPublicKeyInfo), both PEM."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def load_public_key(file: Path) -> PublicKey:
    """Read a public key in PEM. Raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = forms.load_pem_public_key(_key_bytes(file))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(
            f"{file} holds no Ed25519 public key in PEM; impart keygen makes one (KEYFILE.pub)"
        )
    return PublicKey(key.public_bytes_raw())


def load_private_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key in PEM. Raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = forms.load_pem_private_key(_key_bytes(file), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"{file} holds no Ed25519 private key in PEM (without a password); impart keygen "
            "makes one"
        )
    return key


def signature_of(digest: str, key: Ed25519PrivateKey) -> Signature:
    """Sign an artifact's digest."""
    public = PublicKey(key.public_key().public_bytes_raw())
    return Signature(public.id, key.sign(signed_bytes(digest)))


def dump_signatures(signatures: Sequence[Signature]) -> bytes:
    """Return the bytes of ``SHA256SUMS.sig``: a line each, sorted."""
    lines = (f"ed25519 {one.key_id} {base64.b64encode(one.raw).decode()}" for one in signatures)
    return "".join(f"{line}\n" for line in sorted(lines)).encode("ascii")


def parse_signatures(raw: bytes) -> tuple[Signature, ...]:
    """Parse ``SHA256SUMS.sig``. Raises Corrupt."""
    lines = raw.decode("latin-1").split("\n")
    if lines.pop() != "" or not 1 <= len(lines) <= MAX_SIGNATURES:
        raise Corrupt(f"{SIGNATURES} should have 1 to {MAX_SIGNATURES} whole lines")
    found = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise Corrupt(f"{SIGNATURES} does not parse")
        try:
            found.append(Signature(match[1], base64.b64decode(match[2], validate=True)))
        except binascii.Error:
            raise Corrupt(f"{SIGNATURES} does not parse") from None
    if dump_signatures(found) != raw or len({one.key_id for one in found}) != len(found):
        raise Corrupt(f"{SIGNATURES} is not sorted, or names a key twice")
    return tuple(found)


def read_signatures(path: str | Path) -> tuple[tuple[Signature, ...], str]:
    """Return an artifact's signatures, none if it has no file of them, and its digest.

    Raises NotADelta, Unreadable, Corrupt, TooLarge.
    """
    with open_directory(Path(path)) as directory:
        _, digest = read_checksums(directory)
        raw = read_if_there(directory, SIGNATURES)
    return () if raw is None else parse_signatures(raw), digest


def why_not_vouched(path: Path, digest: str, keys: Collection[PublicKey]) -> str | None:
    """Say why none of `keys` vouches for these bytes, None if one does.

    Raises as `read_signatures` does.
    """
    signatures, found = read_signatures(path)
    if not signatures:
        return "it is not signed, and a signature is required; sign it with impart sign"
    known = {key.id: key for key in keys}
    own = [one for one in signatures if one.key_id in known]
    if not own:
        return "it is signed, but by none of the keys that are required"
    if found != digest or not any(known[one.key_id].accepts(one.raw, digest) for one in own):
        return "its signature is not one of these bytes: they were changed after it was made"
    return None


def _key_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
