"""A certificate's prompts replayed: what this server gives the fine-tune's own tokens.

Pure functions over what was recorded and what came back; see `server.engine.vetting` for when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compressor.artifact.certificate import LEAST_LOG_PROB, Certificate, GoldenPrompt
from server.engine.types import TokenLogprob

Verdict = Literal["faithful", "below_floor", "is_base"]
TELLING = 0.2  # nats that delta and base must differ by, in the mean, to be told apart
LEEWAY = 0.1  # of the agreement that was recorded, where no floor is asked for


@dataclass(frozen=True, slots=True)
class Replayed:
    """One prompt's tokens, each given those before it.

    log_probs  what the server gives the fine-tune's tokens
    agrees     whether the server finds that token the most likely
    free       what it writes by itself after the prompt, where that was asked for
    """

    golden: GoldenPrompt
    log_probs: tuple[float, ...]
    agrees: tuple[bool, ...]
    free: tuple[int, ...] | None = None

    @property
    def first_divergence(self) -> int | None:
        """The first token that the server, left to itself, writes otherwise; None: none."""
        pairs = enumerate(zip(self.golden.tokens, self.free or (), strict=False))
        return next((index for index, (theirs, ours) in pairs if theirs != ours), None)


def replayed(
    golden: GoldenPrompt, scored: Sequence[TokenLogprob], free: Sequence[int] | None = None
) -> Replayed:
    """What came back for a prompt.

    scored  log probabilities of the prompt and the fine-tune's tokens after it, one or more
            alternatives with each
    """
    tail = scored[len(golden.prompt) :]
    assert [token.token_id for token in tail] == list(golden.tokens)
    return Replayed(
        golden,
        tuple(max(LEAST_LOG_PROB, token.logprob or 0.0) for token in tail),
        tuple(token.top[0].token_id == token.token_id for token in tail),
        None if free is None else tuple(free),
    )


def most_telling(certificate: Certificate) -> GoldenPrompt | None:
    """The prompt where the delta's answer differs most from the base's; None if none tells."""
    best = max(certificate.prompts, key=_contrast)
    return best if _contrast(best) >= TELLING else None


def is_base(found: Sequence[Replayed]) -> bool:
    """Whether the server gives the tokens what the base does, where that is not what the delta
    does: prompts where both do the same tell nothing.
    """
    telling = [one for one in found if _contrast(one.golden) >= TELLING]
    to_base = sum(_distance(one.log_probs, one.golden.base) for one in telling)
    return to_base < sum(_distance(one.log_probs, one.golden.delta) for one in telling)


def agreement(found: Sequence[Replayed]) -> float:
    """Share of all tokens that the server finds the most likely."""
    agrees = [same for one in found for same in one.agrees]
    return sum(agrees) / len(agrees)


def verdict(found: Sequence[Replayed], floor: float) -> Verdict:
    """What to say of it all."""
    if is_base(found):
        return "is_base"
    return "faithful" if agreement(found) >= floor else "below_floor"


def default_floor(certificate: Certificate) -> float:
    """Less than what was recorded, by what kernels and dtypes may change."""
    return max(0.0, certificate.top1_agreement - LEEWAY)


def comparison(certificate: Certificate, found: Sequence[Replayed], floor: float) -> dict[str, Any]:
    """All of it as plain data.

    gap    what the fine-tune gives its tokens more than this server does: an estimate of the KL
    drift  how far this server is from what was recorded of the delta, in the mean
    """
    n_tokens = sum(len(one.log_probs) for one in found)
    return {
        "verdict": verdict(found, floor),
        "floor": floor,
        "agreement": agreement(found),
        "gap_per_token": sum(map(_gap, found)) / n_tokens,
        "drift_per_token": sum(_distance(one.log_probs, one.golden.delta) for one in found)
        / n_tokens,
        "n_tokens": n_tokens,
        "prompts": [
            {
                "agreement": sum(one.agrees) / len(one.agrees),
                "gap_per_token": _gap(one) / len(one.log_probs),
                "first_divergence": one.first_divergence,
            }
            for one in found
        ],
        "recorded": certificate.summary(),
    }


def _gap(one: Replayed) -> float:
    return sum(one.golden.finetuned) - sum(one.log_probs)


def _contrast(golden: GoldenPrompt) -> float:
    return _distance(golden.delta, golden.base) / len(golden.tokens)


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))
