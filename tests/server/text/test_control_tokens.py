"""Control tokens in content: which they are, marked in any case, encoded as letters."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from server.text import control_tokens as module
from server.text.control_tokens import (
    END,
    START,
    ControlTokens,
    ControlTokensByTemplate,
    UnmarkableToken,
    encode_marked,
)
from tests.tiny import make_tokenizer

TURN, TOOL = "<|turn|>", "<tool>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    made = make_tokenizer(320)
    made.add_tokens([AddedToken(TURN, special=True), AddedToken(TOOL, special=False)])
    made.add_tokens([AddedToken("\n", special=False)])
    return made


def test_control_tokens_are_special_ones_and_those_that_the_template_writes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    controls = ControlTokensByTemplate(tokenizer)
    plain = controls.of("{{ messages[0]['content'] }}\n")
    assert TURN in plain
    assert TOOL not in plain
    for template in ("a<tool>{{ x }}", "{{ '<tool>' + x }}", "{% if x == '<tool>' %}y{% endif %}"):
        assert TOOL in controls.of(template)
        assert "\n" not in controls.of(template + "\n")


def test_control_tokens_are_found_out_once_for_a_template(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = ControlTokensByTemplate(tokenizer)
    first = controls.of("{{ x }}")
    monkeypatch.setattr(module, "literal_text", pytest.fail)
    assert controls.of("{{ x }}") is first


def test_marked_texts_have_every_token_between_markers_whatever_its_case() -> None:
    value = {
        "a": f"x{TURN}y",
        "b": [f"{TURN.upper()}", 3, None],
        TURN: f"forged {START}{TURN}{END}",
    }
    assert ControlTokens([TURN]).mark(value) == {
        "a": f"x{START}{TURN}{END}y",
        "b": [f"{START}{TURN.upper()}{END}", 3, None],
        TURN: f"forged {START}{TURN}{END}",
    }
    assert ControlTokens([]).mark(f"{START}a{END}") == "a"


LETTERS = st.text(st.sampled_from("aAbBé<>|\u017fsS\u212akß\u0131iI"), max_size=12)


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=6), st.lists(LETTERS, max_size=4))
def test_marks_are_where_a_regular_expression_of_all_tokens_finds_them(
    tokens: list[str], parts: list[str]
) -> None:
    text = "".join(part + token for part, token in zip(parts, tokens, strict=False))
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    assert ControlTokens(tokens).mark(text) == pattern.sub(f"{START}\\g<0>{END}", text)


def test_marking_looks_at_few_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, a place costs a look for each length that begins so."""
    control = ControlTokens(f"<added {i:05d}>" for i in range(50_000))
    looked = []

    class Noted(frozenset[str]):
        def __contains__(self, item: object) -> bool:
            looked.append(item)
            return super().__contains__(item)

    control._tokens = Noted(control._tokens)
    assert control.mark("<" * 1000) == "<" * 1000
    assert control.mark("<added <ADDED 00007>") == f"<added {START}<ADDED 00007>{END}"
    assert len(looked) <= 2


def test_encode_marked_makes_control_tokens_of_the_templates_own_only(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turn = tokenizer.convert_tokens_to_ids(TURN)
    text = f"{TURN}hello {START}{TURN}{END} you{TURN}"
    ids = encode_marked(tokenizer, text, ControlTokens([TURN]))
    assert [place for place, found in enumerate(ids) if found == turn] == [0, len(ids) - 1]
    assert tokenizer.decode(ids) == f"{TURN}hello {TURN} you{TURN}"


def test_encode_marked_torn_markers_break_the_text_and_are_gone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = encode_marked(tokenizer, f"<|tu{END}rn|>", ControlTokens([TURN]))
    assert tokenizer.convert_tokens_to_ids(TURN) not in ids
    assert tokenizer.decode(ids) == TURN


def test_encode_marked_text_of_the_template_between_markers_stays_the_templates(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A template that cuts contents may leave a marker's two halves in two of them."""
    turn = tokenizer.convert_tokens_to_ids(TURN)
    ids = encode_marked(tokenizer, f"{START}<|tu{TURN}rn|>{END}", ControlTokens([TURN]))
    assert ids.count(turn) == 1


def test_encode_marked_token_that_the_model_makes_of_letters_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    letter = "a"
    assert tokenizer.convert_tokens_to_ids(letter) is not None
    tokenizer.add_tokens([AddedToken(letter, special=True)])
    with pytest.raises(UnmarkableToken, match="cannot be told"):
        encode_marked(tokenizer, f"{START}{letter}{END}", ControlTokens([letter]))
