"""The two formats of log probabilities: names of alternatives, offsets, bytes."""

from __future__ import annotations

from server.api.logprobs import entries, parallel_lists, prompt_in_text
from server.api.prompts import Prompt
from server.api.reply import Choice
from server.engine.types import TokenLogprob


def token(token_id: int, text: str, raw: bytes | None = None, logprob: float = -1.0, *top):
    own = text.encode() if raw is None else raw
    return TokenLogprob(token_id, logprob, tuple(top), text, own, len(text))


def choice(text: str = "") -> Choice:
    return Choice(0, Prompt([1], text))


def test_alternatives_that_print_alike_are_all_there_and_the_tokens_own_value_is_its_own() -> None:
    top = (
        token(1, "", b"\xf0", -0.5),
        token(2, "", b"\xe2", -1.0),
        token(3, "A", b"A", -1.5),
        token(4, "A", b"A", -2.0),
        token(5, "\ufffd", b"\xff", -2.5),
    )
    found = parallel_lists(choice(), [token(4, "A", b"A", -2.0, *top)])
    assert found["tokens"] == ["A"]
    assert found["top_logprobs"] == [
        {
            "bytes:\\xf0": -0.5,
            "bytes:\\xe2": -1.0,
            "token_id:3": -1.5,
            "A": -2.0,
            "\ufffd": -2.5,
        }
    ]


def test_part_of_a_character_has_its_own_value_under_its_own_text() -> None:
    top = (token(1, "", b"\xf0", -0.5), token(2, "", b"\xe2", -1.0))
    found = parallel_lists(choice(), [token(2, "", b"\xe2", -1.0, *top), token(9, "€", b"\xac")])
    assert found["tokens"] == ["", "€"]
    assert found["top_logprobs"][0] == {"bytes:\\xf0": -0.5, "": -1.0}
    assert found["text_offset"] == [0, 0]


def test_token_that_is_not_among_the_best_comes_last() -> None:
    found = parallel_lists(choice(), [token(7, "x", None, -9.0, token(1, "y", None, -0.1))])
    assert list(found["top_logprobs"][0].items()) == [("y", -0.1), ("x", -9.0)]


def test_offsets_count_what_is_in_the_text_and_go_on_over_pieces() -> None:
    eos = TokenLogprob(2, -1.0, (), "</s>", b"</s>", 0)
    one = choice()
    first = parallel_lists(one, [token(5, "I"), token(6, " like"), eos])
    second = parallel_lists(one, [token(7, "€")])
    assert first["text_offset"] + second["text_offset"] == [0, 1, 6, 6]
    assert first["tokens"] == ["I", " like", "</s>"]


def test_added_bos_has_no_width_and_the_first_word_no_space() -> None:
    bos = TokenLogprob(1, None, (), "<s>", b"<s>", 0)
    tokens = [bos, token(5, " I"), token(6, " like")]
    found = list(prompt_in_text(tokens, "I like"))
    assert [(one.token, one.n_chars) for one in found] == [("<s>", 0), ("I", 1), (" like", 5)]


def test_special_token_that_the_text_names_has_its_width() -> None:
    bos = TokenLogprob(1, None, (), "<s>", b"<s>", 0)
    found = list(prompt_in_text([bos, token(5, " I")], "<s> I"))
    assert [(one.token, one.n_chars) for one in found] == [("<s>", 3), (" I", 2)]


def test_prompt_that_its_tokenizer_changes_is_as_wide_as_its_text() -> None:
    tokens = [token(5, "hello"), token(6, " you"), token(7, "!")]
    found = list(prompt_in_text(tokens, "HELLO,  you!"))
    assert sum(one.n_chars for one in found) == len("HELLO,  you!")


def test_entries_have_the_tokens_own_bytes() -> None:
    top = (token(1, "", b"\xf0", -0.5), token(2, "€", b"\xac", -1.0))
    (entry,) = entries([token(2, "€", b"\xac", -1.0, *top)], 2)
    assert (entry["token"], entry["bytes"]) == ("€", [0xAC])
    assert [item["bytes"] for item in entry["top_logprobs"]] == [[0xF0], [0xAC]]
    assert [item["token"] for item in entry["top_logprobs"]] == ["", "€"]
