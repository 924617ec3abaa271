"""Bounds on a JSON body that is not parsed yet: a scan of its bytes, at the speed of `bytes.count`.

A body of four megabytes is little text, and a million lists. What takes time is the number of
values, most of all of lists and objects: each is an allocation that the collector looks at, and
while they are made nothing else of the process runs.
"""

from __future__ import annotations

from itertools import accumulate

from server.errors import InvalidRequest

MAX_VALUES = 1 << 18  # numbers, strings, lists and objects, all together
MAX_CONTAINERS = 1 << 15  # lists and objects
MAX_DEPTH = 64
MAX_KEYS = 2048  # of one object

_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


def check_bounds(raw: bytes) -> None:
    """Refuse a body with too many values, lists or objects, or too deep. Raises InvalidRequest.

    Whether it is JSON at all is not looked at: commas and brackets are counted outside of what its
    quotation marks make strings. An empty list or object counts as two values.
    """
    if _n_containers(raw) <= MAX_DEPTH and raw.count(b",") <= MAX_VALUES - MAX_DEPTH:
        return  # most bodies: even if nothing of it were text
    outside = _without_strings(raw)
    n_containers = _n_containers(outside)
    if n_containers > MAX_CONTAINERS:
        raise InvalidRequest(
            f"The body holds more than {MAX_CONTAINERS} lists and objects. Send less at once."
        )
    if n_containers + outside.count(b",") > MAX_VALUES:
        raise _too_many_values()
    if _depth(outside) > MAX_DEPTH:
        raise InvalidRequest(f"The body is nested too deeply: at most {MAX_DEPTH} levels.")


def _n_containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _without_strings(raw: bytes) -> bytes:
    """What is outside of strings. Raises InvalidRequest: too many of them."""
    # From left to right, so that a backslash before a quotation mark is one that escapes it.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    if plain.count(b'"') > 4 * MAX_VALUES:  # each value may have a key
        raise _too_many_values()
    return b"".join(plain.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    brackets = outside.translate(None, _NO_BRACKET)
    # "[" is 0x5b and "{" 0x7b; their counterparts are two further.
    return max(accumulate(1 if b in (0x5B, 0x7B) else -1 for b in brackets), default=0)


def _too_many_values() -> InvalidRequest:
    return InvalidRequest(
        f"The body holds more than {MAX_VALUES} values. Send fewer token ids at once, or text."
    )
