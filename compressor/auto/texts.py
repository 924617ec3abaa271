"""The texts of `auto`: the user's own, and the built-in ones, of no one task.

Some of each set are measured on; the others are spare, to tune on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.measure.comparison import n_predicted
from compressor.measure.samples import Sample, read_samples, text_samples
from compressor.measure.texts import built_in_texts

OWN, BUILT_IN = "own", "built-in"

_MAX_TOKENS = 128  # of one text
_MEASURED_TOKENS = 1536  # predicted tokens of a set that KL is measured on
_MAX_MEASURED_TEXTS = 96
_ENOUGH_TO_HALVE = 16


@dataclass(frozen=True, slots=True)
class TextSet:
    """Samples that are measured on, and those that are not; no text is in both."""

    measured: list[Sample]
    spare: list[Sample]


def calibration_sets(own: Path | None, tokenizer: Any) -> dict[str, TextSet]:
    """Return the sets by name, `OWN` first if the user gave texts; `BUILT_IN` always.

    own  as `read_samples` takes it. Evenly spread over the file, up to some 1,500 tokens and, of
         16 texts or more, half of them are measured on.
    """
    sets = {}
    if own is not None:
        sets[OWN] = _split(read_samples(own, tokenizer, max_tokens=_MAX_TOKENS))
    generic = text_samples(built_in_texts(), tokenizer)
    sets[BUILT_IN] = _split([_cut(sample) for sample in generic if len(sample.ids) > 1])
    return sets


def _split(texts: Sequence[Sample]) -> TextSet:
    samples = list(dict.fromkeys(texts))
    most = len(samples) // 2 if len(samples) >= _ENOUGH_TO_HALVE else len(samples)
    measured = spread(samples, _MEASURED_TOKENS, min(most, _MAX_MEASURED_TEXTS))
    held_out = set(measured)
    return TextSet(measured, [sample for sample in samples if sample not in held_out])


def spread(
    samples: Sequence[Sample], max_tokens: int, max_texts: int = _MAX_MEASURED_TEXTS
) -> list[Sample]:
    """Return evenly spread samples that predict about `max_tokens` tokens in all, at least one."""
    n_tokens = sum(n_predicted(sample) for sample in samples)
    share = min(1.0, max_tokens / n_tokens, max_texts / len(samples))
    wanted = max(1, int(share * len(samples)))
    return [samples[i * len(samples) // wanted] for i in range(wanted)]


def _cut(sample: Sample) -> Sample:
    return Sample(sample.ids[:_MAX_TOKENS], sample.counted[:_MAX_TOKENS], sample.is_answer)
