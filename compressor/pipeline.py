"""Compress a fine-tune: compare, plan, encode one tensor at a time, publish.

At no time is more than one tensor's work in memory; what is encoded goes straight to disk, where
an interrupted run picks it up again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.artifact_config import BaseInfo, DeltaConfig
from compressor.artifact_writer import ArtifactWriter
from compressor.calibration import LazyMoments
from compressor.card import model_card
from compressor.checkpoint import DTYPE_NAMES, Checkpoint
from compressor.codecs import Codec, DenseRows, MatrixSource, TensorDelta, Term, make_encoder
from compressor.codecs.encoder import wants_inputs
from compressor.codecs.sources import WithInputs
from compressor.companions import changed_companions, dropped_companions
from compressor.draft import Job, group_of, make_job, plan_jobs
from compressor.errors import CheckpointError, InputError
from compressor.fidelity import Fidelity, measure
from compressor.identity import base_identity
from compressor.pairing import CHUNK_ELEMENTS, Pairing, is_unchanged, pair_tensors
from compressor.plan import check_ratio
from compressor.sizing import surroundings_bytes
from compressor.source import DeltaSource
from compressor.texts import load_texts, texts_digest

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the work done in it so far, and all of its work."""

ADDED_ROWS = "added rows"
_ROOM = 10_000_000  # a number of usual length, where one is not known yet


@dataclass(frozen=True, slots=True)
class Options:
    """How to compress.

    codec_options  for `make_encoder`; what is left out has the codec's default
    ratio          bytes of the fine-tune's safetensors files / bytes of the whole artifact
    base_name      what to call the base in the artifact (its Hub id); default: as given
    calibration    texts to measure KL and agreement on afterwards, or None; codecs that want their
                   layers' inputs (GPTQ) take these, or else the built-in texts
    """

    codec: str = "blockdiag"
    codec_options: dict[str, Any] = field(default_factory=dict)
    ratio: float = 32.0
    seed: int = 0
    overwrite: bool = False
    base_name: str | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise InputError(f"the ratio must be 1 or more, got {self.ratio:g}")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"the seed must be within [0, 2^63), got {self.seed}")


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written. `ratio` counts every file of the artifact."""

    path: Path
    digest: str
    n_bytes: int
    ratio: float
    n_tensors: int
    n_unchanged: int
    fidelity: dict[str, Any]


def compress(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Compress the full fine-tune `tuned` of `base` into the artifact directory `out`.

    Both are local directories or Hub ids. Raises an ImpartError; then nothing appears at `out`.
    Same inputs and options give identical bytes.
    """
    options = options or Options()
    progress = progress or _silent
    codec = make_encoder(options.codec, **options.codec_options)
    calibrated = wants_inputs(codec)
    texts = load_texts(options.calibration) if options.calibration or calibrated else []
    with Checkpoint(base) as base_files, Checkpoint(tuned) as tuned_files:
        pairing = pair_tensors(base_files, tuned_files)
        jobs, unchanged = _compare(base_files, tuned_files, pairing, progress)
        companions = changed_companions(base_files.path, tuned_files.path)
        config = _describe(base_files, tuned_files, pairing, codec, options, jobs, unchanged)
        if calibrated:
            config.finetuned_details["calibration"] = texts_digest(texts)
        planned = plan_jobs(jobs, codec, config, companions)
        key = _run_key(config, planned, tuned_files)
        with ArtifactWriter(out, run_key=key, overwrite=options.overwrite) as writer:
            names = [job.pair.name for job in planned if job.params is not None]
            inputs = LazyMoments(tuned_files.path, texts, names) if calibrated else None
            _encode_all(planned, codec, base_files, tuned_files, inputs, options, writer, progress)
            fidelity = {}
            if options.calibration:
                progress("measure", 0, 1)
                deltas = (writer.read_staged(job.pair.name) for job in planned)
                fidelity = measure(base_files, tuned_files.path, deltas, texts).to_json()
                progress("measure", 1, 1)
            config = replace(config, bytes=_byte_table(planned, writer), fidelity=fidelity)
            _check_size(config, writer, companions)
            digest = writer.finish(config, companions, lambda n: model_card(config, n).encode())
    return summarise(Path(out), digest, config, len(planned))


def summarise(out: Path, digest: str, config: DeltaConfig, n_tensors: int) -> Summary:
    """Describe the artifact just published at `out`."""
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    ratio = config.finetuned_bytes / n_bytes
    n_unchanged = len(config.unchanged)
    return Summary(out, digest, n_bytes, ratio, n_tensors, n_unchanged, config.fidelity)


def relative_error(terms: Iterable[Term], source: MatrixSource) -> float:
    """Return ``|dW_hat - dW| / |dW|`` (Frobenius), a few MiB of rows at a time."""
    m, n = source.shape
    terms = tuple(terms)
    step = max(1, CHUNK_ELEMENTS // n)
    wanted = off = 0.0
    for start in range(0, m, step):
        end = min(start + step, m)
        part = source.block(start, end, 0, n)
        wanted += _square_sum(part)
        for term in terms:
            rows = torch.arange(start, end)
            part -= term.to_dense() if end - start == m else term.rows(rows)
        off += _square_sum(part)
    if not math.isfinite(wanted):
        raise CheckpointError("NaN or infinity in the base or the fine-tune; save it again")
    return math.sqrt(off / wanted) if wanted else 0.0


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most bytes of the checkpoint have, e.g. ``bfloat16``."""
    total: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        dtype = DTYPE_NAMES[checkpoint.dtype(name)]
        total[dtype] = total.get(dtype, 0) + tensor.n_bytes
    return max(sorted(total), key=total.__getitem__)


def _compare(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, progress: Progress
) -> tuple[list[Job], list[str]]:
    """Split the parameters into those to store and the names of those the fine-tune left."""
    jobs, unchanged = [], []
    for done, pair in enumerate(pairing.pairs):
        progress("compare", done, len(pairing.pairs))
        job = make_job(tuned, pair, unchanged=is_unchanged(base, tuned, pair))
        if job is None:
            unchanged.append(pair.name)
        else:
            jobs.append(job)
    progress("compare", len(pairing.pairs), len(pairing.pairs))
    if not jobs:
        raise InputError(f"{tuned.name} equals {base.name} bit by bit: there is no delta")
    return jobs, unchanged


def _describe(
    base: Checkpoint,
    tuned: Checkpoint,
    pairing: Pairing,
    codec: Codec,
    options: Options,
    jobs: list[Job],
    unchanged: list[str],
) -> DeltaConfig:
    """The artifact's configuration before anything is encoded, with room for what comes later."""
    groups = {ADDED_ROWS if job.exact_start else group_of(job.pair) for job in jobs}
    details: dict[str, Any] = {"dtype": checkpoint_dtype(tuned)}
    if tuned.revision is not None:
        details["revision"] = tuned.revision
    if pairing.config_changes:
        details["config"] = pairing.config_changes
    if dropped := dropped_companions(base.path, tuned.path):
        details["dropped_files"] = dropped
    return DeltaConfig(
        created_by=f"impart-serve {__version__}",
        codec=codec.name,
        options=codec.options(),
        ratio_requested=options.ratio,
        finetuned_bytes=tuned.n_bytes,
        finetuned=tuned.name,
        base=base_info(base, pairing.tied, options.base_name),
        seed=options.seed,
        unchanged=tuple(unchanged),
        bytes=dict.fromkeys(groups, _ROOM),
        fidelity=Fidelity(0.12345, 0.12345, _ROOM, 100).to_json() if options.calibration else {},
        finetuned_details=details,
    )


def base_info(
    base: Checkpoint, tied: tuple[tuple[str, str], ...], name: str | None = None
) -> BaseInfo:
    """Describe the base; its parameters are counted once where they are tied."""
    twins = {alias for alias, target in tied if target in base.tensors}
    return BaseInfo(
        identity=base_identity(base.path),
        name_or_path=name or base.name,
        n_parameters=sum(
            math.prod(t.shape) for name, t in base.tensors.items() if name not in twins
        ),
        dtype=checkpoint_dtype(base),
        tied=tied,
        revision=base.revision,
    )


def _encode_all(
    jobs: list[Job],
    codec: Codec,
    base: Checkpoint,
    tuned: Checkpoint,
    inputs: LazyMoments | None,
    options: Options,
    writer: ArtifactWriter,
    progress: Progress,
) -> None:
    sizes = [math.prod(job.pair.shape) for job in jobs]
    staged = writer.staged()
    for index, job in enumerate(jobs):
        progress("encode", sum(sizes[:index]), sum(sizes))
        if job.pair.name not in staged:
            delta, error = _encode(job, codec, base, tuned, inputs, options.seed)
            writer.add(delta, error)
    progress("encode", sum(sizes), sum(sizes))


def _encode(
    job: Job,
    codec: Codec,
    base: Checkpoint,
    tuned: Checkpoint,
    inputs: LazyMoments | None,
    seed: int,
) -> tuple[TensorDelta, float | None]:
    pair = job.pair
    terms: tuple[Term, ...] = ()
    exact, error = None, None
    if job.params is not None:
        source: MatrixSource = DeltaSource(base, tuned, pair)
        hessian = None if inputs is None else inputs.get(pair.name)
        if hessian is not None:
            source = WithInputs(source, hessian)
        terms = codec.encode(pair.name, source, job.params, seed)
        error = relative_error(terms, source)
    if job.exact_start is not None:
        exact = DenseRows(job.exact_start, tuned.rows(pair.tuned_key, job.exact_start))
        if not bool(torch.isfinite(exact.values).all()):
            raise CheckpointError(f"{pair.name}: NaN or infinity in {tuned.name}; save it again")
    delta = TensorDelta(pair.name, pair.shape, pair.base_shape, pair.transposed, terms, exact)
    return delta, error


def _byte_table(jobs: list[Job], writer: ArtifactWriter) -> dict[str, int]:
    table: dict[str, int] = {}
    for job in jobs:
        total = writer.staged_bytes(job.pair.name)
        added = job.exact_bytes if job.exact_start else 0
        for group, n_bytes in ((group_of(job.pair), total - added), (ADDED_ROWS, added)):
            if n_bytes:
                table[group] = table.get(group, 0) + n_bytes
    return dict(sorted(table.items()))


def _check_size(config: DeltaConfig, writer: ArtifactWriter, companions: dict[str, bytes]) -> None:
    """Refuse to publish what missed the ratio after all: planning rests on small estimates."""
    complete = config.with_tensors(tuple(writer.staged().values()))
    total = writer.tensor_file_bytes() + surroundings_bytes(complete, companions)
    reason = "the metadata came out larger than planned"
    check_ratio(config.ratio_requested or 1.0, config.finetuned_bytes / total, reason)


def _run_key(config: DeltaConfig, jobs: list[Job], tuned: Checkpoint) -> str:
    """Name the inputs and settings: a run with the same key may take over staged tensors."""
    files = sorted({tensor.file for tensor in tuned.tensors.values()})
    record = {
        "config": asdict(config),
        "jobs": [(job.pair.name, job.params, job.exact_start) for job in jobs],
        "tuned": base_identity(tuned.path),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total
