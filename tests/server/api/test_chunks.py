"""Streamed pieces from the cut frame against the same pieces rendered whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import sse
from server.api.chat import ChatReply
from server.api.chunks import ChunkWriter
from server.api.completions import CompletionReply
from server.api.prompts import Prompt
from server.api.reply import Choice, Envelope, Reply, usage_of
from server.api.schemas import ChatRequest, CompletionRequest
from server.engine.types import OutputChunk, TokenLogprob

ENVELOPE = Envelope("id-1", "chunk", 17, 'a "model"', "print")
LOGPROB = TokenLogprob(7, -0.5, (), "x", b"x", 1)
TEXTS = st.text(st.characters(), max_size=8)  # lone surrogates too


def reply_of(kind: str, **fields: Any) -> Reply:
    body: dict[str, Any] = {"model": "m", "stream": True, "n": 2, **fields}
    if kind == "chat":
        messages = [{"role": "user", "content": "x"}]
        return ChatReply(ChatRequest.model_validate(body | {"messages": messages}))
    return CompletionReply(CompletionRequest.model_validate(body | {"prompt": "x"}))


def rendered_whole(reply: Reply, choice: Choice, chunk: OutputChunk) -> bytes:
    """Every piece by way of dicts and the JSON encoder."""
    choice.count(chunk)
    pieces = reply.opening(choice) if choice.n_chunks == 1 else []
    piece = reply.piece(choice, chunk)
    if piece is not None:
        pieces.append(piece)
    usage = usage_of([choice], 1) if reply.body.continuous_usage else None
    with_usage = reply.body.include_usage
    return b"".join(sse.frame(ENVELOPE.wrap([p], usage, with_usage=with_usage)) for p in pieces)


def choices() -> list[Choice]:
    return [Choice(i, Prompt([1, 2], "pr\u00f6mpt")) for i in range(2)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("options", OPTIONS)
@given(st.lists(st.tuples(st.integers(0, 1), TEXTS, st.booleans()), min_size=1, max_size=8))
def test_render_any_chunks_equals_rendering_whole(
    kind: str, options: dict[str, Any], steps: list[tuple[int, str, bool]]
) -> None:
    logprobs = {"logprobs": True if kind == "chat" else 1}
    scored = any(scores for _, _, scores in steps)
    reply = reply_of(kind, **options, **(logprobs if scored else {}))
    writer, mine, others = ChunkWriter(reply, ENVELOPE), choices(), choices()
    for n, (index, text, scores) in enumerate(steps):
        reason = "length" if n == len(steps) - 1 else None
        chunk = OutputChunk(text, (5,), (LOGPROB,) if scores else (), finish_reason=reason)
        data = writer.render(mine[index], chunk)
        assert data == rendered_whole(reply, others[index], chunk)
        for event in data.decode().split("\n\n")[:-1]:
            assert json.loads(event.removeprefix("data: "))["id"] == "id-1"
    assert [c.n_tokens for c in mine] == [c.n_tokens for c in others]


def test_render_echo_shows_the_prompt_before_the_first_text_only() -> None:
    writer = ChunkWriter(reply_of("completion", echo=True), ENVELOPE)
    choice, other = choices()
    events = [writer.render(c, OutputChunk("a", (1,))) for c in (choice, choice, other)]
    texts = [json.loads(e.removeprefix(b"data: "))["choices"][0]["text"] for e in events]
    assert texts == ["pr\u00f6mpta", "a", "pr\u00f6mpta"]


def test_render_text_equal_to_a_key_of_the_frame_changes_only_the_text() -> None:
    writer, choice = ChunkWriter(reply_of("completion"), ENVELOPE), choices()[0]
    for text in ("first", '"text":"', "data: [DONE]\n\n"):
        event = writer.render(choice, OutputChunk(text, (1,)))
        (line,) = event.strip().splitlines()
        assert json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] == text


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_render_unicode_line_breaks_stay_within_one_line_of_data(kind: str) -> None:
    """Readers that split as `str.splitlines` does (httpx is one) see one line an event."""
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\x1d\x1e\r\ne"
    writer, choice = ChunkWriter(reply_of(kind), ENVELOPE), choices()[0]
    seen = ""
    for piece in ("x", text, "\u2028"):
        events = writer.render(choice, OutputChunk(piece, (1,))).decode()
        for line in filter(None, events.splitlines()):
            made = json.loads(line.removeprefix("data: "))["choices"][0]
            seen += made["text"] if kind == "completion" else made["delta"].get("content", "")
    assert seen == f"x{text}\u2028"
