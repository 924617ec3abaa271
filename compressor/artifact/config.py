"""``delta_config.json``: what an artifact is, in typed form and as text.

The text is deterministic, has no clock in it, and holds one tensor a line so that it can be read
and compared with ordinary tools. Keys at their usual value are left out of a tensor's line:
``base_shape`` equal to ``shape``, ``transposed`` false, ``exact`` none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from compressor.artifact.json_fields import (
    as_object,
    as_pair,
    as_text,
    check_keys,
    corrupt,
    get,
    get_count,
    get_free,
    get_name,
    get_number,
    get_shape,
    get_text,
    load_json,
)
from compressor.codecs import Params, TensorDelta
from compressor.errors import Corrupt, NotADelta, TooLarge, UnsupportedVersion, WrongShape

FORMAT = "impart-delta"
FORMAT_VERSION = 3  # what is written
_READABLE = (1, 2, 3)  # 1: never entropy coded; 2: always; neither has codes in kernel order
CODER = "zstd"
MAX_CONFIG_BYTES = 64 << 20
_MAX_TENSORS = 1 << 20
_MAX_CODEC = 64  # characters
_MAX_FIDELITY_BYTES = 64 << 10  # as text: servers keep it, and show it of every variant
_MAX_GROUPS = 1024  # of the byte table
_HEAD = (
    "format", "format_version", "created_by", "codec", "options", "ratio_requested",
    "finetuned_bytes", "finetuned", "base", "seed", "bytes", "coding", "fidelity", "unchanged",
    "tensors",
)  # fmt: skip
_BASE = (
    "identity", "name_or_path", "n_parameters", "dtype", "tied", "untied", "revision",
    "quantisation",
)  # fmt: skip
_CODING = ("coder", "raw_bytes")
_ENTRY = ("name", "shape", "base_shape", "transposed", "terms", "exact", "error")
_TERM = ("codec", "params")
_EXACT = ("row_start",)
# Settings of config.json that choose what code runs; a delta has no business with them.
_CODE_SETTINGS = ("auto_map", "architectures", "model_type", "quantization_config")


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


def entry_of(delta: TensorDelta, error: float | None = None) -> TensorEntry:
    """What the configuration says of a tensor."""
    return TensorEntry(
        name=delta.name,
        shape=tuple(delta.shape),
        base_shape=tuple(delta.base_shape),
        transposed=delta.transposed,
        terms=tuple(TermEntry(term.codec, term.params()) for term in delta.terms),
        exact_row_start=None if delta.exact is None else delta.exact.row_start,
        error=error,
    )


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base model.

    tied          pairs of names that share one tensor
    untied        the first names of those pairs that the fine-tune has a tensor of its own for
    revision      the commit, if it came from the Hub; not needed to decode
    quantisation  how its weights are stored quantised, or were before they were converted, and
                  what they are dequantised to, for people; the delta is against those weights
    """

    identity: str
    name_or_path: str
    n_parameters: int
    dtype: str
    tied: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    quantisation: str | None = None
    untied: tuple[str, ...] = ()

    @property
    def untied_names(self) -> frozenset[str]:
        """Both names of every pair that the fine-tune has untied."""
        return frozenset(name for pair in self.tied if pair[0] in self.untied for name in pair)


@dataclass(frozen=True, slots=True)
class Coding:
    """Entropy coding of the tensors. `raw_bytes` is the table by group before it."""

    coder: str
    raw_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Everything about an artifact but its tensors' bytes.

    codec, options   what made it, resolved
    ratio_requested  fine-tune bytes / artifact bytes asked for, or None
    finetuned_bytes  bytes of the fine-tune's checkpoint on disk
    tensors          the changed ones, in the order of their indices in delta.safetensors
    unchanged        names of tensors equal to the base's, which are not stored
    bytes            table by group, as on disk
    coding           how the tensors are entropy coded, or None: they are stored as they are
    format_version   of the artifact that was read; what is written is always `FORMAT_VERSION`
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
    coding: Coding | None = None
    format_version: int = FORMAT_VERSION

    def with_tensors(self, tensors: tuple[TensorEntry, ...]) -> DeltaConfig:
        """Return a copy that describes these tensors."""
        return replace(self, tensors=tensors)


# --- to text ------------------------------------------------------------------------------------


def dump_config(config: DeltaConfig) -> bytes:
    """Return the bytes of ``delta_config.json``."""
    coding = config.coding
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
        **({} if coding is None else {"coding": asdict(coding)}),
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
    if base.untied:
        record["untied"] = list(base.untied)
    optional = {"revision": base.revision, "quantisation": base.quantisation}
    return record | {key: value for key, value in optional.items() if value is not None}


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
    record = load_json(text)
    if record.get("format") != FORMAT:
        raise NotADelta(f"delta_config.json: format is not {FORMAT!r}")
    version = _version(record)
    check_keys(record, _HEAD, "it")
    base = get(record, "base", dict)
    check_keys(base, _BASE, "base")
    finetuned = get_free(record, "finetuned")
    table = get(record, "bytes", dict)
    if len(table) > _MAX_GROUPS:
        raise TooLarge(f"delta_config.json: bytes has more than {_MAX_GROUPS} groups")
    tensors = get(record, "tensors", list)
    if len(tensors) > _MAX_TENSORS:
        raise TooLarge(f"delta_config.json: more than {_MAX_TENSORS} tensors")
    entries = tuple(parse_entry(item) for item in tensors)
    if len({entry.name for entry in entries}) != len(entries):
        raise Corrupt("delta_config.json: a tensor is listed twice")
    tied = tuple(as_pair(pair) for pair in get(base, "tied", list))
    untied = tuple(as_text(name) for name in get(base, "untied", list)) if "untied" in base else ()
    _check_untied(tied, untied, entries)
    ratio = record.get("ratio_requested")
    return DeltaConfig(
        created_by=get_text(record, "created_by"),
        codec=get_text(record, "codec", _MAX_CODEC),
        options=get_free(record, "options"),
        ratio_requested=None if ratio is None else get_number(record, "ratio_requested"),
        finetuned_bytes=get_count(record, "finetuned_bytes"),
        finetuned=get_text(finetuned, "name_or_path"),
        base=BaseInfo(
            identity=get_text(base, "identity"),
            name_or_path=get_text(base, "name_or_path"),
            n_parameters=get_count(base, "n_parameters"),
            dtype=get_text(base, "dtype"),
            tied=tied,
            untied=untied,
            revision=get_text(base, "revision") if "revision" in base else None,
            quantisation=get_text(base, "quantisation") if "quantisation" in base else None,
        ),
        seed=get_count(record, "seed"),
        tensors=entries,
        unchanged=tuple(as_text(name) for name in get(record, "unchanged", list)),
        bytes={key: get_count(table, key) for key in table},
        fidelity=_fidelity(record),
        finetuned_details=_details(finetuned),
        coding=_coding(record, version),
        format_version=version,
    )


def _check_untied(
    tied: tuple[tuple[str, str], ...], untied: tuple[str, ...], entries: tuple[TensorEntry, ...]
) -> None:
    aliases = {alias for alias, _ in tied}
    if not set(untied) <= aliases or len(set(untied)) != len(untied):
        corrupt("untied names what is not tied")
    if own := sorted({entry.name for entry in entries} & (aliases - set(untied))):
        corrupt(f"{own[0]:.80} is tied and has a tensor of its own")


def _version(record: dict[str, Any]) -> int:
    version = record.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version not in _READABLE:
        raise UnsupportedVersion(
            f"delta_config.json: format_version {version!r:.20}, this reader "
            f"knows {', '.join(map(str, _READABLE))}; upgrade impart-serve"
        )
    return version


def _coding(record: dict[str, Any], version: int) -> Coding | None:
    if version == 1 or (version > 2 and "coding" not in record):
        return None
    coding = get(record, "coding", dict)
    check_keys(coding, _CODING, "coding")
    coder = get(coding, "coder", str)
    if coder != CODER:
        raise UnsupportedVersion(
            f"delta_config.json: coder {coder!r:.20}, this reader knows {CODER}; "
            "upgrade impart-serve"
        )
    table = get(coding, "raw_bytes", dict)
    return Coding(coder, {key: get_count(table, key) for key in table})


def load_entry(line: bytes) -> TensorEntry:
    """Inverse of `dump_entry`."""
    return parse_entry(load_json(line))


def parse_entry(record: Any) -> TensorEntry:
    """Read one tensor's record."""
    if not isinstance(record, dict):
        corrupt("a tensor's entry is not an object")
    check_keys(record, _ENTRY, "a tensor's entry")
    shape = get_shape(record, "shape")
    base_shape = get_shape(record, "base_shape") if "base_shape" in record else shape
    terms = []
    for term in get(record, "terms", list) if "terms" in record else []:
        if not isinstance(term, dict):
            corrupt("a term is not an object")
        check_keys(term, _TERM, "a term")
        terms.append(TermEntry(get(term, "codec", str), get_free(term, "params")))
    exact = record.get("exact")
    if exact is not None:
        check_keys(as_object(exact), _EXACT, "exact")
    entry = TensorEntry(
        name=get_name(record),
        shape=shape,
        base_shape=base_shape,
        transposed=get(record, "transposed", bool) if "transposed" in record else False,
        terms=tuple(terms),
        exact_row_start=None if exact is None else get(exact, "row_start", int),
        error=None if record.get("error") is None else get_number(record, "error"),
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
    fidelity = get_free(record, "fidelity")
    if len(_compact(fidelity).encode()) > _MAX_FIDELITY_BYTES:
        raise TooLarge(f"delta_config.json: fidelity has more than {_MAX_FIDELITY_BYTES} bytes")
    for key in fidelity.keys() & {"kl_per_token", "top1_agreement"}:
        get_number(fidelity, key)
    for key in fidelity.keys() & {"n_tokens", "n_texts"}:
        get_count(fidelity, key)
    return fidelity


def _details(finetuned: dict[str, Any]) -> dict[str, Any]:
    details = {key: value for key, value in finetuned.items() if key != "name_or_path"}
    if "dtype" in details:
        get(details, "dtype", str)
    if "dropped_files" in details:
        for name in get(details, "dropped_files", list):
            as_text(name)
    changes = get(details, "config", dict) if "config" in details else {}
    if forbidden := sorted(changes.keys() & set(_CODE_SETTINGS)):
        corrupt(f"a delta may not set {forbidden[0]} of config.json")
    return details
