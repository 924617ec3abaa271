"""Keys are random, fit a header, and only their hashes are kept."""

from __future__ import annotations

import hashlib

import pytest

from server.tenants.keys import PREFIX, default_id, fault_of, hash_of, new_key


def test_new_key_is_another_each_time_and_can_be_a_key():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(PREFIX) and len(key) > 40 and fault_of(key) is None for key in keys)


def test_hash_of_key_is_sha256_and_its_beginning_the_default_id():
    key_hash = hash_of("sk-impart-x")
    assert key_hash == hashlib.sha256(b"sk-impart-x").hexdigest()
    assert default_id(key_hash) == key_hash[:8]


@pytest.mark.parametrize("key", ["", "short", "a key of several words", "schlüssel" * 3, "x" * 600])
def test_key_that_cannot_be_sent_or_is_weak_is_refused_without_its_text(key):
    fault = fault_of(key)
    assert fault is not None
    assert not key or key not in fault
