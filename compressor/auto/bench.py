"""What `auto` measures with: the fine-tune's model, texts, and the KL of any delta on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.artifact.staging import StagedDeltas
from compressor.auto.allocate import HeadCosts
from compressor.auto.goal import Inputs
from compressor.auto.kept import Kept, Measured, is_better
from compressor.auto.self_written import SELF, self_written
from compressor.auto.survey import Rests, add_scaled, head_costs, rests_of, survey, weighted_energy
from compressor.auto.texts import OWN, calibration_sets, spread
from compressor.auto.tune import STEPS, Tuned, Tuner
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import VOCABULARY, group_of
from compressor.checkpoint.pairing import TensorPair
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, InputError
from compressor.measure.comparison import SampleBatch, n_predicted
from compressor.measure.evaluation import Reference
from compressor.measure.fidelity import Fidelity
from compressor.measure.samples import load_tokenizer
from compressor.measure.swapped_model import SwappedModel, Weights
from compressor.progress import Progress, counted, silent, whole, within

_CPU_PARAMETERS = 1_500_000_000  # beyond, the passes that auto needs take too long without a GPU
_BYTES_A_PARAMETER = 16  # weights, gradients and two sums of squares in float32
_FISHER_TOKENS = 768  # predicted tokens of a set that gradients are taken of
_FISHER_TEXTS = 32  # at most: each is one backward pass
_TUNING_TOKENS = 256  # predicted tokens of the user's, at least
_DIGITS = 4  # significant


class Bench:
    """The fine-tune, its texts and what it says about them.

    original  what differences are taken from, if that is not `base`

    Raises CheckpointError if the model cannot be run here, InputError if `own` cannot be used.
    """

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        own: Path | None,
        progress: Progress = silent,
        original: Checkpoint | None = None,
    ) -> None:
        self._original, self._tuned = original or base, tuned
        tokenizer = load_tokenizer(tuned.path)
        texts = calibration_sets(own, tokenizer)
        sets = {name: found.measured for name, found in texts.items()}
        with whole(progress, "load"):
            self._model = SwappedModel(base, tuned)
        if own is None:
            sets[SELF] = self_written(self._model.module, tokenizer, progress)
        self._references = {
            name: Reference(self._model, sets[name])
            for name in counted(progress, "fine-tune", list(sets), lambda name: len(sets[name]))
        }
        self._spare = {name: found.spare for name, found in texts.items()}
        self.main = next(iter(sets))  # the user's own texts, if there are any
        self.of_base = self._measure("base", progress)

    @property
    def n_tokens(self) -> dict[str, int]:
        """Predicted tokens by set."""
        return {name: reference.n_tokens for name, reference in self._references.items()}

    def measure(self, deltas: Mapping[str, TensorDelta], progress: Progress = silent) -> Measured:
        """Run the fine-tune with these deltas in place of its own."""
        self._model.set_variant(deltas)
        return self._measure("variant", progress)

    def _measure(self, weights: Weights, progress: Progress) -> Measured:
        n_steps = 1 + sum(len(reference.batches) for reference in self._references.values())
        steps = iter(range(n_steps))

        def run(batch: SampleBatch) -> Iterable[Tensor]:
            progress(weights, next(steps), n_steps)
            return self._model.log_probs(batch.samples)

        progress(weights, next(steps), n_steps)
        self._model.use(dict.fromkeys(self._model.names, weights))
        kl, agreement = {}, {}
        for name, reference in self._references.items():
            found = reference.compare(reference.outputs_of(run))
            kl[name] = rounded(found.kl.mean)
            agreement[name] = rounded(found.top1_agreement.mean)
        self._model.use({})
        progress(weights, n_steps, n_steps)
        return Measured(kl, agreement)

    def why_not_tuned(self) -> str:
        """Say why nothing can be tuned here, as the end of a sentence; empty if it can."""
        if OWN not in self._spare:
            return "it helps what texts show; give some of the task (--calibration)"
        n_tokens = sum(n_predicted(sample) for sample in self._spare[OWN])
        if n_tokens < _TUNING_TOKENS:
            return f"beside those measured on your texts hold {n_tokens} tokens; give some hundreds"
        if next(self._model.module.parameters()).dtype != torch.float32:
            return "the model is too large to run in float32"
        return ""

    @property
    def to_tune(self) -> dict[str, int]:
        """Predicted tokens to tune on, by set; empty if nothing can be tuned here."""
        if self.why_not_tuned():
            return {}
        return {name: sum(map(n_predicted, texts)) for name, texts in self._spare.items()}

    def tune(self, deltas: StagedDeltas, found: Measured, progress: Progress) -> Kept:
        """Tune what is stored of `deltas`, which were found to be `found`, on the spare texts."""
        with whole(progress, "targets"):
            tuner = Tuner(self._model, self._spare)
        kept = Kept(Tuned(0, deltas, STEPS), found, tuner.n_tokens, found)

        def visit(tuned: Tuned) -> None:
            nonlocal kept
            now = self.measure(tuned.deltas)
            if is_better(now, kept.found, found):
                kept = replace(kept, tuned=tuned, found=now)

        tuner.run(deltas, found.kl, progress, visit)
        return kept

    def fidelity(self, found: Measured) -> dict[str, object]:
        """The record of what was measured: the user's texts first, if there are any."""
        records = {
            name: Fidelity(
                found.kl[name],
                found.agreement[name],
                reference.n_tokens,
                len(reference.samples),
            ).to_json()
            for name, reference in self._references.items()
        }
        main = records.pop(self.main)
        return main | ({"texts": self.main} | records)

    def survey(
        self, pairs: Sequence[TensorPair], device: str, head_bits: int, progress: Progress
    ) -> dict[str, HeadCosts]:
        """How much the model minds what each head leaves of each matrix, all sets alike."""
        weights, left_out = self._weights(pairs, device, head_bits, progress)
        costs = {}
        for pair in counted(progress, "survey", pairs, _n_elements):
            name = pair.name
            source = self._source(pair, device)
            found = head_costs(name, source, _oriented(weights.pop(name), pair), head_bits)
            costs[name] = replace(found, left_out=left_out.get(name, ()))
        return costs

    def _weights(
        self, pairs: Sequence[TensorPair], device: str, head_bits: int, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
        """Diagonal Fisher of all sets, and what leaving out the rest of vocabulary matrices costs,
        each divided by what plain sampling would cost on it.
        """
        names = [pair.name for pair in pairs]
        rests: dict[str, Rests] = {}
        own_device = str(self._model.module.device)
        of_words = [p for p in pairs if group_of(p) in VOCABULARY and not p.transposed]
        for pair in counted(progress, "vocabulary", of_words, _n_elements):
            rest = rests_of(pair.name, self._source(pair, own_device), head_bits)
            rests |= {} if rest is None else {pair.name: rest}
        total: dict[str, Tensor] = {}
        left_out: dict[str, Tensor] = {}
        n_sets = len(self._references)
        for index, reference in enumerate(self._references.values()):
            samples = spread(reference.samples, _FISHER_TOKENS, _FISHER_TEXTS)
            share = within(progress, "gradients", index / n_sets, (index + 1) / n_sets)
            found = survey(self._model.module, names, samples, rests, share)
            cost = 0.0
            for pair in pairs:
                source = self._source(pair, device)
                name = pair.name
                cost += weighted_energy(name, source, _oriented(found.fisher[name], pair))
            add_scaled(total, found.fisher, 1.0 / max(cost, 1e-30))
            add_scaled(left_out, found.left_out, 1.0 / max(cost, 1e-30))
        return total, {name: tuple(costs.tolist()) for name, costs in left_out.items()}

    def _source(self, pair: TensorPair, device: str) -> DeltaSource:
        """What was tuned, as the fine-tune's model has it, whose gradients it is weighed with."""
        return DeltaSource(self._original, self._tuned, replace(pair, scales=None), device)


def why_not_measurable(
    n_parameters: int, pairs: Sequence[TensorPair], names: Mapping[str, object]
) -> str:
    """Say why the model cannot be run here, as far as its size and form tell; empty if it can.

    names  of the model's parameters as transformers has them
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if n_parameters * _BYTES_A_PARAMETER > free:
            needed = n_parameters * _BYTES_A_PARAMETER
            return (
                f"gradients of {n_parameters:,} parameters need {needed / 1e9:,.0f} GB of GPU "
                f"memory, {free / 1e9:,.0f} are free"
            )
    elif n_parameters > _CPU_PARAMETERS:
        return f"{n_parameters:,} parameters are too many to run without a GPU"
    inside = next((pair.name for pair in pairs if pair.name not in names), None)
    return f"transformers keeps {inside} inside a larger tensor" if inside else ""


def open_bench(
    inputs: Inputs, pairs: Sequence[TensorPair], progress: Progress = silent
) -> Bench | str:
    """Return the bench, or why there is none. With texts of the user's, none is an InputError."""
    from compressor.checkpoint.layout import read_layout

    own, names = inputs.own_texts, read_layout(inputs.tuned.path).parameters
    reason = why_not_measurable(inputs.n_parameters, pairs, names)
    if not reason:
        try:
            return Bench(inputs.base, inputs.tuned, own, progress, inputs.original)
        except CheckpointError as error:
            reason = str(error)
    if own is not None:
        raise InputError(
            f"auto cannot measure on {own}: {reason}; leave the texts out, or name a --codec"
        )
    return reason


def rounded(value: float) -> float:
    """To a few significant digits: what is beyond depends on the number of threads."""
    return float(f"{value:.{_DIGITS}g}")


def _n_elements(pair: TensorPair) -> int:
    return math.prod(pair.matrix_shape)


def _oriented(weights: Tensor, pair: TensorPair) -> Tensor:
    """A parameter's weights as its difference is encoded: ``[out, in]``, the base's rows."""
    turned = weights.T if pair.transposed else weights
    return turned[: pair.matrix_shape[0]]
