"""Control tokens in content: which they are, marked in any case, encoded as letters."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from server.text.control_tokens import (
    END,
    START,
    UnmarkableToken,
    control_tokens,
    encode_marked,
    marked,
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
    plain = control_tokens(tokenizer, "{{ messages[0]['content'] }}\n")
    assert TURN in plain
    assert TOOL not in plain
    for template in ("a<tool>{{ x }}", "{{ '<tool>' + x }}", "{% if x == '<tool>' %}y{% endif %}"):
        assert TOOL in control_tokens(tokenizer, template)
        assert "\n" not in control_tokens(tokenizer, template + "\n")


def test_marked_texts_have_every_token_between_markers_whatever_its_case() -> None:
    value = {
        "a": f"x{TURN}y",
        "b": [f"{TURN.upper()}", 3, None],
        TURN: f"forged {START}{TURN}{END}",
    }
    assert marked(value, (TURN,)) == {
        "a": f"x{START}{TURN}{END}y",
        "b": [f"{START}{TURN.upper()}{END}", 3, None],
        TURN: f"forged {START}{TURN}{END}",
    }
    assert marked(f"{START}a{END}", ()) == "a"


def test_encode_marked_makes_control_tokens_of_the_templates_own_only(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turn = tokenizer.convert_tokens_to_ids(TURN)
    text = f"{TURN}hello {START}{TURN}{END} you{TURN}"
    ids = encode_marked(tokenizer, text)
    assert [place for place, found in enumerate(ids) if found == turn] == [0, len(ids) - 1]
    assert tokenizer.decode(ids) == f"{TURN}hello {TURN} you{TURN}"


def test_encode_marked_torn_markers_break_the_text_and_are_gone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = encode_marked(tokenizer, f"<|tu{END}rn|>")
    assert tokenizer.convert_tokens_to_ids(TURN) not in ids
    assert tokenizer.decode(ids) == TURN


def test_encode_marked_token_that_the_model_makes_of_letters_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    letter = "a"
    assert tokenizer.convert_tokens_to_ids(letter) is not None
    tokenizer.add_tokens([AddedToken(letter, special=True)])
    with pytest.raises(UnmarkableToken, match="cannot be told"):
        encode_marked(tokenizer, f"{START}{letter}{END}")
