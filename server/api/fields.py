"""Types of request fields that need more than a bound: prompts, stop strings, biases, content.

Each is one function from JSON to a checked value. pydantic's unions would answer with one error
per branch; these say the one thing that is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_ID = 2**31 - 1


def _problem(message: str, **context: Any) -> PydanticCustomError:
    # The message is a literal in this file: pydantic wants a literal, ours may hold {names}.
    return PydanticCustomError("value", message, context or None)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _problem("{what} must be a string", what=what)
    return value


def _token_ids(value: list[object], what: str) -> list[int]:
    for item in value:
        # bool is an int to Python and must not be one here
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
            raise _problem("{what} must hold token ids (integers from 0)", what=what)
    return value  # type: ignore[return-value]


def _one_prompt(value: object, what: str) -> str | list[int]:
    if not value:
        raise _problem("{what} must not be empty", what=what)
    if isinstance(value, list):
        return _token_ids(value, what)
    return _text(value, what)


def parse_prompts(value: object) -> list[str | list[int]]:
    """Return the prompts of a request: one or several, each text or token ids."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) > MAX_PROMPTS:
            raise _problem("at most {limit} prompts per request", limit=MAX_PROMPTS)
        return [_one_prompt(item, f"prompt {i}") for i, item in enumerate(value)]
    if not isinstance(value, str | list):
        raise _problem("must be a string, a list of strings, token ids, or a list of token ids")
    return [_one_prompt(value, "the prompt")]


def parse_stop(value: object) -> tuple[str, ...]:
    """Return the stop strings of a request: none, one or several."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_STOPS:
        raise _problem("at most {limit} stop strings", limit=MAX_STOPS)
    stops = tuple(_text(item, "a stop string") for item in items)
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _problem("a stop string has 1 to {limit} characters", limit=MAX_STOP_CHARS)
    return stops


def parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs from an object such as ``{"50256": -100}``."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _problem("must be an object from token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise _problem("at most {limit} biases", limit=MAX_LOGIT_BIAS)
    return tuple(_one_bias(key, bias) for key, bias in value.items())


def _one_bias(key: str, bias: object) -> tuple[int, float]:
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
        raise _problem("keys must be token ids (integers from 0)")
    # `not (a <= b <= c)` also refuses NaN
    if type(bias) not in (int, float) or not -100 <= bias <= 100:  # type: ignore[operator]
        raise _problem("a bias is a number from -100 to 100")
    return int(key), float(bias)  # type: ignore[arg-type]


def parse_content(value: object) -> str | None:
    """Return a chat message's text: a string, or text parts joined by newlines as vLLM does."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _problem("must be a string or a list of text parts")
    return "\n".join(_text_part(part) for part in value)


def _text_part(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
        raise _problem('only parts of the form {"type": "text", "text": ...} are supported')
    return _text(part["text"], "a text part")


def conflict(field: str, message: str) -> PydanticCustomError:
    """Return the error of a field that contradicts another one (for model validators)."""
    return PydanticCustomError("conflict", message, {"field": field})


def neutral(*values: object) -> BeforeValidator:
    """Return the validator of a field that this server does not have.

    null and the given values mean "as if absent", which clients like to send; anything else is
    refused by name, because ignoring it would change what the caller gets.
    """

    def check(value: object) -> None:
        # `is`-like comparison for bools: 1 == True in Python
        if value is None or any(value == v and type(value) is type(v) for v in values):
            return
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")

    return BeforeValidator(check)


Prompts = Annotated[list[str | list[int]], PlainValidator(parse_prompts)]
Stop = Annotated[tuple[str, ...], PlainValidator(parse_stop)]
LogitBias = Annotated[tuple[tuple[int, float], ...], PlainValidator(parse_logit_bias)]
Content = Annotated[str | None, PlainValidator(parse_content)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
