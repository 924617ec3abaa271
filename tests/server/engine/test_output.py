"""From the engine's ids to text: what a reader gets, when the engine is told to stop, failures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.output import MAX_BEHIND, RequestOutput, TextOutput
from server.engine.types import OutputChunk, SamplingParams, TokenLogprob
from server.errors import DeadlineExceeded, GenerationFailed
from server.text.assets import TextAssets
from tests.tiny import BOS, EOS, make_tokenizer
from tests.tokenizer_kinds import KINDS, WITH_BYTES, tokenizer_of

TEXT = TextAssets.of_tokenizer(make_tokenizer(320))


def ids_of(text: str) -> list[int]:
    return list(TEXT.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def engine_chunk(token: int, **fields: object) -> OutputChunk:
    """What the engine's thread makes of one token: ids, no text."""
    return OutputChunk(token_ids=(token,), **fields)  # type: ignore[arg-type]


class Reader:
    """An output, how often its reader was called and the engine was told to stop."""

    def __init__(self, **params: object) -> None:
        fields = {"max_tokens": 100} | params
        self.n_calls = self.n_aborts = 0
        text = TextOutput(TEXT, SamplingParams(**fields))  # type: ignore[arg-type]
        self.output = RequestOutput(text, self._called, self._aborted)

    def _called(self) -> None:
        self.n_calls += 1

    def _aborted(self) -> None:
        self.n_aborts += 1

    def feed(self, ids: Sequence[int], **last: object) -> None:
        for token in ids[:-1]:
            self.output.receive(engine_chunk(token))
        self.output.receive(engine_chunk(ids[-1], **last))  # type: ignore[arg-type]


def text_of(chunks: Sequence[OutputChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_ends_the_text_and_aborts_and_later_tokens_are_dropped(include: bool) -> None:
    reader = Reader(stop=("END",), include_stop_str_in_output=include)
    up_to, after = ids_of("say END"), ids_of(" now")
    reader.feed(up_to)
    reader.feed(after)  # the engine was a step ahead
    reader.output.receive(engine_chunk(5, finish_reason="length"))
    chunks = reader.output.take()
    assert text_of(chunks) == ("say END" if include else "say ")
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", "END")
    assert [i for d in chunks for i in d.token_ids] == up_to  # what usage counts
    assert reader.n_aborts == 1
    assert reader.n_calls == len(up_to)
    reader.output.close()
    assert reader.n_aborts == 1


def test_stop_string_completed_by_the_last_token_is_stop_not_length() -> None:
    reader = Reader(stop=("END",))
    reader.feed(ids_of("an END"), finish_reason="length")
    last = reader.output.take()[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "END")
    assert reader.n_aborts == 0  # the engine has ended it itself


def test_stop_string_before_min_tokens_is_text() -> None:
    reader = Reader(stop=("END",))
    for token in ids_of("an END"):
        reader.output.receive(engine_chunk(token, may_stop=False))
    reader.feed(ids_of(" and on"), finish_reason="length")
    chunks = reader.output.take()
    assert text_of(chunks) == "an END and on"
    assert (chunks[-1].finish_reason, reader.n_aborts) == ("length", 0)


def test_stop_token_is_counted_and_not_shown_and_held_text_comes_out() -> None:
    reader = Reader(stop=("XYZ",))
    reader.feed(ids_of("aXY"))
    reader.output.receive(engine_chunk(ids_of("b")[0], finish_reason="stop", stop_reason=9))
    chunks = reader.output.take()
    assert text_of(chunks) == "aXY"
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", 9)
    assert len(chunks[-1].token_ids) == 1


@pytest.mark.parametrize("skip", [True, False])
def test_stop_token_is_shown_where_stops_are(skip: bool) -> None:
    """As vLLM does: a special one has no place in the text unless they are not skipped."""
    ordinary, special = ids_of("b")[0], TEXT.tokenizer.eos_token_id
    for token, want in ((ordinary, "aXYb"), (special, "aXY" if skip else f"aXY{EOS}")):
        reader = Reader(stop=("XYZ",), include_stop_str_in_output=True, skip_special_tokens=skip)
        reader.feed(ids_of("aXY"))
        scored = (TokenLogprob(token, -1.0),)
        reader.output.receive(
            engine_chunk(token, finish_reason="stop", stop_reason=9, logprobs=scored)
        )
        chunks = reader.output.take()
        assert text_of(chunks) == want
        (last,) = chunks[-1].logprobs
        assert last.token == (EOS if token == special else "b")
        assert last.n_chars == len(want) - 3


def scored_chunks(kind: str, text: str, **params: object) -> tuple[str, list[TokenLogprob]]:
    """The text and the log probabilities of a text after the prompt "book"."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind), eos_token=EOS)
    assets = TextAssets.of_tokenizer(tokenizer)
    prompt = assets.tokenizer.encode("book", add_special_tokens=False)
    own = text if kind in ("byte-level", "gemma") else text.lstrip()  # others add the first space
    ids = assets.tokenizer.encode(own, add_special_tokens=False)
    fields = {"max_tokens": 100} | params
    output = TextOutput(assets, SamplingParams(**fields), prompt)  # type: ignore[arg-type]
    shown, found = "", []
    for i, token in enumerate(ids):
        top = tuple(TokenLogprob(other, -2.0) for other in (token, *ids[:3]))
        known = {"logprobs": (TokenLogprob(token, -1.0, top),)}
        reason = "length" if i + 1 == len(ids) else None
        chunk = output.with_text(engine_chunk(token, finish_reason=reason, **known))
        shown += chunk.text
        found += chunk.logprobs
    assert [one.token_id for one in found] == ids
    return shown, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" like 😊 and 火星 naïve €5", " é 🎉!", " 🎉"])
def test_tokens_and_bytes_of_log_probabilities_join_to_the_text(kind: str, text: str) -> None:
    shown, found = scored_chunks(kind, text)
    assert "".join(one.token for one in found if one.token != "<unk>") == shown
    assert sum(one.n_chars for one in found) == len(shown)
    if kind in ("byte-level", *WITH_BYTES):
        assert shown == text
        assert b"".join(one.raw for one in found) == text.encode()
        assert not any("\ufffd" in one.token for one in found)
    for one in found:
        own = next(item for item in one.top if item.token_id == one.token_id)
        assert (own.token, own.raw) == (one.token, one.raw)


@pytest.mark.parametrize("kind", ["byte-level", *WITH_BYTES])
def test_text_that_ends_within_a_character_gives_its_last_token_what_is_shown(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind))
    assets = TextAssets.of_tokenizer(tokenizer)
    *ids, _ = assets.tokenizer.encode("book🎉", add_special_tokens=False)
    output = TextOutput(assets, SamplingParams(100))
    chunks = [output.with_text(engine_chunk(i, logprobs=(TokenLogprob(i, -1.0),))) for i in ids]
    chunks.append(output.with_text(OutputChunk(finish_reason="abort")))
    tokens = [one for chunk in chunks for one in chunk.logprobs]
    assert text_of(chunks) == "".join(one.token for one in tokens) == assets.decode(ids)
    assert [one.raw for one in tokens[-3:]] == [b"\xf0", b"\x9f", b"\x8e"]


@pytest.mark.parametrize("kind", ["byte-level", *WITH_BYTES])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_prompts_log_probabilities_are_named_and_join(kind: str, max_tokens: int) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind), bos_token=BOS)
    assets = TextAssets.of_tokenizer(tokenizer)
    *ids, last = assets.tokenizer.encode(f"{BOS}é book🎉", add_special_tokens=False)
    output = TextOutput(assets, SamplingParams(max_tokens), ids)
    known = tuple(TokenLogprob(i, -1.0) for i in ids)
    chunk = output.with_text(OutputChunk(prompt_logprobs=known))
    first, *rest = chunk.prompt_logprobs
    assert (first.token, first.n_chars) == (BOS, 0)
    shown = "".join(one.token for one in rest).lstrip()
    if max_tokens == 0:
        assert shown.startswith("é book\ufffd")
    else:  # the output brings the character that the prompt began
        assert shown == "é book"
        assert output.with_text(engine_chunk(last, finish_reason="length")).text == "🎉"
    assert [one.raw for one in rest[-3:]] == [b"\xf0", b"\x9f", b"\x8e"]


def test_reader_that_takes_none_holds_a_bounded_number_of_chunks_and_loses_nothing() -> None:
    reader, ids = Reader(), ids_of("The quick brown fox. ") * 40
    assert len(ids) > 3 * MAX_BEHIND
    top = (TokenLogprob(ids[0], -1.0), TokenLogprob(ids[1], -2.0))
    known = {"logprobs": (TokenLogprob(ids[0], -1.0, top),), "n_cached_tokens": 16, "queue_s": 0.5}
    of_prompt = (TokenLogprob(3, None),)
    reader.output.receive(engine_chunk(ids[0], prompt_logprobs=of_prompt, **known))
    peak = 0
    for token in ids[1:-1]:
        reader.output.receive(engine_chunk(token, **known))
        peak = max(peak, len(reader.output._pending))
    reader.output.receive(engine_chunk(ids[-1], finish_reason="length", **known))
    chunks = reader.output.take()
    assert len(chunks) <= peak <= MAX_BEHIND + 1
    whole = OutputChunk.joined(chunks)
    assert whole.text == TEXT.tokenizer.backend_tokenizer.decode(ids)
    assert whole.token_ids == tuple(ids)
    assert len(whole.logprobs) == len(ids)
    assert [t.token for t in whole.logprobs[0].top] == [TEXT.decode([i]) for i in ids[:2]]
    assert [p.token_id for p in whole.prompt_logprobs] == [3]
    assert (whole.finish_reason, whole.n_cached_tokens, whole.queue_s) == ("length", 16, 0.5)
    assert reader.output.take() == []


def test_failure_in_wording_fails_this_request_and_aborts_it() -> None:
    reader = Reader()
    reader.feed(ids_of("good"))
    reader.output.receive(engine_chunk("no id"))  # type: ignore[arg-type]
    reader.feed(ids_of("later"))
    assert text_of(reader.output.take()) == "good"
    assert isinstance(reader.output.error, GenerationFailed)
    assert "no id" not in str(reader.output.error)
    assert reader.n_aborts == 1


def test_error_of_the_engine_is_kept_after_what_came_before() -> None:
    reader = Reader()
    reader.feed(ids_of("good"))
    error = DeadlineExceeded("too late")
    reader.output.receive(error)
    assert text_of(reader.output.take()) == "good"
    assert reader.output.error is error
    assert reader.n_aborts == 0
    reader.output.close()
    assert reader.n_aborts == 0


def test_close_aborts_once_and_nothing_comes_after() -> None:
    reader = Reader()
    reader.feed(ids_of("a"))
    reader.output.take()
    reader.output.close()
    reader.output.close()
    n_calls = reader.n_calls
    reader.feed(ids_of("b"))
    assert (reader.output.take(), reader.n_aborts, reader.n_calls) == ([], 1, n_calls)
