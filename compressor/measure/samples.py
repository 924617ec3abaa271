"""What an evaluation runs over: texts, or prompts with the answers that count.

A line of JSON, or a row of Parquet, is one of

    {"text": ...}                          every token counts
    {"prompt": ..., "completion": ...}     the completion counts, and the end-of-text token after it
    {"messages": [{"role", "content"}]}    the assistant's turns count, in the chat template

where prompt and completion may also be lists of messages. Prompt and answer are tokenised apart:
that is where a server stops reading and starts to generate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, InputError
from compressor.measure.texts import (
    MAX_TEXT_TOKENS,
    MAX_TEXTS,
    load_texts,
    parquet_columns,
    parquet_records,
)

_CHAT_FORMS = (("messages",), ("prompt", "completion"))


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one text, and for each whether its prediction is measured.

    is_answer  whether the measured tokens answer a prompt, rather than being all of the text
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    is_answer: bool = False


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    counted: bool


def load_tokenizer(path: Path, wanted_by: str = "evaluating") -> Any:
    """Load the fine-tune's tokenizer; CheckpointError, which says what it is `wanted_by`, if it has
    none that can be loaded.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {wanted_by} needs the fine-tune's tokenizer, which cannot be loaded; put its "
            "files beside the weights"
        ) from error


def read_samples(
    file: Path | None,
    tokenizer: Any,
    *,
    limit: int = MAX_TEXTS,
    max_tokens: int = MAX_TEXT_TOKENS,
) -> list[Sample]:
    """Read up to `limit` samples, each cut at `max_tokens` tokens.

    file  as `read_texts` takes them, or ``.jsonl`` or ``.parquet`` with the chat forms above; None
          for the general texts that come with the package

    Samples with nothing to predict within `max_tokens` are left out. Raises InputError naming file
    and line for what cannot be used.
    """
    samples = []
    for sample in _samples(file, tokenizer, limit):
        ids, counted = sample.ids[:max_tokens], sample.counted[:max_tokens]
        if any(counted[1:]):
            samples.append(Sample(ids, counted, sample.is_answer))
    if not samples:
        raise InputError(
            f"{file or 'built-in texts'}: no text has a token to predict within {max_tokens} "
            "tokens; give longer texts or allow more tokens"
        )
    return samples


def text_samples(texts: Sequence[str], tokenizer: Any) -> Iterator[Sample]:
    """Plain texts: every token counts."""
    for text in texts:
        ids = tuple(tokenizer(text).input_ids)
        yield Sample(ids, (True,) * len(ids))


def completion_sample(prompt: str, completion: str, tokenizer: Any) -> Sample:
    """Prompt and answer: the answer counts, and the end of text after it."""
    sample = _join([_Piece(prompt, False), _Piece(completion, True)], tokenizer)
    eos = tokenizer.eos_token_id
    if eos is None or (sample.ids and sample.ids[-1] == eos):
        return sample
    return Sample((*sample.ids, eos), (*sample.counted, True), True)


def _samples(file: Path | None, tokenizer: Any, limit: int) -> Iterator[Sample]:
    records = None if file is None else _chat_records(file, limit)
    if records is None:
        yield from text_samples(load_texts(file, limit), tokenizer)
        return
    for where, record in records:
        if "messages" in record:
            pieces = _conversation(where, _messages(where, record, "messages"), 0, tokenizer)
            yield _join(pieces, tokenizer, starts_plain=False)
        else:
            yield _completion(where, record, tokenizer)


def _chat_records(file: Path, limit: int) -> list[tuple[str, dict[str, Any]]] | None:
    """The records of a file whose first line is a chat or a prompt, with their places; or None."""
    if file.suffix == ".parquet":
        return _chat_rows(file, limit)
    if file.suffix != ".jsonl":
        return None
    records: list[tuple[str, dict[str, Any]]] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(records) == limit:
                    break
                if line.strip():
                    records.append((f"{file}, line {number}", _parse(file, number, line)))
                    if not any(form[0] in records[0][1] for form in _CHAT_FORMS):
                        return None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text") from error
    return records or None


def _chat_rows(file: Path, limit: int) -> list[tuple[str, dict[str, Any]]] | None:
    columns = parquet_columns(file)
    wanted = next((form for form in _CHAT_FORMS if form[0] in columns), None)
    if wanted is None:
        return None
    rows = islice(parquet_records(file, wanted, limit), limit)
    return [(f"{file}, row {number}", record) for number, record in rows] or None


def _parse(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{file}, line {number}: expected an object")
    return record


def _completion(where: str, record: dict[str, Any], tokenizer: Any) -> Sample:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return completion_sample(prompt, completion, tokenizer)
    if isinstance(prompt, list) and isinstance(completion, list):
        first = _messages(where, record, "prompt")
        messages = first + _messages(where, record, "completion")
        pieces = _conversation(where, messages, len(first), tokenizer)
        return _join(pieces, tokenizer, starts_plain=False)
    raise InputError(f'{where}: "prompt" and "completion" must be two texts or two message lists')


def _messages(where: str, record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = record[key]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise InputError(f'{where}: "{key}" must be a list of objects with "role" and "content"')
    return messages


def _conversation(
    where: str, messages: list[dict[str, Any]], start: int, tokenizer: Any
) -> list[_Piece]:
    """Cut a rendered conversation; the assistant's turns from message `start` on count.

    A turn ends before the white space that the template puts after its end marker: a model stops
    at the marker.
    """
    turns = [i for i, m in enumerate(messages) if i >= start and m["role"] == "assistant"]
    if not turns:
        raise InputError(f"{where}: no message of the assistant to measure")
    whole = _render(where, messages, tokenizer, prompt=False)
    pieces, position = [], 0
    for turn in turns:
        before = _render(where, messages[:turn], tokenizer, prompt=True)
        through = _render(where, messages[: turn + 1], tokenizer, prompt=False).rstrip()
        if not (whole.startswith(through) and through.startswith(before)):
            raise InputError(
                f"{where}: the chat template renders message {turn + 1} differently once more "
                "follow, so its turn cannot be told apart; give one answer a line"
            )
        pieces += [_Piece(whole[position : len(before)], False)]
        pieces += [_Piece(whole[len(before) : len(through)], True)]
        position = len(through)
    return pieces


def _render(where: str, messages: list[dict[str, Any]], tokenizer: Any, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f'{where}: the fine-tune has no chat template; give "prompt" and "completion" as texts'
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: the chat template refuses it: {error}") from error
    return text


def _join(pieces: Sequence[_Piece], tokenizer: Any, *, starts_plain: bool = True) -> Sample:
    """Tokenise piece by piece. starts_plain: the first gets the tokenizer's special tokens."""
    ids: list[int] = []
    counted: list[bool] = []
    for number, piece in enumerate(pieces):
        special = starts_plain and number == 0
        found = tokenizer(piece.text, add_special_tokens=special).input_ids
        ids += found
        counted += [piece.counted] * len(found)
    return Sample(tuple(ids), tuple(counted), True)
