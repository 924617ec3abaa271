"""Log probabilities in both formats: entries for chat, four parallel lists for completions."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from server.api.reply import Choice, clamp
from server.engine.types import TokenLogprob


def entries(tokens: Sequence[TokenLogprob], n_top: int) -> list[dict[str, Any]]:
    """Return the entries of a chat's `content`, each with its best alternatives."""
    return [
        {**_entry(token), "top_logprobs": [_entry(item) for item in token.top[:n_top]]}
        for token in tokens
    ]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": clamp(token.logprob), "bytes": list(token.raw)}


def parallel_lists(choice: Choice, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the lists; their offsets go on where the choice's last ones ended."""
    offsets = []
    for token in tokens:
        offsets.append(choice.text_offset)
        choice.text_offset += token.n_chars
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [None if t.logprob is None else clamp(t.logprob) for t in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """Return the best alternatives and the token itself; None for a prompt's first token.

    The token has its own text as key. Alternatives that would print as another one does are named
    by their bytes, as OpenAI names parts of characters, else by their id, as vLLM does.
    """
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for item in token.top:
        is_own = item.token_id == token.token_id
        key = token.token if is_own else _free_name(item, {token.token, *best})
        best[key] = clamp(item.logprob)
    best.setdefault(token.token, clamp(token.logprob))
    return best


def _free_name(item: TokenLogprob, taken: Container[str]) -> str:
    return next(name for name in _names(item) if name not in taken)


def _names(item: TokenLogprob) -> Iterator[str]:
    if item.token:
        yield item.token
    if item.raw != item.token.encode("utf-8", "replace"):
        yield "bytes:" + "".join(f"\\x{byte:02x}" for byte in item.raw)
    yield f"token_id:{item.token_id}"


def prompt_in_text(tokens: Sequence[TokenLogprob], text: str) -> Iterator[TokenLogprob]:
    """Yield a prompt's tokens as its text has them.

    A special token counts where the text has its name; one that the tokenizer added has no width.
    The first word may have no space before it there. Together they are as wide as the text.
    """
    start = 0
    for i, token in enumerate(tokens):
        found = _at(token, text, start)
        if i == len(tokens) - 1:
            found = found._replace(n_chars=len(text) - start)
        start += found.n_chars
        yield found


def _at(token: TokenLogprob, text: str, start: int) -> TokenLogprob:
    shown = token.token
    if text.startswith(shown, start):
        return token._replace(n_chars=len(shown))
    if shown.startswith(" ") and text.startswith(shown[1:], start):
        return token._replace(token=shown[1:], n_chars=len(shown) - 1)
    return token._replace(n_chars=min(token.n_chars, len(text) - start))
