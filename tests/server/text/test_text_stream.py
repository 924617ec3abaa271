"""Text of ids one at a time against the tokenizer's own decoding of all of them at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.byte_run import MAX_RUN_BYTES
from server.text.text_stream import TextStream, text_stream
from server.text.vocabulary import Vocabulary
from tests.tiny import BOS, EOS
from tests.tokenizer_kinds import KINDS, TEXTS, WITH_BYTES, tokenizer_of

VOCABULARIES = {kind: Vocabulary.of(tokenizer_of(kind)) for kind in KINDS}
EURO = "€".encode()


def stream_of(
    kind: str, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> TextStream:
    return text_stream(
        VOCABULARIES[kind], skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
    )


def pieces_of(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [piece for token_id in ids for piece in stream.push(token_id)] + stream.flush()


def decoded(kind: str, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    return tokenizer_of(kind).decode(list(ids), skip_special_tokens=skip_special_tokens)


def byte_ids(kind: str, data: bytes) -> list[int]:
    backend = tokenizer_of(kind)
    return [backend.token_to_id(f"<0x{byte:02X}>") for byte in data]


def ids_of(kind: str, text: str) -> list[int]:
    return list(tokenizer_of(kind).encode(text, add_special_tokens=False).ids)


def some_ids(rng: random.Random, kind: str) -> list[int]:
    """Random ids: bytes often, whole texts, special tokens, ids past the vocabulary."""
    size = tokenizer_of(kind).get_vocab_size()
    fallback = list(VOCABULARIES[kind].byte_of)
    ids: list[int] = []
    while len(ids) < 12:
        what = rng.random()
        if what < 0.25 and fallback:
            ids += byte_ids(kind, rng.choice(["é", "€", "😊", " ", "▁", "a"]).encode())
        elif what < 0.4 and fallback:
            ids.append(rng.choice(fallback))
        elif what < 0.5:
            ids += ids_of(kind, rng.choice(TEXTS))[: rng.randrange(1, 9)]
        elif what < 0.55:
            ids.append(size + 7)
        else:
            ids.append(rng.randrange(size))
    return ids


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_are_the_text_of_decoding_them_at_once(kind: str, skip: bool) -> None:
    rng = random.Random(1)
    for _ in range(1500):
        ids = some_ids(rng, kind)
        pieces = pieces_of(stream_of(kind, skip_special_tokens=skip), ids)
        assert "".join(pieces) == decoded(kind, ids, skip_special_tokens=skip), ids
        assert len(pieces) <= len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_after_a_prompt_are_the_rest_of_the_whole_text(kind: str) -> None:
    """The prompt ends at the end of a token that is no byte: no character lies across."""
    rng = random.Random(2)
    for _ in range(1500):
        ids = some_ids(rng, kind)
        known = VOCABULARIES[kind]
        ends = [
            i
            for i, token in enumerate(ids)
            if token not in known.byte_of and known.is_shown(token, skip_special_tokens=True)
        ]
        prompt = ids[: rng.choice(ends) + 1] if ends else []
        if "\ufffd" in decoded(kind, prompt):
            continue
        text = "".join(pieces_of(stream_of(kind, prompt), ids[len(prompt) :]))
        assert decoded(kind, prompt) + text == decoded(kind, ids), (prompt, ids)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=30),
    st.integers(0, 60),
)
def test_any_text_split_anywhere_is_the_whole_text(kind: str, text: str, cut: int) -> None:
    """Wherever the prompt ends, a character that it only begins comes with the rest."""
    ids = ids_of(kind, "x" + text)
    prompt, rest = ids[:cut], ids[cut:]
    before = stream_of(kind)
    pieces = [piece for token in prompt for piece in before.push(token)]
    shown = "".join(pieces + before.flush(at_end=False))
    assert "\ufffd" not in shown
    text = "".join(pieces_of(stream_of(kind, prompt), rest))
    assert shown + text == decoded(kind, ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_whole_character_then_a_part_of_one_then_a_token(kind: str) -> None:
    """What made an error of the library's own stream."""
    ids = [*byte_ids(kind, EURO + EURO[:1]), *ids_of(kind, "book")]
    assert "".join(pieces_of(stream_of(kind), ids)) == decoded(kind, ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
@pytest.mark.parametrize("n_prompt", [0, 1, 2, 3])
def test_character_across_the_end_of_the_prompt_comes_whole(kind: str, n_prompt: int) -> None:
    word, euro = ids_of(kind, "book"), byte_ids(kind, EURO)
    stream = stream_of(kind, word + euro[:n_prompt])
    text = "".join(pieces_of(stream, euro[n_prompt:] + euro))
    assert text == ("€" if n_prompt == 3 else "€€")


def test_byte_level_character_across_the_end_of_the_prompt_comes_whole() -> None:
    ids, first = ids_of("byte-level", "ab😊c"), len(ids_of("byte-level", "ab"))
    assert len(ids) == first + 5
    for cut in range(first, first + 4):
        text = "".join(pieces_of(stream_of("byte-level", ids[:cut]), ids[cut:]))
        assert text == "😊c", cut


@pytest.mark.parametrize("kind", ["llama", "metaspace", "unigram", "wordpiece"])
def test_first_space_after_a_prompt_is_kept(kind: str) -> None:
    prompt, rest = ids_of(kind, "book"), ids_of(kind, "a table")
    assert decoded(kind, prompt) == "book"
    assert "".join(pieces_of(stream_of(kind, prompt), rest)) == " a table"
    assert "".join(pieces_of(stream_of(kind), prompt + rest)) == "book a table"


def test_text_after_nothing_but_bos_begins_without_its_space() -> None:
    bos = tokenizer_of("llama").token_to_id(BOS)
    ids = ids_of("llama", "book")
    assert "".join(pieces_of(stream_of("llama", [bos]), ids)) == "book"


def test_character_of_several_ids_is_the_piece_of_the_last() -> None:
    for kind in ("byte-level", "mixed", *WITH_BYTES):
        ids = ids_of(kind, "é 🎉!")
        assert len(ids) > 4
        pieces = pieces_of(stream_of(kind), ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == decoded(kind, ids)
        assert "\ufffd" not in "".join(pieces)
        finishing = [piece for piece in pieces if "🎉" in piece]
        assert len(finishing) == 1
        assert pieces[pieces.index(finishing[0]) - 1] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_peek_is_the_piece_that_push_would_give(kind: str) -> None:
    rng = random.Random(3)
    size, n_equal = tokenizer_of(kind).get_vocab_size(), 0
    for _ in range(300):
        ids, other = some_ids(rng, kind)[: rng.randrange(8)], rng.randrange(size)
        stream, same = stream_of(kind), stream_of(kind)
        for token in ids:
            stream.push(token)
            same.push(token)
        peeked = stream.peek(other)
        assert stream.peek(other) == peeked, "peeking changed something"
        pushed = stream.push(other)
        assert pushed == same.push(other)
        if pushed and not VOCABULARIES[kind].byte_of.get(other):
            assert pushed[-1] == peeked
            n_equal += 1
    assert n_equal > 100


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_long_run_of_bytes_is_shown_before_it_ends(kind: str) -> None:
    """A script without tokens of its own is streamed; nothing of it is lost or doubled."""
    ids = ids_of(kind, "book") + byte_ids(kind, ("€" * 200).encode())
    stream, shown = stream_of(kind), ""
    for n, token in enumerate(ids):
        shown += "".join(stream.push(token))
        assert len(shown.encode()) >= n - MAX_RUN_BYTES - 3
    assert shown + "".join(stream.flush()) == decoded(kind, ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_special_token_within_a_run_of_bytes_is_passed_over(kind: str) -> None:
    eos = tokenizer_of(kind).token_to_id(EOS)
    first, *rest = byte_ids(kind, EURO)
    pieces = pieces_of(stream_of(kind), [first, eos, *rest])
    assert pieces == ["", "", "", "€"]
