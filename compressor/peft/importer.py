"""Turn a PEFT LoRA adapter into a `lowrank` artifact that holds its factors exactly."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.artifact.card import model_card, own_facts
from compressor.artifact.config import DeltaConfig, TensorEntry, entry_of
from compressor.artifact.settings_files import companions_of
from compressor.artifact.writer import ArtifactWriter
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import group_of
from compressor.checkpoint.layout import Layout, read_layout
from compressor.checkpoint.outputs import check_output
from compressor.checkpoint.writer import DTYPES
from compressor.compress.describe import base_info, checkpoint_dtype, warn_if_unservable
from compressor.compress.options import DEFAULT_RATIO, Options, Summary, summarise
from compressor.errors import InputError
from compressor.peft.adapter import Adapter
from compressor.peft.config import CONFIG_FILE
from compressor.peft.rescaled import RescaleEncoder
from compressor.progress import Progress

RESCALE_BITS = 4  # of DoRA's rescaled rows, if none are asked for


def import_adapter(
    base: str | Path,
    adapter: Path,
    out: str | Path,
    options: Options,
    progress: Progress,
    *,
    exact: bool = False,
    adapter_name: str | None = None,
) -> Summary:
    """Write the artifact. Of `options` only `overwrite`, `base_name` and, for DoRA, some apply.

    Nothing of a LoRA is compressed: the factors are what was trained, and a ratio means nothing.
    A DoRA layer's factors are kept as exactly; the rescaling of the base's rows that comes with
    them, or that IA3 is, has full rank. It is stored `ratio` times smaller than the base's matrix,
    as unbiased `blockdiag` of ``codec_options["bits"]`` bits; with `exact`, such layers are stored
    whole.
    `adapter_name` says which adapter is meant, if the file holds several.
    """
    check_output(out, [base, adapter])
    if options.calibration is not None:
        raise InputError(
            "--calibration measures what compression lost; an imported adapter is exact"
        )
    if options.max_bytes is not None or options.max_kl is not None:
        raise InputError("--max-bytes and --max-kl are for full fine-tunes, not for adapters")
    with Checkpoint(base) as base_files, Adapter(adapter, adapter_name) as opened:
        layout = opened.layout(base_files)
        tied = read_layout(base_files.path).tied
        rescale = None if exact else _plan_rescaling(base_files, opened, options)
        config = DeltaConfig(
            created_by=f"impart-serve {__version__}",
            codec="lowrank",
            options={"imported": "peft"}
            | ({"adapter": adapter_name} if adapter_name is not None else {})
            | _rescale_options(rescale),
            ratio_requested=None,
            finetuned_bytes=opened.n_bytes,
            finetuned=opened.name,
            base=base_info(base_files, tied, options.base_name, tuple(layout.borrowed)),
            seed=options.seed,
            finetuned_details={"dtype": checkpoint_dtype(base_files)}
            | ({"card": facts} if (facts := own_facts(opened.path)) else {}),
        )
        companions = companions_of(base_files.path, adapter)
        key = _run_key(config, opened)
        with ArtifactWriter(
            out, run_key=key, overwrite=options.overwrite, resume=options.resume
        ) as writer:
            config, notes = _store(layout, base_files, opened, config, rescale, writer, progress)
            digest = writer.finish(config, companions, lambda n: model_card(config, n).encode())
    return summarise(
        Path(out), digest, config, len(layout.parameters) - len(config.unchanged), notes
    )


def _plan_rescaling(base: Checkpoint, adapter: Adapter, options: Options) -> RescaleEncoder | None:
    """None for an adapter without learned lengths."""
    shapes = adapter.rescaled_shapes(base)
    if not shapes:
        return None
    itemsize = DTYPES[checkpoint_dtype(base)].itemsize
    bits = options.codec_options.get("bits", RESCALE_BITS)
    ratio = options.ratio if options.ratio is not None else DEFAULT_RATIO
    return RescaleEncoder.fit(shapes, itemsize, ratio, bits, options.seed)


def _rescale_options(rescale: RescaleEncoder | None) -> dict[str, Any]:
    if rescale is None:
        return {}
    return {"dora": {"ratio": rescale.ratio} | rescale.codec.options()}


def _store(
    layout: Layout,
    base: Checkpoint,
    adapter: Adapter,
    config: DeltaConfig,
    rescale: RescaleEncoder | None,
    writer: ArtifactWriter,
    progress: Progress,
) -> tuple[DeltaConfig, tuple[str, ...]]:
    """Write every delta; return the configuration that describes them, and notes."""
    details = dict(config.finetuned_details)
    names = list(layout.parameters)
    stored: dict[str, TensorEntry] = {}
    for delta in adapter.deltas(base, rescale):
        if writer.reuse(delta.name) is None:
            error = rescale.errors.get(delta.name, 0.0) if rescale else 0.0
            writer.add(delta, error if delta.terms else None)
        stored[delta.name] = entry_of(delta)
        parameter = layout.parameters[delta.name]
        if parameter.kind == "embedding" and delta.shape != delta.base_shape:
            details["config"] = {"vocab_size": delta.shape[0]}
        progress("import", names.index(delta.name), len(names))
    progress("import", len(names), len(names))
    if not stored:
        raise InputError(f"{adapter.name}: the adapter changes nothing; it was never trained")
    notes = warn_if_unservable(base, stored.values())
    written = writer.write_tensors(
        group_of=lambda entry, is_exact: group_of(layout.parameters[entry.name])
    )
    described = replace(
        config,
        tensors=tuple(stored[name] for name in sorted(stored)),
        bytes=written.stored,
        unchanged=tuple(name for name in names if name not in stored),
        finetuned_details=details,
    )
    return described, notes


def _run_key(config: DeltaConfig, adapter: Adapter) -> str:
    digest = hashlib.sha256(repr(config).encode())
    digest.update((adapter.path / CONFIG_FILE).read_bytes())
    for file in sorted({tensor.file for tensor in adapter.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
