"""What an artifact came to: bytes by group, bytes in all, and whether that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from compressor.artifact.config import CODER, Coding, DeltaConfig
from compressor.artifact.writer import ArtifactWriter
from compressor.checkpoint.groups import group_of
from compressor.errors import BudgetError
from compressor.plan.budget import check_ratio
from compressor.plan.jobs import ADDED_ROWS, Job
from compressor.plan.sizing import surroundings_bytes


def with_byte_table(
    jobs: Sequence[Job], config: DeltaConfig, writer: ArtifactWriter
) -> DeltaConfig:
    """Count what was staged by group, after coding it if that is planned and pays."""
    by_name = {job.pair.name: job for job in jobs}
    if config.coding is not None:
        coded = writer.code(lambda name, is_exact: by_name[name].byte_group(is_exact=is_exact))
        if coded.is_readable and coded.n_bytes < writer.tensor_file_bytes():
            table, raw = dict(coded.coded_bytes), dict(coded.raw_bytes)
            return replace(config, bytes=table, coding=Coding(CODER, raw))
    counted = Counter[str]()
    for name, job in by_name.items():
        added = job.exact_bytes if job.exact_start else 0
        counted[group_of(job.pair)] += writer.staged_bytes(name) - added
        counted[ADDED_ROWS] += added
    used = {group: n_bytes for group, n_bytes in sorted(counted.items()) if n_bytes}
    return replace(config, bytes=used, coding=None)


def total_bytes(
    config: DeltaConfig, writer: ArtifactWriter, companions: Mapping[str, bytes]
) -> int:
    """Bytes of the artifact that `finish` would write now, model card included."""
    complete = config.with_tensors(tuple(writer.staged().values()))
    tensors = writer.tensor_file_bytes() if config.coding is None else writer.coded_bytes()
    return tensors + surroundings_bytes(complete, companions)


def check_size(config: DeltaConfig, max_bytes: int | None, n_bytes: int) -> None:
    """Refuse to publish what missed the ratio after all: planning rests on small estimates."""
    if max_bytes is not None and n_bytes > max_bytes:
        raise BudgetError(
            f"the artifact came out {n_bytes:,} bytes large; for at most {max_bytes:,} ask for a "
            f"ratio of {1.02 * config.finetuned_bytes / max_bytes:.3g}"
        )
    requested, possible = config.ratio_requested or 1.0, config.finetuned_bytes / n_bytes
    if config.coding is None or possible < requested:  # coding may leave less than can be spent
        check_ratio(requested, possible, "the metadata came out larger than planned")
