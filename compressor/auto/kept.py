"""What `auto` found of a delta, before and after tuning, and which state is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compressor.auto.tune import Tuned
from compressor.codecs import TensorDelta

_DIGEST = 16  # hexadecimal digits


@dataclass(frozen=True, slots=True)
class Measured:
    """KL per token of one delta on each set of texts, and top-1 agreement."""

    kl: dict[str, float]
    agreement: dict[str, float]

    @property
    def score(self) -> float:
        """Geometric mean of the sets' KL: a set counts by ratios, however large its own KL is."""
        logs = [math.log(max(kl, 1e-9)) for kl in self.kl.values()]
        return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True, slots=True)
class Kept:
    """The best state that tuning came by: what was encoded, at step 0, unless another is better.

    n_tokens  tuned on, by set; empty if nothing was tuned
    before    what was found of step 0
    """

    tuned: Tuned
    found: Measured
    n_tokens: dict[str, int] = field(default_factory=dict)
    before: Measured | None = None

    def record(self) -> dict[str, Any]:
        """For `delta_config.json`; the digest tells one outcome from another when a run resumes."""
        assert self.before is not None
        return {
            "steps": self.tuned.steps,
            "of": self.tuned.of,
            "tokens": self.n_tokens,
            "kl_before": self.before.kl,
            "digest": digest(self.tuned.deltas),
        }

    def line(self) -> str:
        """For the user."""
        assert self.before is not None
        texts = " and ".join(f"{n:,} tokens of {name} texts" for name, n in self.n_tokens.items())
        if not self.tuned.steps:
            return f"tuned norms and biases on {texts}, and kept none: no step was better"
        kl = ", ".join(
            f"{self.before.kl[name]:.3g} to {value:.3g} on {name} texts"
            for name, value in self.found.kl.items()
        )
        return (
            f"tuned norms and biases, at no bytes, for {self.tuned.steps} of {self.tuned.of} steps "
            f"on {texts} that are not measured on:\n     KL {kl}"
        )


def digest(deltas: Mapping[str, TensorDelta]) -> str:
    """Name the numbers of some deltas."""
    found = hashlib.sha256()
    for name, delta in sorted(deltas.items()):
        found.update(name.encode())
        parts = [part for term in delta.terms for _, part in sorted(term.tensors().items())]
        parts += [delta.exact.values] if delta.exact is not None else []
        for part in parts:
            found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:_DIGEST]


def is_better(now: Measured, best: Measured, before: Measured) -> bool:
    """Whether the mean is below the best so far, and no set is worse than before."""
    no_worse = all(kl <= before.kl[name] for name, kl in now.kl.items())
    return no_worse and now.score < best.score
