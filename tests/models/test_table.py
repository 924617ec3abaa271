"""The page of models is what a run says."""

from __future__ import annotations

import re

import pytest
import transformers

from compressor.errors import InputError
from server.errors import ConfigError, GenerationFailed
from tests.models.cases import all_cases
from tests.models.outcome import EXACT, Outcome, Row, outcome_of
from tests.models.table import PAGE, Reasons, counts, page

GOOD = Row("one", EXACT, EXACT, EXACT, EXACT)
REFUSED = Row("two", EXACT, EXACT, Outcome("refused", "TwoForCausalLM keeps state"))
WRONG = Row("three", EXACT, EXACT, Outcome("wrong", "token 1 is 5, not 7"), EXACT)


def test_page_has_a_row_a_model_and_the_reasons() -> None:
    text = page([GOOD, REFUSED])
    assert "| one | = | = | = | = |\n| two | = | = | 1 |  |\n" in text
    assert "\n1. TwoForCausalLM keeps state\n" in text
    assert "WRONG" not in text


def test_page_shows_faults() -> None:
    assert "| three | = | = | WRONG | = |" in page([WRONG])


def test_page_marks_older_rows() -> None:
    text = page([GOOD, REFUSED], {"two"})
    assert "| one | = |" in text
    assert r"| two \* | = |" in text
    assert "A star: " in text


def test_page_names_what_was_not_built() -> None:
    missing = Row("four").all_cells(Outcome("missing", "it needs timm"))
    text = page([GOOD, missing])
    assert "| four" not in text
    assert "- four: it needs timm" in text


def test_written_page_has_a_line_for_every_case() -> None:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the page is of another transformers")
    table = re.findall(r"^\| ([\w.-]+)(?: \\\*)? \| ", text, re.MULTILINE)
    rest = re.findall(r"^- ([\w.-]+): ", text, re.MULTILINE)
    assert {*table, *rest} - {"model"} == all_cases().keys(), "run `make models-table`"


def test_counts_are_of_models_that_were_tried() -> None:
    text = counts([GOOD, REFUSED, WRONG, Row("four").all_cells(Outcome("missing"))])
    assert text.startswith("Of 3 models: compress 3 exact, 0 refused;")
    assert "serve base 1 exact, 1 refused, 1 WRONG or CRASH" in text


def test_reasons_same_but_for_names_share_a_number() -> None:
    reasons = Reasons()
    first = Outcome("refused", "model.layers.1.mlp.bias: [2, 3] has no place in OneForCausalLM")
    same = Outcome("refused", "model.layers.0.attn.bias: [7] has no place in TwoForCausalLM")
    other = Outcome("refused", "it keeps state")
    assert [reasons.sign("x", found) for found in (first, same, other)] == ["1", "1", "2"]


def test_row_survives_json() -> None:
    assert Row.from_json(REFUSED.to_json()) == REFUSED


def test_outcome_of_error_only_a_sentence_of_ours_is_a_refusal() -> None:
    assert outcome_of(InputError("it cannot be used")).state == "refused"
    assert outcome_of(ConfigError("it cannot be served")).state == "refused"
    assert outcome_of(ConfigError("first\nsecond")).state == "crash"
    assert outcome_of(GenerationFailed("a step failed")).state == "crash"
    assert outcome_of(KeyError("impart_paged")).state == "crash"
