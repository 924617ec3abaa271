"""`auto`: find the codec and the settings that keep the model's words, by trying them.

With a model that runs here: gradients on calibration texts tell how much each weight matters; one
optimiser over true bytes (`allocate`) then plans each candidate; each is encoded, run, and its
KL to the fine-tune measured, on built-in texts and on the user's or, where there are none, on what
the fine-tune writes itself (`self_written`). The smallest geometric mean wins. Without such a
model: fixed settings, and the record says so.

What no text shows must not be given away. Without texts of the user's nothing is tried that leaves
parts of a layer's difference out (`lowrank` keeps general text best and loses the task, measured),
and bytes shared out by gradients must beat plain sampling on the fine-tune's own writing. Matrices
of the vocabulary may do with a head; then the rows that moved most are kept whole, for the words
that no text shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compressor.artifact.config import DeltaConfig
from compressor.artifact.staging import StagedDeltas
from compressor.auto.allocate import HeadCosts, NoiseAllotter, byte_shares
from compressor.auto.bench import Bench, open_bench, rounded
from compressor.auto.goal import Chosen, Goal, Inputs
from compressor.auto.kept import Kept, Measured
from compressor.auto.self_written import SELF
from compressor.auto.shrink import shrink
from compressor.auto.tries import Tries
from compressor.auto.tune import STEPS, Tuned
from compressor.checkpoint.pairing import TensorPair
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.encoders.codec import Codec
from compressor.encoders.lowrank import LowRankCodec
from compressor.errors import BudgetError, InputError
from compressor.measure.heaviness import heavy_warnings, mean_error, relative_change
from compressor.plan.budget import Allotter
from compressor.plan.settings import Planner
from compressor.plan.size import count
from compressor.progress import Progress

HEAD_BITS = 4
PLAIN = "blockdiag of 2 bits, bytes by elements"
UNMEASURED = BlockDiagCodec(bits=2, head_fraction=0.3, head_bits=HEAD_BITS)

_RATIOS = (1.5, 2048.0)  # where the search for a KL ends
_SEARCH_TRIALS = 8
_CLOSE = 0.85  # of the KL asked for: near enough
_AIM = 0.93  # of it: what a guess aims at
_NARROW = 1.02  # ratios nearer to each other than this are one
_STEEPNESS = 1.5  # KL grows about with this power of the ratio


@dataclass(frozen=True, slots=True)
class _Candidate:
    label: str
    codec: Codec
    allot: Allotter | None


@dataclass(frozen=True, slots=True)
class _Trial:
    candidate: _Candidate
    ratio: float
    pairs: list[TensorPair]
    deltas: StagedDeltas
    found: Measured

    def record(self) -> dict[str, Any]:
        return {"setting": self.candidate.label, "ratio": self.ratio, "kl": self.found.kl}

    def line(self) -> str:
        kl = ", ".join(f"{value:.3g} on {name} texts" for name, value in self.found.kl.items())
        return f"{self.candidate.label} at ratio {self.ratio:.4g}:\n     KL {kl}"


def choose(inputs: Inputs, goal: Goal, progress: Progress) -> Chosen:
    """Return settings for every tensor that meet `goal`.

    Raises BudgetError if they cannot, InputError if a KL is asked for that cannot be measured.
    """
    started = time.perf_counter()
    encoded = [pair for pair in inputs.pairs if pair.is_encoded]
    bench = open_bench(inputs, encoded, progress)
    if isinstance(bench, str):
        return _unmeasured(inputs, goal, bench, progress)
    costs = bench.survey(encoded, inputs.device, HEAD_BITS, progress)
    search = _Search(inputs, goal, bench, [_blockdiag(bits, costs) for bits in (4, 8)], progress)
    best = search.run(candidates(costs, has_own_texts=inputs.own_texts is not None))
    best = search.shrink(best)
    kept = search.tune(best)
    notes = search.notes(best, kept, time.perf_counter() - started)
    config = search.config(best.candidate, best.ratio, kept)
    return Chosen(best.pairs, kept.tuned.deltas, config, notes)


def candidates(costs: Mapping[str, HeadCosts], *, has_own_texts: bool) -> list[_Candidate]:
    """What is tried, the likeliest first."""
    shared = [_blockdiag(2, costs), _blockdiag(2, costs, leaves_out=True), _blockdiag(4, costs)]
    if has_own_texts:
        return [*shared, _Candidate("lowrank of 4 bits", LowRankCodec(bits=4), None)]
    plain = _Candidate(PLAIN, BlockDiagCodec(bits=2, head_bits=HEAD_BITS), None)
    return [*shared, plain]


def _blockdiag(
    bits: int, costs: Mapping[str, HeadCosts], *, leaves_out: bool = False
) -> _Candidate:
    codec = BlockDiagCodec(bits=bits, head_bits=HEAD_BITS)
    label = f"blockdiag of {bits} bits, heads where they pay"
    label += ", alone for the vocabulary" if leaves_out else ""
    return _Candidate(label, codec, NoiseAllotter(codec, costs, leaves_out=leaves_out))


class _Search:
    """Tries candidates, and ratios if a KL is asked for; remembers what came of them."""

    def __init__(
        self,
        inputs: Inputs,
        goal: Goal,
        bench: Bench,
        finer: Sequence[_Candidate],
        progress: Progress,
    ) -> None:
        self._inputs, self._goal, self._bench, self._progress = inputs, goal, bench, progress
        self._finer = finer
        self._trials: list[_Trial] = []
        self._tries = Tries(progress)
        self._shrunk: dict[str, float] = {}

    def run(self, choices: Sequence[_Candidate]) -> _Trial:
        """The best of `choices`; if a KL is asked for, at the ratio where it keeps that."""
        ratio = rounded(self._goal.starting_ratio(self._inputs.tuned.n_bytes))
        max_kl = self._goal.max_kl
        if max_kl is not None:
            self._tries.expect(_SEARCH_TRIALS, at_most=True)
        while True:
            self._tries.expect(len(choices))
            tried, impossible = [], None
            for index, candidate in enumerate(choices):
                try:
                    tried.append(self._try(candidate, ratio, choices[index + 1 :]))
                except BudgetError as error:
                    impossible = impossible or error
            if tried:
                best = _best(tried)
                return best if max_kl is None else self._reach(best, max_kl)
            assert impossible is not None
            if max_kl is None or ratio / 2 < _RATIOS[0]:
                raise impossible
            ratio /= 2  # a small model: what is stored exactly leaves no room for more

    def _reach(self, trial: _Trial, max_kl: float) -> _Trial:
        """Move along the ratio to the largest one found that keeps the KL."""
        kept: _Trial | None = None
        low, high = (
            _RATIOS  # the KL is kept at `low` or so many bytes cannot be spent; not at `high`
        )
        for _ in range(_SEARCH_TRIALS):
            kl = trial.found.kl[self._bench.main]
            if kl <= max_kl:
                kept, low = trial, trial.ratio
                if kl >= _CLOSE * max_kl:
                    break
            else:
                high = min(high, trial.ratio)
                failed = trial
            guess = _guess(trial, kept, failed, _AIM * max_kl, self._bench.main)
            found = None
            while found is None and low * _NARROW < high / _NARROW:
                ratio = rounded(min(max(guess, low * _NARROW), high / _NARROW))
                found = self._try_finer(trial.candidate, ratio)
                if found is None:
                    low, guess = ratio, math.sqrt(ratio * high)
            if found is None:
                break
            trial = found
        if kept is None:
            kl = trial.found.kl[self._bench.main]
            raise BudgetError(
                f"a KL of {max_kl:g} was not reached: at ratio {trial.ratio:.3g} it is still "
                f"{kl:.3g}; allow more, or store the fine-tune itself"
            )
        return kept

    def _try_finer(self, candidate: _Candidate, ratio: float) -> _Trial | None:
        """Try `candidate`, or one of more bits if it cannot use so many bytes."""
        for choice in (candidate, *self._finer):
            try:
                return self._try(choice, ratio)
            except BudgetError:
                continue
        return None

    def _try(
        self, candidate: _Candidate, ratio: float, to_come: Sequence[_Candidate] = ()
    ) -> _Trial:
        inputs, codec = self._inputs, candidate.codec
        config = self._expected_config(candidate, ratio, to_come)
        planner = Planner(codec, config, inputs.companions, inputs.stage, candidate.allot)
        with self._tries.next() as share:
            made = planner.encode(inputs.pairs, partial(count, config), share)
            for trial in self._trials:
                if trial.ratio == ratio and trial.pairs == made.pairs:
                    return trial
            deltas = StagedDeltas(made.staged)
            found = self._bench.measure(deltas, share)
        trial = _Trial(candidate, ratio, made.pairs, deltas, found)
        self._trials.append(trial)
        return trial

    def shrink(self, best: _Trial) -> _Trial:
        """Return the trial with the blocks of large matrices rescaled by less where that helps."""
        shrunk = shrink(best.deltas, best.found, self._bench.measure, self._progress)
        self._shrunk = shrunk.factors
        return replace(best, deltas=shrunk.deltas, found=shrunk.found)

    def tune(self, best: _Trial) -> Kept:
        """Return the trial's deltas, tuned if that is wanted, possible and better."""
        if self._to_tune():
            return self._bench.tune(best.deltas, best.found, self._progress)
        return Kept(Tuned(0, best.deltas), best.found, {})

    def config(self, candidate: _Candidate, ratio: float, kept: Kept) -> DeltaConfig:
        """The configuration with the record of what was tried, and of what is kept."""
        return self._config(candidate, ratio, kept, [trial.record() for trial in self._trials])

    def _expected_config(
        self, candidate: _Candidate, ratio: float, to_come: Sequence[_Candidate]
    ) -> DeltaConfig:
        """As `config`, before the trial of `candidate` and those to come are made: what would be
        written of the base itself stands for them, true numbers of the same length.
        """
        of_base = self._bench.of_base
        kept = Kept(Tuned(0, StagedDeltas(), STEPS), of_base, self._to_tune(), of_base)
        expected = [
            _Trial(other, ratio, [], StagedDeltas(), of_base) for other in (candidate, *to_come)
        ]
        records = [trial.record() for trial in (*self._trials, *expected)]
        return self._config(candidate, ratio, kept, records)

    def _config(
        self, candidate: _Candidate, ratio: float, kept: Kept, tried: list[dict[str, Any]]
    ) -> DeltaConfig:
        bench, codec = self._bench, candidate.codec
        record: dict[str, Any] = {
            "basis": "KL measured on calibration texts; bytes by diagonal Fisher information",
            "tokens": bench.n_tokens,
            "base_kl": bench.of_base.kl,
            "tried": tried,
            "chosen": candidate.label,
        }
        if self._shrunk:
            record["rescaled"] = self._shrunk
        if kept.n_tokens:
            record["tuned"] = kept.record()
        return replace(
            self._inputs.config,
            codec=codec.name,
            options=codec.options() | {"auto": record},
            ratio_requested=ratio,
            fidelity=bench.fidelity(kept.found),
        )

    def _to_tune(self) -> dict[str, int]:
        """Predicted tokens that are tuned on, by set; empty if nothing is to be tuned."""
        return self._bench.to_tune if self._inputs.tune else {}

    def notes(self, best: _Trial, kept: Kept, seconds: float) -> tuple[str, ...]:
        """What to tell the user."""
        bench = self._bench
        lines = [f"auto tried {trial.line()}" for trial in self._trials]
        spent = byte_shares((pair.matrix_shape, pair.params) for pair in best.pairs if pair.params)
        how = f", {spent.heads:.0%} of the bytes in low-rank heads" if spent.heads else ""
        how += f", {spent.rows:.0%} in whole rows of the vocabulary" if spent.rows else ""
        lines.append(
            f"auto chose {best.candidate.label}{how} ({seconds:.0f} s; gradients and KL on "
            + " and ".join(f"{n:,} tokens of {name} texts" for name, n in bench.n_tokens.items())
            + ")"
        )
        lines += [
            f"auto rescaled the blocks of {name} by {factor:g} of what was left out: less noise"
            for name, factor in self._shrunk.items()
        ]
        lines.append(self._tuning_note(kept))
        lost = kept.found.kl[bench.main] / max(bench.of_base.kl[bench.main], 1e-9)
        lines += heavy_warnings(_change_of(self._inputs), 0.0, lost)
        return tuple(lines)

    def _tuning_note(self, kept: Kept) -> str:
        if not self._inputs.tune:
            return "auto did not tune norms and biases, as asked"
        if reason := self._bench.why_not_tuned():
            return f"auto did not tune norms and biases: {reason}"
        return f"auto {kept.line()}"


def _best(tried: Sequence[_Trial]) -> _Trial:
    """The smallest score; where plain sampling was tried, of those no worse on what is written."""
    plain = next((trial for trial in tried if trial.candidate.label == PLAIN), None)
    if plain is not None:
        tried = [trial for trial in tried if trial.found.kl[SELF] <= plain.found.kl[SELF]]
    return min(tried, key=lambda trial: trial.found.score)


def _guess(last: _Trial, kept: _Trial | None, failed: _Trial | None, kl: float, name: str) -> float:
    """The ratio where KL should be `kl`: between two trials in logarithms, or by a usual slope."""
    slope = _STEEPNESS
    if kept is not None and failed is not None and failed.ratio > kept.ratio:
        rise = math.log(failed.found.kl[name] / max(kept.found.kl[name], 1e-9))
        slope = max(rise / math.log(failed.ratio / kept.ratio), 0.2)
    return last.ratio * math.exp(math.log(kl / max(last.found.kl[name], 1e-9)) / slope)


def _unmeasured(inputs: Inputs, goal: Goal, reason: str, progress: Progress) -> Chosen:
    """Fixed settings, and why."""
    if goal.max_kl is not None:
        raise InputError(f"--max-kl needs the model to run here: {reason}; give --ratio instead")
    basis = (
        "fixed settings, the best of those measured on other fine-tunes, because nothing could be "
        f"measured on this one: {reason}"
    )
    config = replace(
        inputs.config,
        codec=UNMEASURED.name,
        options=UNMEASURED.options() | {"auto": {"basis": basis}},
        ratio_requested=rounded(goal.starting_ratio(inputs.tuned.n_bytes)),
    )
    planner = Planner(UNMEASURED, config, inputs.companions, inputs.stage)
    made = planner.encode(inputs.pairs, partial(count, config), progress)
    error = mean_error([tensor.entry for tensor in made.staged])
    notes = (f"auto took {basis}", *heavy_warnings(_change_of(inputs), error))
    return Chosen(made.pairs, StagedDeltas(made.staged), config, notes)


def _change_of(inputs: Inputs) -> float:
    return relative_change(inputs.original, inputs.tuned, inputs.pairs)
