"""Compress a fine-tune: compare, plan, encode one tensor at a time, publish.

At no time is more than one tensor's work in memory, beside the models that `auto` and calibration
run: what is encoded goes straight to disk, where a later pass, another trial or a run that takes
up an interrupted one finds it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.artifact.assembly import TensorBytes
from compressor.artifact.card import model_card, own_facts
from compressor.artifact.config import CODER, Coding, DeltaConfig
from compressor.artifact.files import CERTIFICATE
from compressor.artifact.identity import identity_of
from compressor.artifact.settings_files import companions_of
from compressor.artifact.staging import StagedDeltas, StagedTensor
from compressor.artifact.writer import ArtifactWriter
from compressor.auto.goal import Chosen, Inputs
from compressor.auto.search import choose
from compressor.checkpoint.companions import dropped_companions
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.original import pair_with_original
from compressor.checkpoint.outputs import check_output
from compressor.checkpoint.pairing import Pairing, TensorPair, is_unchanged, pair_tensors, to_store
from compressor.compress.certify import Draft, draft
from compressor.compress.describe import (
    base_info,
    checkpoint_dtype,
    named,
    warn_if_unservable,
    warn_of_rounding,
)
from compressor.compress.encoding import Encoder
from compressor.compress.options import AUTO, Options, Summary, summarise
from compressor.encoders.codec import Codec, make_encoder, wants_inputs
from compressor.errors import InputError
from compressor.measure.fidelity import measure
from compressor.measure.heaviness import heavy_warnings, mean_error, relative_change
from compressor.measure.moments import LazyMoments
from compressor.measure.texts import file_digest, load_texts, texts_digest
from compressor.plan.settings import Planner, with_bytes
from compressor.plan.size import artifact_bytes, check_size, groups_by_entry
from compressor.progress import Progress, counted, silent, whole


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
    original = options.difference_from
    models = [base, tuned] if original is None else [base, tuned, original]
    files = [file for file in (options.calibration, options.certificate_prompts) if file]
    check_output(out, models, files)
    progress = progress or silent
    codec = None if options.codec == AUTO else make_encoder(options.codec, **options.codec_options)
    if codec is None and options.codec_options:
        raise InputError(
            f"auto chooses {', '.join(options.codec_options)} itself; name a --codec to set it"
        )
    with ExitStack() as stack:
        base_files, tuned_files = (stack.enter_context(Checkpoint(one)) for one in (base, tuned))
        if original is None:
            source = base_files
            pairing = pair_tensors(base_files, tuned_files, options.ignore_config)
        else:
            source = stack.enter_context(Checkpoint(original))
            pairing = pair_with_original(base_files, source, tuned_files, options.ignore_config)
        warned = warn_of_rounding(base_files) if original is None else ()
        companions = companions_of(base_files.path, tuned_files.path)
        texts = _calibration(options, codec)
        config = _describe(base_files, source, tuned_files, pairing, options, texts)
        with ArtifactWriter(
            out,
            run_key=_run_key(config, options, tuned_files),
            overwrite=options.overwrite,
            resume=options.resume,
        ) as writer:
            pairs, unchanged = _compare(source, tuned_files, pairing, progress)
            unserved = warn_if_unservable(base_files, pairs)
            drafted = _draft(base_files, tuned_files, pairs, options, progress)
            if isinstance(drafted, Draft):
                companions = {**companions, CERTIFICATE: drafted.room}
            run = _Run(
                base=base_files,
                original=source,
                tuned=tuned_files,
                options=options,
                config=replace(config, unchanged=tuple(unchanged)),
                pairs=pairs,
                companions=companions,
                texts=texts,
                writer=writer,
                progress=progress,
            )
            made = _with_auto(run) if codec is None else _with_codec(run, codec)
            card = partial(_card, made.config.with_tensors(made.deltas.entries()))
            if isinstance(drafted, Draft):
                with whole(progress, "certify"):
                    companions[CERTIFICATE] = drafted.complete(made.deltas)
            digest = writer.finish(made.config, companions, card)
    uncertified = [drafted] if isinstance(drafted, str) else []
    notes = (*warned, *unserved, *pairing.notes, *made.notes, *uncertified)
    return summarise(Path(out), digest, made.config, len(pairs), notes)


@dataclass(frozen=True, slots=True)
class _Run:
    """One compression: the pair, what is asked for, what is to be stored, and where it goes.

    original  what differences are taken from: the base, or what it was quantised from
    config  the artifact's, as far as it is known before anything is encoded
    texts   of calibration, for codecs that are measured by them or want their layers' inputs
    """

    base: Checkpoint
    original: Checkpoint
    tuned: Checkpoint
    options: Options
    config: DeltaConfig
    pairs: list[TensorPair]
    companions: Mapping[str, bytes]
    texts: Sequence[str]
    writer: ArtifactWriter
    progress: Progress

    def encoder(self, inputs: LazyMoments | None = None) -> Encoder:
        """What encodes the pair's tensors into the writer's staging folder."""
        options = self.options
        return Encoder(
            self.original, self.tuned, self.writer.staging, options.seed, options.device, inputs
        )

    def write(self, pairs: Sequence[TensorPair], staged: Sequence[StagedTensor]) -> TensorBytes:
        """Write delta.safetensors."""
        coded = self.config.coding is not None
        with whole(self.progress, "write"):
            return self.writer.write_tensors(staged, groups_by_entry(pairs), coded=coded)


@dataclass(frozen=True, slots=True)
class _Made:
    """Tensors are written; this says the rest, and what they are."""

    config: DeltaConfig
    deltas: StagedDeltas
    notes: tuple[str, ...] = ()


def _with_codec(run: _Run, codec: Codec) -> _Made:
    """Encode with one codec's settings."""
    options = run.options
    config = replace(
        run.config,
        codec=codec.name,
        options=codec.options(),
        ratio_requested=options.goal.ratio,
    )
    names = [pair.name for pair in run.pairs if pair.is_encoded]
    inputs = LazyMoments(run.tuned.path, run.texts, names) if wants_inputs(codec) else None

    def with_fidelity(config: DeltaConfig, staged: Sequence[StagedTensor]) -> DeltaConfig:
        if options.calibration is None:
            return config
        deltas = (tensor.read() for tensor in staged)
        with whole(run.progress, "measure"):
            unchanged = () if run.original is run.base else config.unchanged
            found = measure(run.base, run.tuned.path, deltas, run.texts, unchanged)
        return replace(config, fidelity=found.to_json())

    planner = Planner(codec, config, run.companions, run.encoder(inputs).stage)
    made = planner.encode(run.pairs, run.write, run.progress, complete=with_fidelity)
    check_size(made.config, options.goal.max_bytes, made.n_bytes)
    change = relative_change(run.original, run.tuned, run.pairs)
    error = mean_error([tensor.entry for tensor in made.staged])
    return _Made(made.config, StagedDeltas(made.staged), tuple(heavy_warnings(change, error)))


def _with_auto(run: _Run) -> _Made:
    """Let `auto` find settings and encode with them."""
    options = run.options
    encoder = run.encoder()
    inputs = Inputs(
        base=run.base,
        original=run.original,
        tuned=run.tuned,
        pairs=run.pairs,
        companions=run.companions,
        config=run.config,
        n_parameters=sum(math.prod(tensor.shape) for tensor in run.tuned.tensors.values()),
        stage=encoder.stage,
        own_texts=options.calibration,
        device=options.device,
        tune=options.tune,
    )
    chosen: Chosen = choose(inputs, options.goal, run.progress)
    changed = chosen.deltas.changed
    by_name = {pair.name: pair for pair in chosen.pairs}
    staged = [
        encoder.stage_changed(changed[name], by_name[name]) if name in changed else tensor
        for name, tensor in chosen.deltas.staged.items()
    ]
    written = run.write(chosen.pairs, staged)
    config = with_bytes(chosen.config, written)
    n_bytes = artifact_bytes(config, staged, written, run.companions)
    check_size(config, options.goal.max_bytes, n_bytes)
    return _Made(config, StagedDeltas(staged), chosen.notes)


def _draft(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[TensorPair],
    options: Options,
    progress: Progress,
) -> Draft | str | None:
    """The certificate's beginning, why there is none, or None where none is wanted."""
    if not options.certificate:
        return None
    with whole(progress, "golden"):
        found = draft(base, tuned, options.certificate_prompts, [pair.name for pair in pairs])
    return f"no certificate: {found}" if isinstance(found, str) else found


def _calibration(options: Options, codec: Codec | None) -> list[str]:
    """The texts that a named codec needs; `auto` reads its own."""
    needed = codec is not None and (options.calibration is not None or wants_inputs(codec))
    return load_texts(options.calibration) if needed else []


def _compare(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, progress: Progress
) -> tuple[list[TensorPair], list[str]]:
    """Split the parameters into those to store and the names of those the fine-tune left."""
    pairs, unchanged = [], []
    for pair in counted(progress, "compare", pairing.pairs, lambda _: 1):
        stored = to_store(tuned, pair, unchanged=is_unchanged(base, tuned, pair))
        if stored is None:
            unchanged.append(pair.name)
        else:
            pairs.append(stored)
    if not pairs:
        raise InputError(
            f"{tuned.name} equals {base.name} bit by bit, so there is no delta; give its fine-tune"
        )
    return pairs, unchanged


def _describe(
    base: Checkpoint,
    original: Checkpoint,
    tuned: Checkpoint,
    pairing: Pairing,
    options: Options,
    texts: Sequence[str],
) -> DeltaConfig:
    """The artifact's configuration, as far as it is known before anything is encoded."""
    details: dict[str, Any] = {"dtype": checkpoint_dtype(tuned)}
    if tuned.revision is not None:
        details["revision"] = tuned.revision
    if original is not base:
        details["difference_from"] = named(original)
    if texts:
        details["calibration"] = texts_digest(texts)
    if pairing.config_changes:
        details["config"] = pairing.config_changes
    if pairing.ignored_config:
        details["ignored_config"] = pairing.ignored_config
    if dropped := dropped_companions(base.path, tuned.path):
        details["dropped_files"] = dropped
    if facts := own_facts(tuned.path):
        details["card"] = facts
    return DeltaConfig(
        created_by=f"impart-serve {__version__}",
        codec=options.codec,
        options={},
        ratio_requested=None,
        finetuned_bytes=tuned.n_bytes,
        finetuned=tuned.name,
        base=base_info(base, pairing.tied, options.base_name, pairing.untied),
        seed=options.seed,
        finetuned_details=details,
        coding=Coding(CODER, {}) if options.entropy == CODER else None,
    )


def _run_key(config: DeltaConfig, options: Options, tuned: Checkpoint) -> str:
    """Name the inputs and settings: a run with the same key may take over staged tensors."""
    files = sorted({tensor.file for tensor in tuned.tensors.values()})
    given = asdict(
        replace(
            options,
            overwrite=False,
            resume=False,
            calibration=None,
            difference_from=None,
            certificate=False,
            certificate_prompts=None,
        )
    )
    texts = options.calibration
    record = {
        "config": asdict(config),
        "options": given,
        "texts": None if texts is None else file_digest(texts),
        "tuned": identity_of(tuned),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _card(config: DeltaConfig, n_bytes: int) -> bytes:
    return model_card(config, n_bytes).encode()
