"""Planning for the bytes after entropy coding, which only encoded tensors can tell.

A sample of the matrices is encoded as a first plan has them, and coded; what coding leaves of it
goes into the plan proper. Each kind of matrix has its share in the sample: what coding gains
depends on the codec and its bits, hardly on which layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.artifact.config import DeltaConfig
from compressor.artifact.entropy import Tally, code_frame, coded_frames, part_name
from compressor.artifact.tensor_file import METADATA, header_text, raw_bytes
from compressor.artifact.writer import parts_of
from compressor.codecs import TensorDelta
from compressor.encoders.codec import Codec
from compressor.errors import BudgetError
from compressor.plan.budget import Allotter
from compressor.plan.jobs import NOT_CODED, CodingGain, Job, plan_jobs

_USUAL = CodingGain(terms=0.93, exact=0.6, header=0.12)
_EVERY = 8  # of the matrices of one kind, one in so many is in the sample
_LEAST = 0.5  # what repeats more than this says more of the sample than of the rest
_MARGIN = 1.003  # a plan may be out by so much without exceeding what is asked for
_CLOSE = 0.01  # of what is asked for: near enough below it
_DIGITS = 4

Encode = Callable[[Job], TensorDelta]


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of every tensor, the configuration, and what coding is expected to gain."""

    jobs: list[Job]
    config: DeltaConfig
    gain: CodingGain = NOT_CODED


def plan_coded(
    jobs: Sequence[Job],
    codec: Codec,
    config: DeltaConfig,
    companions: Mapping[str, bytes],
    encode: Encode,
    allot: Allotter | None = None,
) -> Plan:
    """Plan so that the artifact meets the ratio in `config` after the coding that it names.

    Raises BudgetError as `plan_jobs`.
    """
    if config.coding is None:
        return Plan(plan_jobs(jobs, codec, config, companions, allot), config)
    try:
        first = plan_jobs(jobs, codec, config, companions, allot, _USUAL)
    except BudgetError:  # names a ratio that is possible whatever coding gains, or is none
        first = plan_jobs(jobs, codec, config, companions, allot)
    gain = coding_gain(first, codec, _sample(first), encode)
    return replan(jobs, codec, config, companions, with_margin(gain), allot)


def replan(
    jobs: Sequence[Job],
    codec: Codec,
    config: DeltaConfig,
    companions: Mapping[str, bytes],
    gain: CodingGain,
    allot: Allotter | None = None,
) -> Plan:
    """Plan with what coding is known to gain; see `plan_coded`."""
    return Plan(plan_jobs(jobs, codec, config, companions, allot, gain), config, gain)


def coding_gain(
    jobs: Sequence[Job], codec: Codec, sample: Iterable[Job], encode: Encode
) -> CodingGain:
    """Encode and code `sample` and say what that leaves of all of `jobs`, group by group."""
    parts: dict[tuple[str, bool, str], list[memoryview]] = {}
    places = {}
    for index, job in enumerate(sample):
        for key, tensor in parts_of(encode(job)).items():
            is_exact = part_name(key) == "exact"
            run = (job.byte_group(is_exact=is_exact), is_exact, part_name(key))
            parts.setdefault(run, []).append(raw_bytes(tensor))
            places[f"{index}.{key}"] = tensor
    terms, exact = Tally(), Tally()
    for (group, is_exact, _), chunks in sorted(parts.items(), key=lambda item: item[0]):
        for _ in coded_frames([(group, chunks)], exact if is_exact else terms):
            pass
    header = header_text(places, METADATA)
    return CodingGain(
        terms=min(max(_LEAST, _share(terms, _terms_bytes(jobs, codec))), 1.0),
        exact=_share(exact, _exact_bytes(jobs)),
        header=_rounded(len(code_frame(header)) / len(header)),
    )


def replanned(
    plan: Plan,
    codec: Codec,
    companions: Mapping[str, bytes],
    written: DeltaConfig,
    n_bytes: int,
) -> Plan | None:
    """A better plan where coding left more than is asked for, or much less; None if it will do.

    written  the configuration of what the plan led to
    n_bytes  of the whole artifact
    """
    config, jobs = plan.config, plan.jobs
    target = config.finetuned_bytes / (config.ratio_requested or 1.0)
    if config.coding is None or 0 <= target - n_bytes <= _CLOSE * target:
        return None
    if written.coding is None:  # it did not pay after all, or no reader would believe it
        plain = replace(config, coding=None)
        return None if n_bytes <= target else Plan(plan_jobs(jobs, codec, plain, companions), plain)
    terms = plan.gain.terms * (1 + (n_bytes - target) / sum(written.bytes.values()))
    gain = replace(plan.gain, terms=max(_LEAST, terms))
    again = replan(jobs, codec, config, companions, with_margin(gain))
    return None if again.jobs == jobs else again


def less_gained(
    plan: Plan,
    codec: Codec,
    companions: Mapping[str, bytes],
    deltas: Mapping[str, TensorDelta],
    allot: Allotter | None,
) -> Plan | None:
    """A smaller plan if coding gains less of what was encoded than `plan` expects, else None."""
    if plan.config.coding is None:
        return None
    gain = coding_gain(plan.jobs, codec, plan.jobs, lambda job: deltas[job.pair.name])
    if gain.terms <= plan.gain.terms:
        return None
    return replan(plan.jobs, codec, plan.config, companions, with_margin(gain), allot)


def with_margin(gain: CodingGain) -> CodingGain:
    """A little less of a gain, so that what is asked for is not exceeded."""
    return replace(gain, terms=_rounded(gain.terms * _MARGIN))


def _sample(jobs: Sequence[Job]) -> list[Job]:
    """All that is stored exactly, and some of every kind of matrix, not the first and last."""
    kinds: dict[tuple[str, tuple[int, ...]], list[Job]] = {}
    for job in jobs:
        if job.params is not None:
            kinds.setdefault((job.byte_group(is_exact=False), job.pair.shape), []).append(job)
    chosen = [job for job in jobs if job.params is None]
    for members in kinds.values():
        chosen += members[min(_EVERY, len(members)) // 2 :: _EVERY]
    return chosen


def _terms_bytes(jobs: Sequence[Job], codec: Codec) -> Counter[str]:
    total = Counter[str]()
    for job in jobs:
        if job.params is not None:
            size = codec.size_bytes(job.matrix_shape, job.params)
            total[job.byte_group(is_exact=False)] += size
    return total


def _exact_bytes(jobs: Sequence[Job]) -> Counter[str]:
    total = Counter[str]()
    for job in jobs:
        total[job.byte_group(is_exact=True)] += job.exact_bytes
    return total


def _share(found: Tally, total: Mapping[str, int]) -> float:
    """What coding leaves of `total`, by what it left of each group's sample."""
    left = {group: found.coded[group] / n_raw for group, n_raw in found.raw.items()}
    coded = sum(n_bytes * left.get(group, 1.0) for group, n_bytes in total.items())
    return _rounded(coded / sum(total.values())) if coded else 1.0


def _rounded(value: float) -> float:
    """To a few digits: beyond, a head depends on the number of threads."""
    return float(f"{value:.{_DIGITS}g}")
