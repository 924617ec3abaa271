"""From the engine's ids to text: what a reader gets, when the engine is told to stop, failures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from server.engine.output import MAX_BEHIND, RequestOutput, TextOutput
from server.engine.text import TextAssets
from server.engine.types import OutputChunk, SamplingParams, TokenLogprob
from server.errors import DeadlineExceeded, GenerationFailed
from tests.tiny import make_tokenizer

TEXT = TextAssets(make_tokenizer(320), frozenset(), {})


def ids_of(text: str) -> list[int]:
    return list(TEXT.backend.encode(text, add_special_tokens=False).ids)


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


def test_reader_that_takes_none_holds_a_bounded_number_of_chunks_and_loses_nothing() -> None:
    reader, ids = Reader(), ids_of("The quick brown fox. ") * 40
    assert len(ids) > 3 * MAX_BEHIND
    top = (TokenLogprob(ids[0], -1.0), TokenLogprob(ids[1], -2.0))
    known = {"logprobs": (TokenLogprob(ids[0], -1.0, top),), "n_cached_tokens": 16}
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
    assert whole.text == TEXT.backend.decode(ids)
    assert whole.token_ids == tuple(ids)
    assert len(whole.logprobs) == len(ids)
    assert [t.token for t in whole.logprobs[0].top] == [TEXT.token_text(i) for i in ids[:2]]
    assert [p.token_id for p in whole.prompt_logprobs] == [3]
    assert (whole.finish_reason, whole.n_cached_tokens) == ("length", 16)
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
