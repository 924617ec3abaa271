"""Streaming text and stop strings against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.text.detokenizer import Detokenizer
from server.text.text_stream import text_stream
from server.text.vocabulary import Vocabulary
from tests.tiny import make_tokenizer
from tests.tokenizer_kinds import tokenizer_of

BACKEND: Tokenizer = make_tokenizer(320).backend_tokenizer
VOCABULARY = Vocabulary.of(BACKEND)


def ids_of(text: str) -> list[int]:
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


def detokenizer_of(vocabulary: Vocabulary = VOCABULARY, **options: object) -> Detokenizer:
    stream = text_stream(vocabulary, skip_special_tokens=True)
    return Detokenizer(stream, **options)  # type: ignore[arg-type]


def stream(text: str, **options: object) -> tuple[list[str], Detokenizer]:
    detokenizer = detokenizer_of(**options)
    shown = []
    for token in ids_of(text):
        shown.append(detokenizer.push(token))
        if detokenizer.stopped_by is not None:
            break
    shown.append(detokenizer.finish())
    return shown, detokenizer


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_push_any_text_concatenates_to_the_whole(text: str) -> None:
    shown, _ = stream(text)
    assert "".join(shown) == BACKEND.decode(ids_of(text), skip_special_tokens=True)


@given(
    st.text(alphabet="abc é😀", max_size=30),
    st.lists(st.text(alphabet="abc é😀", min_size=1, max_size=4), max_size=3),
)
def test_push_with_stop_strings_ends_at_the_first_that_completes(
    text: str, stops: list[str]
) -> None:
    shown, detokenizer = stream(text, stop=tuple(stops))
    result = "".join(shown)
    whole = BACKEND.decode(ids_of(text), skip_special_tokens=True)
    assert whole.startswith(result)
    assert not any(stop in result for stop in stops)
    if detokenizer.stopped_by is not None:
        assert whole[len(result) :].startswith(detokenizer.stopped_by)
    else:
        assert result == whole


def test_push_possible_stop_prefix_is_held_back_until_decided() -> None:
    detokenizer = detokenizer_of(stop=("XYZ",))
    shown = "".join(detokenizer.push(t) for t in ids_of("aXY"))
    assert shown == "a"
    assert detokenizer.push(ids_of("b")[0]) == "XYb"


@pytest.mark.parametrize(("include", "want"), [(False, "say "), (True, "say END")])
def test_push_include_stop_decides_whether_it_is_shown(include: bool, want: str) -> None:
    shown, detokenizer = stream("say END now", stop=("END",), include_stop=include)
    assert "".join(shown) == want
    assert detokenizer.stopped_by == "END"


def test_finish_incomplete_utf8_shows_replacement_character() -> None:
    ids = ids_of("😀")
    assert len(ids) > 1
    detokenizer = detokenizer_of()
    text = "".join(detokenizer.push(t) for t in ids[:-1]) + detokenizer.finish()
    assert text == BACKEND.decode(ids[:-1], skip_special_tokens=True)
    assert "\ufffd" in text


def test_stop_string_in_a_run_of_bytes_is_found_and_one_before_min_tokens_is_not() -> None:
    backend = tokenizer_of("llama")
    euros = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "€€".encode()]
    book = backend.encode("book", add_special_tokens=False).ids
    for n_unstopped, want in ((0, ""), (3, "€"), (6, "€€book")):
        detokenizer = detokenizer_of(Vocabulary.of(backend), stop=("€",))
        shown = ""
        for i, token in enumerate([*euros, *book]):
            shown += detokenizer.push(token, check_stop=i >= n_unstopped)
            if detokenizer.stopped_by is not None:
                break
        assert (shown + detokenizer.finish()).replace(" ", "") == want
        assert (detokenizer.stopped_by is None) == (n_unstopped == 6)
