"""What `impart inspect` and `impart verify` say about an artifact."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.artifact.certificate import Certificate
from compressor.artifact.config import DeltaConfig, TensorEntry
from compressor.artifact.files import CERTIFICATE, SIGNATURES
from compressor.artifact.identity import base_identity
from compressor.artifact.reader import Artifact, read_artifact
from compressor.artifact.signature import read_signatures
from compressor.artifact.wording import (
    ERROR_MEANS,
    certified,
    choice,
    difference_from,
    ignored_settings,
    measured,
    stored_as,
)
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import read_layout
from compressor.codecs import TensorDelta
from compressor.errors import WrongShape
from compressor.printable import printable


@dataclass(frozen=True, slots=True)
class Inspection:
    """A verified artifact, described. `files` are the bytes of every file by name."""

    config: DeltaConfig
    digest: str
    files: dict[str, int]
    certificate: Certificate | None
    signed_by: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def ratio(self) -> float:
        return self.config.finetuned_bytes / self.n_bytes

    def to_json(self) -> dict[str, Any]:
        config = self.config
        return {
            "digest": self.digest,
            "codec": config.codec,
            "options": config.options,
            "created_by": config.created_by,
            "seed": config.seed,
            "ratio": self.ratio,
            "ratio_requested": config.ratio_requested,
            "bytes": self.n_bytes,
            "finetuned_bytes": config.finetuned_bytes,
            "finetuned": config.finetuned,
            "base": {
                "identity": config.base.identity,
                "name_or_path": config.base.name_or_path,
                "n_parameters": config.base.n_parameters,
                "dtype": config.base.dtype,
                "tied": [list(pair) for pair in config.base.tied],
                "quantisation": config.base.quantisation,
            },
            "difference_from": config.finetuned_details.get("difference_from"),
            "groups": self.groups(),
            "coding": None if config.coding is None else asdict(config.coding),
            "files": self.files,
            "n_tensors": len(config.tensors),
            "n_unchanged": len(config.unchanged),
            "relative_error": self.mean_error(),
            "ignored_config": config.finetuned_details.get("ignored_config", {}),
            "fidelity": config.fidelity,
            "certificate": None if self.certificate is None else self.certificate.summary(),
            "signed_by": list(self.signed_by),
        }

    def groups(self) -> dict[str, int]:
        """Bytes of everything, by what it is; their sum is the directory's size."""
        files = dict(self.files)
        tensors = files.pop("delta.safetensors")
        groups = dict(self.config.bytes)
        groups["tensor file header"] = tensors - sum(groups.values())
        groups["configuration"] = files.pop("delta_config.json")
        card_and_sums = files.pop("README.md", 0) + files.pop("SHA256SUMS")
        card_and_sums += files.pop(SIGNATURES, 0)
        groups["model card and checksums"] = card_and_sums
        if CERTIFICATE in files:
            groups["certificate"] = files.pop(CERTIFICATE)
        if files:
            groups["tokenizer and generation files"] = sum(files.values())
        return groups

    def mean_error(self) -> float | None:
        """Mean of the encoded tensors' relative errors, each weighted by its elements."""
        known = [
            (math.prod(entry.base_shape), entry.error)
            for entry in self.config.tensors
            if entry.error is not None
        ]
        if not known:
            return None
        return sum(n * error for n, error in known) / sum(n for n, _ in known)


def inspect_artifact(path: Path) -> Inspection:
    """Verify the whole artifact (checksums, shapes, values) and describe it."""
    artifact = read_artifact(path)
    files = {f.name: f.stat().st_size for f in path.iterdir() if not f.name.startswith(".")}
    return Inspection(
        artifact.config,
        artifact.digest,
        dict(sorted(files.items())),
        artifact.certificate,
        tuple(signature.key_id for signature in read_signatures(path)[0]),
    )


def check(path: Path, base: str | Path | None) -> Artifact:
    """Verify an artifact, and that it was made for `base` and fits its shapes."""
    if base is None:
        return read_artifact(path)
    with Checkpoint(base) as checkpoint:
        artifact = read_artifact(path, base_identity=base_identity(checkpoint.path))
        layout = read_layout(checkpoint.path).with_untied(artifact.config.base.untied)
    for delta in artifact.tensors:
        parameter = layout.parameters.get(delta.name)
        if parameter is None or not parameter.takes(delta):
            raise WrongShape(f"{delta.name}: the base has no such parameter of that shape")
    return artifact


def print_inspection(
    inspection: Inspection, console: Console, *, with_tensors: bool = False
) -> None:
    """Print the tables of `impart inspect`."""
    config = inspection.config
    asked = f" ({config.ratio_requested:g} asked for)" if config.ratio_requested else ""
    about = Table.grid(padding=(0, 2))
    rows = [
        ("fine-tune", f"{config.finetuned} ({config.finetuned_bytes:,} bytes)"),
        (
            "base",
            f"{config.base.name_or_path} ({config.base.n_parameters:,} parameters)"
            f"{stored_as(config.base)}",
        ),
        ("base identity", config.base.identity),
        *(("difference from", text) for text in [difference_from(config)] if text),
        ("digest", inspection.digest),
        ("codec", f"{config.codec} {_options(config.options)}"),
        ("settings", _settings(config.tensors)),
        *choice(config),
        *(("untied", name) for name in config.base.untied),
        *(("not the fine-tune's", line) for line in ignored_settings(config)),
        ("ratio", f"{inspection.ratio:.2f}{asked}, {inspection.n_bytes:,} bytes in all"),
        ("tensors", f"{len(config.tensors)} stored, {len(config.unchanged)} as in the base"),
        *(("fidelity", line) for line in measured(config.fidelity) or ["not measured"]),
        ("certificate", certified(inspection.certificate)),
        *(("signed by key", f"{key_id} (not verified)") for key_id in inspection.signed_by),
        *_error(inspection),
        ("made by", f"{config.created_by}, seed {config.seed}"),
    ]
    for name, value in rows:
        about.add_row(Text(name, style="bold"), _text(value))
    console.print(about)
    console.print(_byte_table(inspection))
    if with_tensors:
        console.print(_tensor_table(config.tensors))


def describe_stored(artifact: Artifact) -> str:
    """Summarise a verified artifact in one line."""
    n_terms = sum(len(delta.terms) for delta in artifact.tensors)
    n_exact = sum(_n_exact(delta) for delta in artifact.tensors)
    return f"{len(artifact.tensors)} tensors, {n_terms} terms, {n_exact} exact rows and values"


def _byte_table(inspection: Inspection) -> Table:
    """Bytes on disk by group; beside them, where they are entropy coded, the bytes before."""
    coding, n_all = inspection.config.coding, inspection.n_bytes
    raw = {} if coding is None else coding.raw_bytes
    table = Table("group", "bytes", "share", *(["before coding"] if raw else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for group, n_bytes in inspection.groups().items():
        before = f"{raw[group]:,}" if group in raw else ""
        row = _text(group), f"{n_bytes:,}", f"{n_bytes / n_all:.1%}", before
        table.add_row(*row[: len(table.columns)])
    table.add_row("total", f"{n_all:,}", "100.0%")
    return table


def _n_exact(delta: TensorDelta) -> int:
    return 0 if delta.exact is None else len(delta.exact.values)


def _tensor_table(entries: tuple[TensorEntry, ...]) -> Table:
    table = Table("tensor", "shape", "stored as", "error")
    for entry in entries:
        stored = [f"{t.codec} {_options(t.params)}" for t in entry.terms]
        if entry.exact_row_start is not None:
            stored.append(f"exact from row {entry.exact_row_start}")
        error = "" if entry.error is None else f"{entry.error:.3g}"
        shape = "x".join(map(str, entry.shape))
        table.add_row(_text(entry.name), shape, _text("; ".join(stored)), error)
    return table


def _text(value: str) -> Text:
    """Text of an artifact's making: no markup, no control characters."""
    return Text(printable(value))


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items() if key != "auto")


def _error(inspection: Inspection) -> list[tuple[str, str]]:
    error = inspection.mean_error()
    return [] if error is None else [("relative error", f"{error:.3g} ({ERROR_MEANS})")]


def _settings(entries: tuple[TensorEntry, ...]) -> str:
    """The few most frequent settings of matrices, e.g. ``n_blocks 8 (180), n_blocks 9 (31)``."""
    telling = ("n_blocks", "rank", "n_rows", "kept")
    found = Counter(
        f"{key} {term.params[key]}"
        for entry in entries
        for term in entry.terms
        for key in telling
        if key in term.params
    )
    shown = [f"{setting} ({count})" for setting, count in found.most_common(4)]
    return ", ".join(shown + ["..."] * (len(found) > len(shown))) or "none"
