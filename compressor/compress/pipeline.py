"""Compress a fine-tune: compare, plan, encode one tensor at a time, publish.

At no time is more than one tensor's work in memory; what is encoded goes straight to disk, where
an interrupted run picks it up again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.artifact.card import model_card, own_facts
from compressor.artifact.config import CODER, Coding, DeltaConfig
from compressor.artifact.identity import base_identity
from compressor.artifact.writer import ArtifactWriter
from compressor.auto.goal import CodecChoice, Inputs
from compressor.auto.search import choose
from compressor.checkpoint.companions import changed_companions, dropped_companions
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import group_of
from compressor.checkpoint.pairing import CHUNK_ELEMENTS, Pairing, is_unchanged, pair_tensors
from compressor.codecs import DenseRows, MatrixSource, TensorDelta, Term
from compressor.compress.describe import base_info, checkpoint_dtype
from compressor.compress.options import AUTO, Options, Summary, summarise
from compressor.encoders.codec import Codec, make_encoder, wants_inputs
from compressor.encoders.sources import WithInputs
from compressor.errors import CheckpointError, InputError
from compressor.measure.fidelity import Fidelity, measure
from compressor.measure.moments import LazyMoments
from compressor.measure.texts import load_texts, texts_digest
from compressor.plan.coding import Plan, plan_coded, replanned
from compressor.plan.final_size import check_size, total_bytes, with_byte_table
from compressor.plan.jobs import ADDED_ROWS, Job, make_job
from compressor.progress import Progress, silent

_PASSES = 5  # of encoding at most, where coding did not leave what was expected
_ROOM = 10_000_000  # a number of usual length, where one is not known yet


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
    progress = progress or silent
    codec = None if options.codec == AUTO else make_encoder(options.codec, **options.codec_options)
    if codec is None and options.codec_options:
        raise InputError(
            f"auto chooses {', '.join(options.codec_options)} itself; name a --codec to set it"
        )
    calibrated = codec is not None and wants_inputs(codec)
    is_measured = codec is not None and options.calibration is not None
    texts = load_texts(options.calibration) if is_measured or calibrated else []
    with Checkpoint(base) as base_files, Checkpoint(tuned) as tuned_files:
        pairing = pair_tensors(base_files, tuned_files)
        jobs, unchanged = _compare(base_files, tuned_files, pairing, progress)
        companions = changed_companions(base_files.path, tuned_files.path)
        names = [job.pair.name for job in jobs if job.is_encoded]
        inputs = LazyMoments(tuned_files.path, texts, names) if calibrated else None
        run = _Run(
            base_files, tuned_files, pairing, options, jobs, unchanged, companions, texts, inputs
        )
        chosen = _choose(run, codec, progress)
        for passes_left in reversed(range(_PASSES)):
            key = _run_key(chosen.config, chosen.jobs, tuned_files)
            with ArtifactWriter(
                out, run_key=key, overwrite=options.overwrite, resume=options.resume
            ) as writer:
                _encode_all(run, chosen, writer, progress)
                config = with_byte_table(chosen.jobs, chosen.config, writer)
                n_bytes = total_bytes(config, writer, companions)
                again = _replan(run, chosen, config, n_bytes) if passes_left else None
                if again is not None:
                    chosen = again
                    continue
                if is_measured:
                    progress("measure", 0, 1)
                    deltas = (writer.read_staged(job.pair.name) for job in chosen.jobs)
                    found = measure(base_files, tuned_files.path, deltas, texts)
                    config = replace(config, fidelity=found.to_json())
                    progress("measure", 1, 1)
                n_bytes = total_bytes(config, writer, companions)
                check_size(config, options.goal.max_bytes, n_bytes)
                digest = writer.finish(config, companions, partial(_card, config))
                break
    return summarise(Path(out), digest, config, len(chosen.jobs), chosen.notes)


@dataclass(frozen=True, slots=True)
class _Run:
    """One compression: the pair, what is asked for, and what is to be stored."""

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    options: Options
    jobs: list[Job]
    unchanged: list[str]
    companions: dict[str, bytes]
    texts: list[str]
    inputs: LazyMoments | None

    def source(self, job: Job) -> MatrixSource:
        source = DeltaSource(self.base, self.tuned, job.pair, self.options.device)
        hessian = None if self.inputs is None else self.inputs.get(job.pair.name)
        return source if hessian is None else WithInputs(source, hessian)


def _choose(run: _Run, codec: Codec | None, progress: Progress) -> CodecChoice:
    """Settings of every tensor, and the configuration that describes them; no codec: auto."""
    options = run.options
    if codec is None:
        inputs = Inputs(
            base=run.base,
            tuned=run.tuned,
            jobs=run.jobs,
            companions=run.companions,
            n_parameters=sum(math.prod(tensor.shape) for tensor in run.tuned.tensors.values()),
            configure=partial(_describe, run),
            encode=partial(_encode_afresh, run),
            own_texts=options.calibration,
            device=options.device,
            tune=options.tune,
        )
        return choose(inputs, options.goal, progress)
    ratio = options.goal.ratio
    assert ratio is not None
    config = _describe(run, codec, codec.options(), ratio)
    if options.calibration:
        room = Fidelity(0.12345, 0.12345, _ROOM, 100).to_json()
        config = replace(config, fidelity=room)
    encode = partial(_encode_afresh, run, codec=codec)
    plan = plan_coded(run.jobs, codec, config, run.companions, encode)
    return CodecChoice(codec, plan.jobs, plan.config, (), gain=plan.gain)


def relative_error(terms: Iterable[Term], source: MatrixSource) -> float:
    """Return ``|dW_hat - dW| / |dW|`` (Frobenius), a few MiB of rows at a time."""
    m, n = source.shape
    terms = tuple(terms)
    step = max(1, CHUNK_ELEMENTS // n)
    wanted = off = 0.0
    for start in range(0, m, step):
        end = min(start + step, m)
        part = source.block(start, end, 0, n).cpu()
        wanted += _square_sum(part)
        for term in terms:
            rows = torch.arange(start, end)
            part -= term.to_dense() if end - start == m else term.dense_rows(rows)
        off += _square_sum(part)
    if not math.isfinite(wanted):
        raise CheckpointError("NaN or infinity in the base or the fine-tune; save it again")
    return math.sqrt(off / wanted) if wanted else 0.0


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


def _describe(run: _Run, codec: Codec, options: dict[str, Any], ratio: float) -> DeltaConfig:
    """The artifact's configuration before anything is encoded, with room for what comes later."""
    base, tuned, pairing = run.base, run.tuned, run.pairing
    groups = {ADDED_ROWS if job.exact_start else group_of(job.pair) for job in run.jobs}
    table = dict.fromkeys(groups, _ROOM)
    details: dict[str, Any] = {"dtype": checkpoint_dtype(tuned)}
    if tuned.revision is not None:
        details["revision"] = tuned.revision
    if run.inputs is not None:
        details["calibration"] = texts_digest(run.texts)
    if pairing.config_changes:
        details["config"] = pairing.config_changes
    if dropped := dropped_companions(base.path, tuned.path):
        details["dropped_files"] = dropped
    if facts := own_facts(tuned.path):
        details["card"] = facts
    return DeltaConfig(
        created_by=f"impart-serve {__version__}",
        codec=codec.name,
        options=options,
        ratio_requested=ratio,
        finetuned_bytes=tuned.n_bytes,
        finetuned=tuned.name,
        base=base_info(base, pairing.tied, run.options.base_name),
        seed=run.options.seed,
        unchanged=tuple(run.unchanged),
        bytes=table,
        finetuned_details=details,
        coding=Coding(CODER, dict.fromkeys(groups, _ROOM))
        if run.options.entropy == CODER
        else None,
    )


def _encode_all(run: _Run, chosen: CodecChoice, writer: ArtifactWriter, progress: Progress) -> None:
    sizes = [math.prod(job.pair.shape) for job in chosen.jobs]
    staged = writer.staged()
    for index, job in enumerate(chosen.jobs):
        progress("encode", sum(sizes[:index]), sum(sizes))
        name = job.pair.name
        if name not in staged:
            source = run.source(job) if job.params is not None else None
            known = chosen.deltas.get(name)
            delta = known or _encode(run, job, chosen.codec, source)
            error = relative_error(delta.terms, source) if source is not None else None
            writer.add(delta, error)
    progress("encode", sum(sizes), sum(sizes))


def _encode_afresh(run: _Run, job: Job, codec: Codec) -> TensorDelta:
    return _encode(run, job, codec, run.source(job) if job.params is not None else None)


def _encode(run: _Run, job: Job, codec: Codec, source: MatrixSource | None) -> TensorDelta:
    pair, tuned = job.pair, run.tuned
    terms: tuple[Term, ...] = ()
    exact = None
    if job.params is not None and source is not None:
        terms = codec.encode(pair.name, source, job.params, run.options.seed)
    if job.exact_start is not None:
        exact = DenseRows(job.exact_start, tuned.read_rows(pair.tuned_key, job.exact_start))
        if not bool(torch.isfinite(exact.values).all()):
            raise CheckpointError(f"{pair.name}: NaN or infinity in {tuned.name}; save it again")
    return TensorDelta(pair.name, pair.shape, pair.base_shape, pair.transposed, terms, exact)


def _replan(
    run: _Run, chosen: CodecChoice, written: DeltaConfig, n_bytes: int
) -> CodecChoice | None:
    """A better plan where this one missed the size; what `auto` measured stays as it is."""
    if chosen.deltas:
        return None
    plan = Plan(chosen.jobs, chosen.config, chosen.gain)
    again = replanned(plan, chosen.codec, run.companions, written, n_bytes)
    if again is None:
        return None
    return replace(chosen, jobs=again.jobs, config=again.config, gain=again.gain)


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


def _card(config: DeltaConfig, n_bytes: int) -> bytes:
    return model_card(config, n_bytes).encode()


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
