"""What an artifact will hold: which tensors are stored, how, and in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.artifact.config import DeltaConfig, TensorEntry, TermEntry
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import group_of
from compressor.checkpoint.pairing import TensorPair, check_encodable
from compressor.codecs import Params, Shape
from compressor.codecs.siblings import sibling_groups
from compressor.encoders.codec import Codec
from compressor.plan.budget import Allotter, check_ratio, share_out
from compressor.plan.sizing import Forms, surroundings_bytes

ADDED_ROWS = "added rows"
_ROUNDS = 4  # metadata depends on the settings a little, so size and plan are iterated


@dataclass(frozen=True, slots=True)
class CodingGain:
    """Bytes after entropy coding over bytes before: of terms, of exact rows, of the header."""

    terms: float = 1.0
    exact: float = 1.0
    header: float = 1.0


NOT_CODED = CodingGain()


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to store.

    params         settings of its codec, or None if no row of it is encoded
    exact_start    first row stored exactly, or None
    exact_bytes    of those rows
    """

    pair: TensorPair
    is_encoded: bool
    exact_start: int | None
    exact_bytes: int
    params: Params | None = None

    @property
    def matrix_shape(self) -> Shape:
        m, n = self.pair.base_shape
        return m, n

    def byte_group(self, *, is_exact: bool) -> str:
        """The line of the byte table that its terms, or its exact rows, are counted in."""
        return ADDED_ROWS if is_exact and self.exact_start else group_of(self.pair)

    def entry(self) -> TensorEntry:
        """The record of the tensor, as far as it is known before encoding."""
        pair = self.pair
        terms = (TermEntry("", {}),) if self.is_encoded else ()
        return TensorEntry(
            pair.name, pair.shape, pair.base_shape, pair.transposed, terms, self.exact_start
        )


def make_job(tuned: Checkpoint, pair: TensorPair, *, unchanged: bool) -> Job | None:
    """Decide how a tensor is stored; None if it is not (its base rows equal the fine-tune's).

    Vectors and added rows are stored exactly, matrices encoded. Raises UnsupportedTensor.
    """
    added = pair.shape[0] - pair.base_shape[0] if pair.shape else 0
    if unchanged and not added:
        return None
    check_encodable(pair)
    row_bytes = math.prod(pair.shape[1:]) * tuned.dtype(pair.tuned_key).itemsize
    if not pair.is_matrix:
        return Job(pair, False, 0, pair.shape[0] * row_bytes)
    start = pair.base_shape[0] if added else None
    return Job(pair, not unchanged, start, added * row_bytes)


def plan_jobs(
    jobs: Sequence[Job],
    codec: Codec,
    config: DeltaConfig,
    companions: Mapping[str, bytes],
    allot: Allotter | None = None,
    gain: CodingGain = NOT_CODED,
) -> list[Job]:
    """Choose every matrix's settings so that the whole artifact meets the ratio in `config`.

    allot  shares the bytes out; by default in proportion to elements
    gain   what entropy coding is expected to leave of them
    Raises BudgetError, saying what can be had, if it cannot be met within the tolerance.
    """
    ratio = config.ratio_requested or 1.0
    target = config.finetuned_bytes / ratio
    groups = _groups(jobs, codec)
    names = [tuple(jobs[index].pair.name for index in group) for group in groups]
    sites = [tuple(jobs[index].matrix_shape for index in group) for group in groups]
    forms = Forms(codec)
    planned = list(jobs)
    fixed, payload = _fixed_bytes(planned, forms, config, companions, 0, gain), 0
    for _ in range(_ROUNDS):
        budget = (target - fixed) / gain.terms
        allotments = allot(names, sites, budget) if allot else share_out(codec, sites, budget)
        for group, allotment in zip(groups, allotments, strict=True):
            for index, params in zip(group, allotment.settings, strict=True):
                planned[index] = replace(planned[index], params=params)
        payload = sum(allotment.n_bytes for allotment in allotments)
        fixed = _fixed_bytes(planned, forms, config, companions, payload, gain)
    coded = round(gain.terms * payload)
    possible = config.finetuned_bytes / (fixed + coded)
    # Where the codec cannot spend what coding sets free, the artifact is smaller than asked for.
    if possible > ratio:
        fixed_before = _fixed_bytes(planned, forms, config, companions, payload, NOT_CODED)
        possible = max(ratio, config.finetuned_bytes / (fixed_before + payload))
    check_ratio(ratio, possible, _reason(codec, fixed, coded, target))
    return planned


def _groups(jobs: Sequence[Job], codec: Codec) -> list[list[int]]:
    """Indices of the encoded jobs that get equal settings; they have equal widths."""
    encoded = {job.pair.name: index for index, job in enumerate(jobs) if job.is_encoded}
    if not codec.joins_siblings:
        return [[index] for index in encoded.values()]
    groups = [[encoded[name] for name in group] for group in sibling_groups(encoded)]
    return [
        part
        for group in groups
        for part in (
            [group]
            if len({jobs[index].matrix_shape[1] for index in group}) == 1
            else [[index] for index in group]
        )
    ]


def _fixed_bytes(
    jobs: Sequence[Job],
    forms: Forms,
    config: DeltaConfig,
    companions: Mapping[str, bytes],
    payload: int,
    gain: CodingGain,
) -> int:
    entries = [
        forms.entry(job.entry(), job.params or {}) if job.is_encoded else job.entry()
        for job in jobs
    ]
    exact = sum(job.exact_bytes for job in jobs)
    header = forms.header_bytes(entries, payload + exact)
    coded = round(gain.exact * exact + gain.header * header)
    return coded + surroundings_bytes(config.with_tensors(tuple(entries)), companions)


def _reason(codec: Codec, fixed: int, payload: int, target: float) -> str:
    if fixed + payload > target:
        return (
            f"norms, biases, added rows, tokenizer files and metadata take {fixed:,} bytes and "
            f"{codec.name} at its smallest setting {payload:,}, of {target:,.0f} asked for"
        )
    return (
        f"{codec.name} at its largest setting takes only {payload:,} bytes "
        f"of {target - fixed:,.0f} allowed (more bits a value take more)"
    )
