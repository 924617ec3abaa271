"""Signatures: made by the commands, refused when anything is not as it was signed."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor.artifact.reader import read_artifact, read_digest
from compressor.artifact.signature import (
    MAX_SIGNATURES,
    load_private_key,
    load_public_key,
    parse_signatures,
    read_signatures,
    signature_of,
    signed_bytes,
    why_not_vouched,
)
from compressor.cli.app import app
from compressor.errors import Corrupt, InputError
from tests.compressor.artifacts import seal, write_artifact

FILE = "SHA256SUMS.sig"


def impart(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "delta")
    for name in ("key", "other"):
        assert impart("keygen", tmp_path / name)[0] == 0
    assert impart("sign", tmp_path / "delta", "--key", tmp_path / "key")[0] == 0
    return tmp_path / "delta"


def reason(delta: Path, *keys: str) -> str | None:
    public = [load_public_key(delta.parent / f"{key}.pub") for key in keys]
    return why_not_vouched(delta, read_digest(delta), public)


def test_sign_vouches_for_the_digest_and_leaves_it_as_it_was(signed: Path) -> None:
    write_artifact(signed.parent / "unsigned")
    assert read_artifact(signed).digest == read_digest(signed.parent / "unsigned")
    assert reason(signed, "key") is None
    assert reason(signed, "other", "key") is None
    assert "none of the keys" in (reason(signed, "other") or "")
    assert "not signed" in (reason(signed.parent / "unsigned", "key") or "")
    assert stat.S_IMODE((signed.parent / "key").stat().st_mode) == 0o600
    code, shown = impart("verify", signed, "--signed-by", signed.parent / "key.pub")
    assert (code, "signed" in shown) == (0, True)
    code, shown = impart("verify", signed, "--signed-by", signed.parent / "other.pub")
    assert (code, "none of the keys" in shown) == (2, True)
    assert load_public_key(signed.parent / "key.pub").id in impart("inspect", signed)[1]


def test_sign_again_replaces_the_own_signature_and_keeps_the_others(signed: Path) -> None:
    first = (signed / FILE).read_bytes()
    assert impart("sign", signed, "--key", signed.parent / "key")[0] == 0
    assert (signed / FILE).read_bytes() == first  # Ed25519 is deterministic
    assert impart("sign", signed, "--key", signed.parent / "other")[0] == 0
    assert len(read_signatures(signed)[0]) == 2
    assert reason(signed, "key") is None
    assert reason(signed, "other") is None


def test_openssl_verifies_what_was_signed(signed: Path, tmp_path: Path) -> None:
    (signature,) = read_signatures(signed)[0]
    (tmp_path / "sig").write_bytes(signature.raw)
    (tmp_path / "text").write_bytes(signed_bytes(read_digest(signed)))
    try:
        done = subprocess.run(
            ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "key.pub", "-rawin",
             "-in", tmp_path / "text", "-sigfile", tmp_path / "sig"],
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    assert b"Verified Successfully" in done.stdout, done.stderr


def resealed(delta: Path) -> None:
    card = delta / "delta_config.json"
    card.write_bytes(card.read_bytes() + b"\n")
    seal(delta)


def foreign_signature(delta: Path) -> None:
    """A true signature, of another artifact."""
    one = signature_of("0" * 64, load_private_key(delta.parent / "key"))
    lines = (delta / FILE).read_text()
    mine = signature_of(read_digest(delta), load_private_key(delta.parent / "key"))
    import base64

    old, new = (base64.b64encode(s.raw).decode() for s in (mine, one))
    (delta / FILE).write_text(lines.replace(old, new))


def other_name(delta: Path) -> None:
    """Another key's signature under this one's name."""
    key, other = (load_public_key(delta.parent / f"{n}.pub") for n in ("key", "other"))
    impart("sign", delta, "--key", delta.parent / "other")
    line = next(x for x in (delta / FILE).read_text().splitlines() if other.id in x)
    (delta / FILE).write_text(line.replace(other.id, key.id) + "\n")


@pytest.mark.parametrize("tamper", [resealed, foreign_signature, other_name])
def test_signature_of_other_bytes_or_another_key_is_refused(
    signed: Path, tamper: Callable[[Path], None]
) -> None:
    tamper(signed)
    assert "changed after" in (reason(signed, "key") or "")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"ed25519",
        b"rsa " + b"0" * 32 + b" " + b"A" * 86 + b"==\n",
        b"ed25519 " + b"0" * 31 + b" " + b"A" * 86 + b"==\n",
        b"ed25519 " + b"0" * 32 + b" " + b"A" * 85 + b"B==\n",  # bits beyond the last byte
        b"ed25519 " + b"0" * 32 + b" " + b"A" * 86 + b"==",
        (b"ed25519 " + b"0" * 32 + b" " + b"A" * 86 + b"==\n") * 2,
        b"".join(b"ed25519 %032x " % i + b"A" * 86 + b"==\n" for i in range(MAX_SIGNATURES + 1)),
        b"\xff\n",
    ],
)
def test_parse_signatures_of_another_form_raises_corrupt(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^SHA256SUMS\.sig"):
        parse_signatures(raw)


def test_signature_file_that_is_a_link_is_refused(signed: Path) -> None:
    (signed / FILE).rename(signed.parent / "elsewhere")
    (signed / FILE).symlink_to(signed.parent / "elsewhere")
    with pytest.raises(Corrupt, match="not a link"):
        read_signatures(signed)


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_keys_of_another_form_raise_input_error(
    signed: Path, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "wrong"
    if content is not None:
        file.write_bytes(content)
    for load in (load_public_key, load_private_key):
        with pytest.raises(InputError, match="wrong"):
            load(file)
    with pytest.raises(InputError):
        load_private_key(tmp_path / "key.pub")
    with pytest.raises(InputError):
        load_public_key(tmp_path / "key")
    assert impart("keygen", tmp_path / "key")[0] == 2  # never overwritten
