"""Keys: made at random, shown once, kept as hashes.

A key of ours is 256 random bits, so a plain SHA-256 of it cannot be inverted by guessing. A slow
hash (argon2) would guard keys that people choose, and cost its time for every request with a wrong
one, which anybody can send.
"""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "sk-impart-"
MIN_KEY_CHARS = 16  # of a key that an operator chose
MAX_KEY_CHARS = 512
KEY_CHARS = re.compile(r"[\x21-\x7e]+")  # what an Authorization header can carry unchanged
N_ID_CHARS = 8


def new_key() -> str:
    """Return a new key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return what is kept of a key: SHA-256 in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def default_id(key_hash: str) -> str:
    """Return the id of a key that was given none."""
    return key_hash[:N_ID_CHARS]


def fault_of(key: str) -> str | None:
    """Say why a key that an operator chose cannot be one; None if it can. Never repeats it."""
    if not KEY_CHARS.fullmatch(key):
        return "must be printable ASCII without spaces, and not empty"
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        return f"must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters, has {len(key)}"
    return None
