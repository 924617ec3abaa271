"""Fields of ``delta_config.json``, checked one by one: whatever is wrong is `Corrupt`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container
from typing import Any, NoReturn, TypeVar

from compressor.errors import Corrupt, WrongShape

_MAX_DIM = 1 << 40
_MAX_NUMBER = 1e300  # whole numbers in JSON have no bound of their own
_MAX_WHOLE = 1 << 63
_MAX_NAME = 512  # characters of a tensor's name
_MAX_TEXT = 4096  # characters of what says where something came from
_MAX_DEPTH = 16  # of options, parameters, fidelity: programs walk these recursively
_HALF_CHARACTER = re.compile(r"\\u[dD][89abAB]")
_T = TypeVar("_T")


def load_json(text: bytes, file: str = "delta_config.json") -> dict[str, Any]:
    """Parse an object: UTF-8, every key once, finite numbers, whole characters."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            corrupt("a key occurs twice", file)
        return record

    def finite(digits: str) -> float:  # also called for NaN and Infinity
        number = float(digits)
        if not math.isfinite(number):
            corrupt(f"{digits:.20} is not a number", file)
        return number

    try:
        decoded = text.decode("utf-8")  # json.loads would also guess at other encodings
        record = json.loads(
            decoded, object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
        if _HALF_CHARACTER.search(decoded):
            json.dumps(record, ensure_ascii=False).encode("utf-8")  # fails if not in a pair
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{file} does not parse: {type(error).__name__}") from error
    if not isinstance(record, dict):
        corrupt("an object is expected", file)
    return record


def check_keys(record: dict[str, Any], known: Container[str], what: str) -> None:
    """Refuse a key that this reader does not know: what it says would be ignored."""
    for key in record:
        if key not in known:
            corrupt(f"{what} has a key {key!r:.80} that no format version has")


def get(record: dict[str, Any], key: str, kind: type[_T]) -> _T:
    """Return a field that must be there, of that type."""
    value = record.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        corrupt(f"{key} should be of type {kind.__name__}")
    return value


def get_free(record: dict[str, Any], key: str) -> dict[str, Any]:
    """An object of any content, but not nested deeper than what programs can walk."""
    value = get(record, key, dict)
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    corrupt(f"{key} is nested more than {_MAX_DEPTH} deep")


def get_name(record: dict[str, Any]) -> str:
    """A tensor's name: it will stand in messages, tables and logs."""
    name = get(record, "name", str)
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        corrupt(f"{name!r:.80} is not usable as a tensor's name")
    return name


def get_text(record: dict[str, Any], key: str, max_chars: int = _MAX_TEXT) -> str:
    """Text that is shown to people and clients: not endless."""
    value = get(record, key, str)
    if len(value) > max_chars:
        corrupt(f"{key} has more than {max_chars} characters")
    return value


def get_count(record: dict[str, Any], key: str) -> int:
    """A whole number from 0 on."""
    value = get(record, key, int)
    if not 0 <= value < _MAX_WHOLE:
        corrupt(f"{key!r:.80} is out of range")
    return value


def get_number(record: dict[str, Any], key: str) -> float:
    """A finite number."""
    value = record[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _MAX_NUMBER:
        corrupt(f"{key} should be a number")
    return float(value)


def get_shape(record: dict[str, Any], key: str) -> tuple[int, ...]:
    """Sizes of a tensor; wrong ones raise WrongShape."""
    sizes = tuple(as_whole(size) for size in get(record, key, list))
    # A base may lack a tensor's rows altogether (0); nothing else is empty.
    if not 1 <= len(sizes) <= 4 or not all(0 < size <= _MAX_DIM for size in sizes[1:]):
        raise WrongShape(f"delta_config.json: {key} {list(sizes)[:5]} is not usable")
    if not (0 if key == "base_shape" else 1) <= sizes[0] <= _MAX_DIM:
        raise WrongShape(f"delta_config.json: {key} {list(sizes)} is not usable")
    return sizes


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object."""
    if not isinstance(value, dict):
        corrupt("an object is expected")
    return value


def as_pair(value: Any) -> tuple[str, str]:
    """Return `value` if it is a pair of names."""
    if not isinstance(value, list) or len(value) != 2:
        corrupt("tied should hold pairs of names")
    return as_text(value[0]), as_text(value[1])


def as_text(value: Any) -> str:
    """Return `value` if it is text."""
    if not isinstance(value, str):
        corrupt("a name is not text")
    return value


def as_whole(value: Any) -> int:
    """Return `value` if it is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        corrupt("a size is not a whole number")
    return value


def corrupt(what: str, file: str = "delta_config.json") -> NoReturn:
    """Raise Corrupt, naming the file."""
    raise Corrupt(f"{file}: {what}")
