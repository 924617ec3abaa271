"""``delta_config.json``: what an artifact is, in typed form and as text.

The text is deterministic, has no clock in it, and holds one tensor a line so that it can be read
and compared with ordinary tools. Keys at their usual value are left out of a tensor's line:
``base_shape`` equal to ``shape``, ``transposed`` false, ``exact`` none.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

from compressor.codecs import Params
from compressor.errors import Corrupt, NotADelta, TooLarge, UnsupportedVersion, WrongShape

FORMAT = "impart-delta"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 64 << 20
_MAX_TENSORS = 1 << 20
_MAX_DIM = 1 << 40
_MAX_NUMBER = 1e300  # whole numbers in JSON have no bound of their own
_MAX_WHOLE = 1 << 63
_MAX_NAME = 512  # characters of a tensor's name
_MAX_DEPTH = 16  # of options, parameters, fidelity: programs walk these recursively
_HALF_CHARACTER = re.compile(r"\\u[dD][89abAB]")
# Settings of config.json that choose what code runs; a delta has no business with them.
_CODE_SETTINGS = ("auto_map", "architectures", "model_type", "quantization_config")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TermEntry:
    """One stored term: the codec that reads it and its parameters."""

    codec: str
    params: Params


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One changed tensor; see `TensorDelta`. `error` is the relative Frobenius error of dW."""

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    transposed: bool = False
    terms: tuple[TermEntry, ...] = ()
    exact_row_start: int | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base model.

    tied      pairs of names that share one tensor
    revision  the commit, if it came from the Hub; not needed to decode
    """

    identity: str
    name_or_path: str
    n_parameters: int
    dtype: str
    tied: tuple[tuple[str, str], ...] = ()
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Everything about an artifact but its tensors' bytes.

    codec, options   what made it, resolved
    ratio_requested  fine-tune bytes / artifact bytes asked for, or None
    finetuned_bytes  bytes of the fine-tune's checkpoint on disk
    tensors          the changed ones, in the order of their indices in delta.safetensors
    unchanged        names of tensors equal to the base's, which are not stored
    bytes            table by group
    fidelity         what was measured when it was made
    finetuned_details  what else `impart reconstruct` needs of the fine-tune, beside its name:
                     dtype, settings of config.json that differ, companion files it dropped;
                     and what its own card says of licence, languages and data sets
    """

    created_by: str
    codec: str
    options: dict[str, Any]
    ratio_requested: float | None
    finetuned_bytes: int
    finetuned: str
    base: BaseInfo
    seed: int
    tensors: tuple[TensorEntry, ...] = ()
    unchanged: tuple[str, ...] = ()
    bytes: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    finetuned_details: dict[str, Any] = field(default_factory=dict)

    def with_tensors(self, tensors: tuple[TensorEntry, ...]) -> DeltaConfig:
        """Return a copy that describes these tensors."""
        return replace(self, tensors=tensors)


# --- to text ------------------------------------------------------------------------------------


def dump_config(config: DeltaConfig) -> bytes:
    """Return the bytes of ``delta_config.json``."""
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_by": config.created_by,
        "codec": config.codec,
        "options": config.options,
        "ratio_requested": config.ratio_requested,
        "finetuned_bytes": config.finetuned_bytes,
        "finetuned": config.finetuned_details | {"name_or_path": config.finetuned},
        "base": _base_record(config.base),
        "seed": config.seed,
        "bytes": config.bytes,
        "fidelity": config.fidelity,
        "unchanged": list(config.unchanged),
    }
    lines = [f"{_compact(key)}: {_compact(value)}" for key, value in head.items()]
    tensors = ",\n".join(dump_entry(entry) for entry in config.tensors)
    lines.append(f'"tensors": [\n{tensors}\n]' if tensors else '"tensors": []')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _base_record(base: BaseInfo) -> dict[str, Any]:
    record: dict[str, Any] = {
        "identity": base.identity,
        "name_or_path": base.name_or_path,
        "n_parameters": base.n_parameters,
        "dtype": base.dtype,
        "tied": [list(pair) for pair in base.tied],
    }
    return record if base.revision is None else record | {"revision": base.revision}


def dump_entry(entry: TensorEntry) -> str:
    """Return one tensor's line."""
    record: dict[str, Any] = {"name": entry.name, "shape": list(entry.shape)}
    if entry.base_shape != entry.shape:
        record["base_shape"] = list(entry.base_shape)
    if entry.transposed:
        record["transposed"] = True
    if entry.terms:
        record["terms"] = [{"codec": t.codec, "params": t.params} for t in entry.terms]
    if entry.exact_row_start is not None:
        record["exact"] = {"row_start": entry.exact_row_start}
    if entry.error is not None:
        record["error"] = float(f"{entry.error:.4g}")
    return _compact(record)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# --- from text ----------------------------------------------------------------------------------


def parse_config(text: bytes) -> DeltaConfig:
    """Read ``delta_config.json``.

    Raises NotADelta for another format, UnsupportedVersion, TooLarge, WrongShape for shapes that
    contradict each other, and Corrupt for everything else that is wrong.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise TooLarge(f"delta_config.json: more than {MAX_CONFIG_BYTES >> 20} MiB")
    record = _load_json(text)
    if record.get("format") != FORMAT:
        raise NotADelta(f"delta_config.json: format is not {FORMAT!r}")
    version = record.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UnsupportedVersion(
            f"delta_config.json: format_version {version!r:.20}, this reader "
            f"knows {FORMAT_VERSION}; upgrade impart-serve"
        )
    base = _get(record, "base", dict)
    finetuned = _free(record, "finetuned")
    table = _get(record, "bytes", dict)
    tensors = _get(record, "tensors", list)
    if len(tensors) > _MAX_TENSORS:
        raise TooLarge(f"delta_config.json: more than {_MAX_TENSORS} tensors")
    entries = tuple(parse_entry(item) for item in tensors)
    if len({entry.name for entry in entries}) != len(entries):
        raise Corrupt("delta_config.json: a tensor is listed twice")
    ratio = record.get("ratio_requested")
    return DeltaConfig(
        created_by=_get(record, "created_by", str),
        codec=_get(record, "codec", str),
        options=_free(record, "options"),
        ratio_requested=None if ratio is None else _number(record, "ratio_requested"),
        finetuned_bytes=_count(record, "finetuned_bytes"),
        finetuned=_get(finetuned, "name_or_path", str),
        base=BaseInfo(
            identity=_get(base, "identity", str),
            name_or_path=_get(base, "name_or_path", str),
            n_parameters=_count(base, "n_parameters"),
            dtype=_get(base, "dtype", str),
            tied=tuple(_pair(pair) for pair in _get(base, "tied", list)),
            revision=_get(base, "revision", str) if "revision" in base else None,
        ),
        seed=_count(record, "seed"),
        tensors=entries,
        unchanged=tuple(_text(name) for name in _get(record, "unchanged", list)),
        bytes={key: _count(table, key) for key in table},
        fidelity=_fidelity(record),
        finetuned_details=_details(finetuned),
    )


def load_entry(line: bytes) -> TensorEntry:
    """Inverse of `dump_entry`."""
    return parse_entry(_load_json(line))


def parse_entry(record: Any) -> TensorEntry:
    """Read one tensor's record."""
    if not isinstance(record, dict):
        _corrupt("a tensor's entry is not an object")
    shape = _shape(record, "shape")
    base_shape = _shape(record, "base_shape") if "base_shape" in record else shape
    terms = []
    for term in _get(record, "terms", list) if "terms" in record else []:
        if not isinstance(term, dict):
            _corrupt("a term is not an object")
        terms.append(TermEntry(_get(term, "codec", str), _free(term, "params")))
    exact = record.get("exact")
    entry = TensorEntry(
        name=_name(record),
        shape=shape,
        base_shape=base_shape,
        transposed=_get(record, "transposed", bool) if "transposed" in record else False,
        terms=tuple(terms),
        exact_row_start=None if exact is None else _get(_object(exact), "row_start", int),
        error=None if record.get("error") is None else _number(record, "error"),
    )
    _check_entry(entry)
    return entry


def _check_entry(entry: TensorEntry) -> None:
    """Shapes agree, and rows the base lacks are stored exactly."""
    shape, base = entry.shape, entry.base_shape
    if len(shape) != len(base) or shape[1:] != base[1:] or shape[0] < base[0]:
        raise WrongShape(
            f"{entry.name}: shape {list(shape)} cannot grow from the base's {list(base)}"
        )
    if entry.terms and len(shape) != 2:
        raise WrongShape(f"{entry.name}: terms need a matrix, shape is {list(shape)}")
    start = entry.exact_row_start
    if start is not None and not 0 <= start < shape[0]:
        raise WrongShape(f"{entry.name}: exact rows start at {start}, outside {shape[0]} rows")
    if shape[0] > base[0] and (start is None or start > base[0]):
        raise WrongShape(f"{entry.name}: rows added to the base's are not all stored")


def _fidelity(record: dict[str, Any]) -> dict[str, Any]:
    """What was measured; the numbers that are shown have the right types."""
    fidelity = _free(record, "fidelity")
    for key in fidelity.keys() & {"kl_per_token", "top1_agreement"}:
        _number(fidelity, key)
    for key in fidelity.keys() & {"n_tokens", "n_texts"}:
        _count(fidelity, key)
    return fidelity


def _details(finetuned: dict[str, Any]) -> dict[str, Any]:
    details = {key: value for key, value in finetuned.items() if key != "name_or_path"}
    if "dtype" in details:
        _get(details, "dtype", str)
    if "dropped_files" in details:
        for name in _get(details, "dropped_files", list):
            _text(name)
    changes = _get(details, "config", dict) if "config" in details else {}
    if forbidden := sorted(changes.keys() & set(_CODE_SETTINGS)):
        _corrupt(f"a delta may not set {forbidden[0]} of config.json")
    return details


def _load_json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            _corrupt("a key occurs twice")
        return record

    def finite(digits: str) -> float:  # also called for NaN and Infinity
        number = float(digits)
        if not math.isfinite(number):
            _corrupt(f"{digits:.20} is not a number")
        return number

    try:
        decoded = text.decode("utf-8")  # json.loads would also guess at other encodings
        record = json.loads(
            decoded, object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
        if _HALF_CHARACTER.search(decoded):
            json.dumps(record, ensure_ascii=False).encode("utf-8")  # fails if not in a pair
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"delta_config.json does not parse: {type(error).__name__}") from error
    return _object(record)


def _get(record: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = record.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        _corrupt(f"{key} should be of type {kind.__name__}")
    return value


def _free(record: dict[str, Any], key: str) -> dict[str, Any]:
    """An object of any content, but not nested deeper than what programs can walk."""
    value = _get(record, key, dict)
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
    _corrupt(f"{key} is nested more than {_MAX_DEPTH} deep")


def _name(record: dict[str, Any]) -> str:
    """A tensor's name: it will stand in messages, tables and logs."""
    name = _get(record, "name", str)
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        _corrupt(f"{name!r:.80} is not usable as a tensor's name")
    return name


def _count(record: dict[str, Any], key: str) -> int:
    value = _get(record, key, int)
    if not 0 <= value < _MAX_WHOLE:
        _corrupt(f"{key!r:.80} is out of range")
    return value


def _number(record: dict[str, Any], key: str) -> float:
    value = record[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _MAX_NUMBER:
        _corrupt(f"{key} should be a number")
    return float(value)


def _shape(record: dict[str, Any], key: str) -> tuple[int, ...]:
    sizes = tuple(_whole(size) for size in _get(record, key, list))
    # A base may lack a tensor's rows altogether (0); nothing else is empty.
    if not 1 <= len(sizes) <= 4 or not all(0 < size <= _MAX_DIM for size in sizes[1:]):
        raise WrongShape(f"delta_config.json: {key} {list(sizes)[:5]} is not usable")
    if not (0 if key == "base_shape" else 1) <= sizes[0] <= _MAX_DIM:
        raise WrongShape(f"delta_config.json: {key} {list(sizes)} is not usable")
    return sizes


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _corrupt("an object is expected")
    return value


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        _corrupt("tied should hold pairs of names")
    return _text(value[0]), _text(value[1])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _corrupt("a name is not text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _corrupt("a size is not a whole number")
    return value


def _corrupt(what: str) -> NoReturn:
    raise Corrupt(f"delta_config.json: {what}")
