"""Bounds on a JSON body that is not parsed yet: a scan of its bytes.

A body of four megabytes is little text, and a million lists. What takes time is the number of
values, most of all of lists and objects: each is an allocation that the collector looks at, and
while they are made nothing else of the process runs. The scan is numpy's, which lets other threads
run meanwhile; parsing does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server.errors import InvalidRequest

MAX_VALUES = 1 << 18  # numbers, strings, lists and objects, all together
MAX_STRINGS = 1 << 16  # keys among them
MAX_CONTAINERS = 1 << 15  # lists and objects
MAX_DEPTH = 64

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]


def check_bounds(raw: bytes) -> None:
    """Refuse a body with too many values, strings, lists or objects, or too deep.

    Raises InvalidRequest. Whether it is JSON at all is not looked at: what its quotation marks make
    strings is left out, and brackets and commas are counted in the rest. An empty list or object
    counts as two values.
    """
    data = np.frombuffer(raw, np.uint8)
    opening = np.flatnonzero((data == ord("[")) | (data == ord("{")))
    n_commas = np.count_nonzero(data == ord(","))
    n_quotes = np.count_nonzero(data == ord('"'))
    if (
        len(opening) <= MAX_DEPTH
        and n_commas <= MAX_VALUES - MAX_DEPTH
        and n_quotes <= 2 * MAX_STRINGS
    ):
        return  # most bodies: even if nothing of it were text
    quotes = _quotes(data)
    if len(quotes) > 2 * MAX_STRINGS:
        raise InvalidRequest(f"The body holds more than {MAX_STRINGS} strings. Send less at once.")
    opening = _outside(quotes, opening)
    if len(opening) > MAX_CONTAINERS:
        raise InvalidRequest(
            f"The body holds more than {MAX_CONTAINERS} lists and objects. Send less at once."
        )
    commas = _outside(quotes, np.flatnonzero(data == ord(",")))
    if len(opening) + len(commas) > MAX_VALUES:
        raise InvalidRequest(
            f"The body holds more than {MAX_VALUES} values. Send fewer token ids at once, or text."
        )
    closing = _outside(quotes, np.flatnonzero((data == ord("]")) | (data == ord("}"))))
    if _depth(opening, closing) > MAX_DEPTH:
        raise InvalidRequest(f"The body is nested too deeply: at most {MAX_DEPTH} levels.")


def _quotes(data: Bytes) -> Places:
    """Where the quotation marks are that begin or end a string: those that no backslash escapes,
    before which there is an even number of them.
    """
    quotes = np.flatnonzero(data == ord('"'))
    slashes = np.flatnonzero(data == ord("\\"))
    if not len(slashes):
        return quotes
    numbers = np.arange(len(slashes))
    begins_run = np.diff(slashes, prepend=-2) != 1
    run_begin = np.maximum.accumulate(np.where(begins_run, numbers, 0))
    last = np.searchsorted(slashes, quotes) - 1  # the last backslash before each
    follows = (last >= 0) & (slashes[last] == quotes - 1)
    is_escaped = follows & ((last - run_begin[last]) % 2 == 0)
    unescaped: Places = quotes[~is_escaped]
    return unescaped


def _outside(quotes: Places, places: Places) -> Places:
    """Those of the places that are in no string."""
    found: Places = places[np.searchsorted(quotes, places) % 2 == 0]
    return found


def _depth(opening: Places, closing: Places) -> int:
    """How many brackets are open at once, at the most."""
    n_closed = np.searchsorted(closing, opening)
    return int((np.arange(1, len(opening) + 1) - n_closed).max(initial=0))
