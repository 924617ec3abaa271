"""Settings of every matrix, chosen so that the whole artifact meets the ratio asked for.

One pass over a sample tells what the bytes go to besides the terms (`size`), and the plan proper
follows. What is encoded by it is measured by the same rule, and where it missed the ratio one more
plan follows from the true sizes: two passes at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.artifact.assembly import TensorBytes
from compressor.artifact.config import CODER, Coding, DeltaConfig
from compressor.artifact.staging import StagedTensor
from compressor.checkpoint.pairing import TensorPair
from compressor.codecs.siblings import sibling_groups
from compressor.encoders.codec import Codec
from compressor.plan.budget import Allotter, check_ratio, share_out
from compressor.plan.size import (
    Kind,
    Overhead,
    after_encoding,
    artifact_bytes,
    before_encoding,
    count,
    kind_of,
)
from compressor.progress import Progress, counted, silent

_PASSES = 2
_EVERY = 8  # of the matrices of one kind, one in so many is in the sample
_MARGIN = 1.003  # a plan may be out by so much without exceeding what is asked for
_CLOSE = 0.01  # of what is asked for: near enough to it
_DIGITS = 4

Write = Callable[[Sequence[TensorPair], Sequence[StagedTensor]], TensorBytes]
"""Writes, or only counts, ``delta.safetensors`` of encoded tensors."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tensors with their settings, encoded, and what the artifact takes with them.

    config   the planner's, of what was written
    n_bytes  of the whole artifact
    """

    pairs: list[TensorPair]
    staged: list[StagedTensor]
    config: DeltaConfig
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Planner:
    """Encodes tensors with one codec so that the artifact meets the ratio in `config`.

    config  as it is before anything is encoded; it has a coding if there is to be one
    stage   encodes a tensor with its settings into the staging folder, unless it is there
    allot   shares the bytes out; by default in proportion to elements

    Raises BudgetError, saying what can be had, if the ratio cannot be met within the tolerance.
    """

    codec: Codec
    config: DeltaConfig
    companions: Mapping[str, bytes]
    stage: Callable[[TensorPair, Codec], StagedTensor]
    allot: Allotter | None = None

    def encode(
        self,
        pairs: Sequence[TensorPair],
        write: Write,
        progress: Progress,
        complete: Callable[[DeltaConfig, Sequence[StagedTensor]], DeltaConfig] | None = None,
    ) -> Encoded:
        """Plan, encode and write all of `pairs`; once more, better, if the size is missed.

        complete  adds to the configuration what only what was encoded can tell
        """
        planned = self.plan(pairs, progress)
        for passes_left in reversed(range(_PASSES)):
            steps = counted(progress, "encode", planned, lambda pair: math.prod(pair.shape))
            staged = [self.stage(pair, self.codec) for pair in steps]
            written = write(planned, staged)
            config = with_bytes(self.config, written)
            if complete is not None:
                config = complete(config, staged)
            n_bytes = artifact_bytes(config, staged, written, self.companions)
            found = Encoded(planned, staged, config, n_bytes)
            if not passes_left or self._is_met(config, n_bytes):
                break
            again = self._plan_after(planned, staged, written, config)
            if again == planned:
                break
            planned = again
        return found

    def plan(self, pairs: Sequence[TensorPair], progress: Progress = silent) -> list[TensorPair]:
        """Return `pairs` with settings, by what encoding a sample of them shows."""
        known = before_encoding(pairs, self.config, self.companions)
        rough, _ = self._spend(pairs, known)
        steps = counted(progress, "sample", _sample(rough), lambda pair: math.prod(pair.shape))
        staged = [self.stage(pair, self.codec) for pair in steps]
        written = count(self.config, rough, staged)
        return self._plan_after(rough, staged, written, with_bytes(self.config, written))

    def _plan_after(
        self,
        pairs: Sequence[TensorPair],
        staged: Sequence[StagedTensor],
        written: TensorBytes,
        config: DeltaConfig,
    ) -> list[TensorPair]:
        """Plan with what is known once `staged`, some or all of `pairs`, are written."""
        found = after_encoding(pairs, self.codec, staged, written, config, self.companions)
        margin = _MARGIN if written.is_coded else 1.0
        overhead = Overhead(
            fixed_bytes=_rounded(found.fixed_bytes),
            share=min(_rounded(found.share * margin), 1.0),
            plain_bytes=_rounded(found.plain_bytes),
        )
        planned, n_terms = self._spend(pairs, overhead)
        self._check(overhead, n_terms)
        return planned

    @property
    def _target(self) -> float:
        return self.config.finetuned_bytes / (self.config.ratio_requested or 1.0)

    def _is_met(self, config: DeltaConfig, n_bytes: int) -> bool:
        """Whether the size is near enough; what is coded is planned to lie below the target."""
        left = self._target - n_bytes
        least = 0 if config.coding is not None else -_CLOSE * self._target
        return least <= left <= _CLOSE * self._target

    def _spend(
        self, pairs: Sequence[TensorPair], overhead: Overhead
    ) -> tuple[list[TensorPair], int]:
        """Settings that bring the artifact as near to its target as the codec can, and the bytes
        of the terms with them, before coding.
        """
        groups = _groups(pairs, self.codec)
        names = [tuple(pairs[index].name for index in group) for group in groups]
        sites = [tuple(pairs[index].matrix_shape for index in group) for group in groups]
        budget = overhead.for_terms(self._target)
        allotments = (
            self.allot(names, sites, budget) if self.allot else share_out(self.codec, sites, budget)
        )
        planned = list(pairs)
        for group, allotment in zip(groups, allotments, strict=True):
            for index, params in zip(group, allotment.settings, strict=True):
                planned[index] = replace(planned[index], params=params)
        return planned, sum(allotment.n_bytes for allotment in allotments)

    def _check(self, overhead: Overhead, n_terms: int) -> None:
        config = self.config
        ratio = config.ratio_requested or 1.0
        coded = overhead.share * n_terms
        possible = config.finetuned_bytes / (overhead.fixed_bytes + coded)
        if possible > ratio:  # that the codec cannot spend what coding sets free is no failure
            possible = max(ratio, config.finetuned_bytes / (overhead.plain_bytes + n_terms))
        check_ratio(ratio, possible, self._reason(overhead.fixed_bytes, coded))

    def _reason(self, fixed: float, terms: float) -> str:
        name, target = self.codec.name, self._target
        if fixed + terms > target:
            return (
                "norms, biases, added rows, tokenizer files and metadata take "
                f"{fixed:,.0f} bytes and {name} at its smallest setting {terms:,.0f}, of "
                f"{target:,.0f} asked for"
            )
        return (
            f"{name} at its largest setting takes only {terms:,.0f} bytes "
            f"of {target - fixed:,.0f} allowed (more bits a value take more)"
        )


def with_bytes(config: DeltaConfig, written: TensorBytes) -> DeltaConfig:
    """Return the configuration with the byte table of what was written."""
    coding = Coding(CODER, written.raw) if written.is_coded else None
    return replace(config, bytes=written.stored, coding=coding)


def _groups(pairs: Sequence[TensorPair], codec: Codec) -> list[list[int]]:
    """Indices of the encoded tensors that get equal settings; they have equal widths."""
    encoded = {pair.name: index for index, pair in enumerate(pairs) if pair.is_encoded}
    if not codec.joins_siblings:
        return [[index] for index in encoded.values()]
    groups = [[encoded[name] for name in group] for group in sibling_groups(encoded)]
    return [
        part
        for group in groups
        for part in (
            [group]
            if len({pairs[index].matrix_shape[1] for index in group}) == 1
            else [[index] for index in group]
        )
    ]


def _sample(pairs: Sequence[TensorPair]) -> list[TensorPair]:
    """All that is stored exactly, and some of every kind of matrix, not the first and last."""
    kinds: dict[Kind, list[TensorPair]] = {}
    for pair in pairs:
        if pair.params is not None:
            kinds.setdefault(kind_of(pair), []).append(pair)
    chosen = [pair for pair in pairs if pair.params is None]
    for members in kinds.values():
        chosen += members[min(_EVERY, len(members)) // 2 :: _EVERY]
    return chosen


def _rounded(value: float) -> float:
    """To a few digits: beyond, a head depends on the number of threads."""
    return float(f"{value:.{_DIGITS}g}")
