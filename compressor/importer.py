"""Turn a PEFT LoRA adapter into a `lowrank` artifact that holds its factors exactly."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from compressor import __version__
from compressor.artifact_config import DeltaConfig
from compressor.artifact_writer import ArtifactWriter
from compressor.card import model_card
from compressor.checkpoint import Checkpoint
from compressor.companions import changed_companions
from compressor.draft import group_of
from compressor.errors import InputError
from compressor.layout import read_layout
from compressor.peft import CONFIG_FILE, Adapter
from compressor.pipeline import Options, Progress, Summary, base_info, checkpoint_dtype, summarise


def import_adapter(
    base: str | Path, adapter: Path, out: str | Path, options: Options, progress: Progress
) -> Summary:
    """Write the artifact. Of `options` only `overwrite` and `base_name` apply.

    Nothing is compressed: the factors are what was trained, and a ratio is not applicable.
    """
    if options.calibration is not None:
        raise InputError(
            "--calibration measures what compression lost; an imported adapter is exact"
        )
    with Checkpoint(base) as base_files, Adapter(adapter) as opened:
        layout = read_layout(base_files.path)
        config = DeltaConfig(
            created_by=f"impart-serve {__version__}",
            codec="lowrank",
            options={"imported": "peft"},
            ratio_requested=None,
            finetuned_bytes=opened.n_bytes,
            finetuned=opened.name,
            base=base_info(base_files, layout.tied, options.base_name),
            seed=options.seed,
            finetuned_details={"dtype": checkpoint_dtype(base_files)},
        )
        companions = changed_companions(base_files.path, adapter)
        table: dict[str, int] = {}
        with ArtifactWriter(
            out, run_key=_run_key(config, opened), overwrite=options.overwrite
        ) as w:
            staged = w.staged()
            for delta in opened.deltas(base_files):
                if delta.name not in staged:
                    w.add(delta, 0.0 if delta.terms else None)
                group = group_of(layout.parameters[delta.name])
                table[group] = table.get(group, 0) + w.staged_bytes(delta.name)
                progress("import", len(w.staged()), len(opened.tensors))
            if not table:
                raise InputError(f"{adapter}: the adapter changes nothing; it was never trained")
            stored = w.staged()
            unchanged = tuple(name for name in layout.parameters if name not in stored)
            config = replace(config, bytes=dict(sorted(table.items())), unchanged=unchanged)
            digest = w.finish(config, companions, lambda n: model_card(config, n).encode())
    return summarise(Path(out), digest, config, len(stored))


def _run_key(config: DeltaConfig, adapter: Adapter) -> str:
    digest = hashlib.sha256(repr(config).encode())
    digest.update((adapter.path / CONFIG_FILE).read_bytes())
    for file in sorted({tensor.file for tensor in adapter.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
