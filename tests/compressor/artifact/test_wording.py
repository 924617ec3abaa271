"""What `inspect` and the report say of the free parts of a configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressor.artifact.config import DeltaConfig
from compressor.artifact.wording import choice, measured, plain_settings, unknown
from tests.compressor.artifacts import CONFIG

RECORD: dict[str, Any] = {
    "basis": "KL measured",
    "base_kl": {"own": 2.5},
    "chosen": "b",
    "tried": [
        {"setting": "a", "ratio": 8.0, "kl": {"own": 0.5, "built-in": 0.25}},
        {"setting": "b", "ratio": 4.0, "kl": {"own": 0.3}},
        {"setting": "b", "ratio": 8.0, "kl": {"own": 0.125}},
    ],
    "tuned": {"steps": 10, "of": 20},
    "rescaled": {"w": 0.5},
}


def with_auto(record: Any) -> DeltaConfig:
    return replace(CONFIG, options={"bits": 2, "auto": record}, ratio_requested=8.0)


def test_choice_says_chosen_of_what_was_chosen_only() -> None:
    assert list(choice(with_auto(RECORD))) == [
        ("chosen by", "auto: KL measured"),
        ("chosen", "b at ratio 8.0: KL 0.125 on own texts"),
        ("then tuned", "norms and biases, 10 of 20 steps"),
        ("then rescaled", "w by 0.5"),
        ("also tried", "a at ratio 8.0: KL 0.5 on own texts, 0.25 on built-in texts"),
        ("also tried", "b at ratio 4.0: KL 0.3 on own texts"),
        ("without a delta", "the base itself has KL 2.5 on own texts"),
    ]


def test_choice_of_an_older_artifact_names_none_of_those_tried() -> None:
    older = {key: value for key, value in RECORD.items() if key != "chosen"}
    headings = [heading for heading, _ in choice(with_auto(older))]
    assert headings.count("tried") == 3
    assert "chosen" not in headings


def test_choice_without_auto_is_empty() -> None:
    assert list(choice(replace(CONFIG, options={"bits": 2}))) == []


@pytest.mark.parametrize(
    "record",
    [
        [],
        "text",
        {"tried": {}, "tuned": 1, "rescaled": [], "base_kl": 1},
        {"tried": [None, {}, {"kl": 1}, {"kl": {"own": "x"}}], "basis": {"a": 1}},
    ],
)
def test_choice_of_strange_records_tells_nothing_strange(record: Any) -> None:
    headings = [heading for heading, _ in choice(with_auto(record))]
    assert headings == (["chosen by"] if isinstance(record, dict) else [])


def test_plain_settings_leave_auto_out_and_are_cut() -> None:
    assert plain_settings({"bits": 2, "auto": RECORD, "x": [1]}) == "bits 2, x [1]"
    assert plain_settings({}) == "none"
    assert plain_settings({"x": "y" * 999}).endswith("…")
    assert plain_settings({str(n): n for n in range(99)}).endswith("19 19, …")


def test_measured_has_a_line_for_each_set_of_texts() -> None:
    one = {"kl_per_token": 0.5, "top1_agreement": 0.75, "n_tokens": 1536, "n_texts": 9}
    fidelity = one | {"texts": "own", "built-in": one | {"kl_per_token": 0.25}, "more": [1]}
    assert measured(fidelity) == [
        "KL 0.5 nats per token, top-1 agreement 75.00% (1,536 tokens of own texts)",
        "KL 0.25 nats per token, top-1 agreement 75.00% (1,536 tokens of built-in texts)",
    ]
    assert unknown(fidelity) == {"more": [1]}
    assert measured({}) == []
    assert measured({"kl_per_token": 0.5}) == []
