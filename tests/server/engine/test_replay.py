"""The arithmetic of a replay, by numbers that can be done in the head."""

from __future__ import annotations

import pytest

from compressor.artifact.certificate import Certificate, GoldenPrompt
from server.engine.replay import agreement, comparison, is_base, most_telling, replayed, verdict
from server.engine.types import TokenLogprob

TELLS = GoldenPrompt((1, 2), (3, 4), (-0.1, -0.1), (-0.2, -0.2), (-3.0, -5.0))
ALIKE = GoldenPrompt((1,), (9,), (-0.1,), (-0.1,), (-0.15,))
FOUND = Certificate("impart-serve 1", "built-in", "float32", 0.1, 1.0, 4.0, 0.0, (ALIKE, TELLS))


def scored(prompt: GoldenPrompt, *values: float, best: int | None = None) -> list[TokenLogprob]:
    """best: what the server finds most likely in place of each token"""
    ids = (*prompt.prompt, *prompt.tokens)
    tail = [
        TokenLogprob(i, v, (TokenLogprob(i if best is None else best, v),))
        for i, v in zip(prompt.tokens, values, strict=True)
    ]
    return [TokenLogprob(i, None) for i in ids[: len(prompt.prompt)]] + tail


def test_most_telling_prompt_is_where_delta_and_base_differ_most() -> None:
    assert most_telling(FOUND) is TELLS
    assert most_telling(Certificate("", "", "", 0, 0, 0, 0, (ALIKE,))) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [((-0.3, -0.3), False), ((-2.9, -4.9), True), ((-0.2, -30.0), True), ((-1.0, -2.0), False)],
)
def test_is_base_says_which_of_the_two_the_answer_is_nearer_to(
    values: tuple[float, ...], expected: bool
) -> None:
    found = [replayed(TELLS, scored(TELLS, *values)), replayed(ALIKE, scored(ALIKE, -0.15))]
    assert is_base(found) is expected
    assert not is_base(found[1:])  # what tells nothing is no proof


def test_comparison_sums_over_tokens_and_names_the_first_divergence() -> None:
    found = [
        replayed(TELLS, scored(TELLS, -0.3, -0.5), [3, 7]),
        replayed(ALIKE, scored(ALIKE, -0.1, best=8), [9]),
    ]
    made = comparison(FOUND, found, 0.5)
    assert made["agreement"] == agreement(found) == pytest.approx(2 / 3)
    assert made["gap_per_token"] == pytest.approx((0.2 + 0.4 + 0.0) / 3)
    assert made["drift_per_token"] == pytest.approx((0.1 + 0.3 + 0.0) / 3)
    assert [one["first_divergence"] for one in made["prompts"]] == [1, None]
    assert (made["verdict"], verdict(found, 0.7)) == ("faithful", "below_floor")
