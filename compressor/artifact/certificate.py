"""``certificate.json``: what the fine-tune itself says to a few prompts, and what was made of it.

Whoever serves the delta can replay the prompts and tell a faithful answer from a wrong one, and the
delta's from the base's. It is data from a stranger: sizes and values are checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.artifact.files import CERTIFICATE, open_directory, read_checksums, read_verified
from compressor.artifact.json_fields import corrupt, load_json

FORMAT = "impart-certificate"
FORMAT_VERSION = 1
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 512
MAX_ANSWER_TOKENS = 64
LEAST_LOG_PROB = -99.999  # what is less likely is written as this

_MAX_TOKEN_ID = 1 << 31
_MAX_TEXT = 200
_DECIMALS = 3
_ROOM = 1.234e-05  # as long as any number to four significant digits
_TEXTS = ("created_by", "texts", "dtype")
_MEASURES = ("kl_per_token", "top1_agreement", "base_kl_per_token", "base_top1_agreement")
_HEAD = ("format", "format_version", *_TEXTS, *_MEASURES, "prompts")
_LOG_PROBS = ("finetuned", "delta", "base")
_PROMPT = ("prompt", "tokens", *_LOG_PROBS)


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """One prompt and the fine-tune's answer to it.

    prompt, tokens          ids; the tokens are the fine-tune's own greedy ones
    finetuned, delta, base  each model's log probability of each of the tokens, given those before
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finetuned: tuple[float, ...]
    delta: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured over all tokens of all prompts.

    created_by      program and version
    texts           where the prompts are from: "built-in" or "own"
    dtype           of the computation
    kl_per_token    KL(fine-tune || with the delta), nats
    top1_agreement  how often the token that is most likely with the delta is the fine-tune's
    base_...        the same of the base alone
    """

    created_by: str
    texts: str
    dtype: str
    kl_per_token: float
    top1_agreement: float
    base_kl_per_token: float
    base_top1_agreement: float
    prompts: tuple[GoldenPrompt, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def summary(self) -> dict[str, Any]:
        """All but the prompts: what may be shown to whoever may see the variant."""
        measures = {key: getattr(self, key) for key in (*_TEXTS, *_MEASURES)}
        return measures | {"n_prompts": len(self.prompts), "n_tokens": self.n_tokens}


def rounded_log_probs(values: Sequence[float]) -> tuple[float, ...]:
    """Log probabilities as they are written: three decimals, none below `LEAST_LOG_PROB`."""
    return tuple(min(0.0, max(LEAST_LOG_PROB, round(value, _DECIMALS))) + 0.0 for value in values)


def dump_certificate(certificate: Certificate, n_bytes: int = 0) -> bytes:
    """Return the bytes of ``certificate.json``, filled up with spaces to `n_bytes`."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    head |= {key: getattr(certificate, key) for key in (*_TEXTS, *_MEASURES)}
    lines = [f"{_compact(key)}: {_compact(value)}" for key, value in head.items()]
    prompts = ",\n".join(
        _compact({key: getattr(prompt, key) for key in _PROMPT}) for prompt in certificate.prompts
    )
    text = "{\n" + ",\n".join([*lines, f'"prompts": [\n{prompts}\n]']) + "\n}"
    return text.ljust(n_bytes - 1).encode() + b"\n"


def room_for(prompts: Sequence[GoldenPrompt], created_by: str, texts: str, dtype: str) -> bytes:
    """A certificate as long as any of these prompts can come to once the delta is measured."""
    longest = tuple(
        GoldenPrompt(p.prompt, p.tokens, p.finetuned, (LEAST_LOG_PROB,) * len(p.tokens), p.base)
        for p in prompts
    )
    return dump_certificate(Certificate(created_by, texts, dtype, *(_ROOM,) * 4, longest))


def parse_certificate(raw: bytes) -> Certificate:
    """Parse and check ``certificate.json``. Raises Corrupt."""
    record = load_json(raw, CERTIFICATE)
    _check_keys(record, _HEAD)
    if (record["format"], record["format_version"]) != (FORMAT, FORMAT_VERSION):
        corrupt(f"it should be of format {FORMAT}, version {FORMAT_VERSION}", CERTIFICATE)
    for key in _TEXTS:
        if not isinstance(record[key], str) or len(record[key]) > _MAX_TEXT:
            corrupt(f"{key} should be a text of up to {_MAX_TEXT} characters", CERTIFICATE)
    for key in _MEASURES:
        if not _is_number(record[key]) or not 0 <= record[key] <= 1e6:
            corrupt(f"{key} should be a number from 0 on", CERTIFICATE)
    prompts = record["prompts"]
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        corrupt(f"it should have 1 to {MAX_PROMPTS} prompts", CERTIFICATE)
    fields: dict[str, Any] = {key: record[key] for key in _TEXTS}
    fields |= {key: float(record[key]) for key in _MEASURES}
    return Certificate(**fields, prompts=tuple(map(_parse_prompt, prompts)))


def read_certificate(path: str | Path) -> tuple[Certificate | None, str]:
    """Return an artifact's verified certificate, None if it has none, and the artifact's digest.

    Raises NotADelta, Unreadable, Corrupt, TooLarge.
    """
    with open_directory(Path(path)) as directory:
        sums, digest = read_checksums(directory)
        if CERTIFICATE not in sums:
            return None, digest
        return parse_certificate(bytes(read_verified(directory, CERTIFICATE, sums))), digest


def _parse_prompt(record: Any) -> GoldenPrompt:
    if not isinstance(record, dict):
        corrupt("a prompt should be an object", CERTIFICATE)
    _check_keys(record, _PROMPT)
    prompt = _ids(record["prompt"], MAX_PROMPT_TOKENS)
    tokens = _ids(record["tokens"], MAX_ANSWER_TOKENS)
    return GoldenPrompt(prompt, tokens, *(_log_probs(record[k], len(tokens)) for k in _LOG_PROBS))


def _check_keys(record: dict[str, Any], keys: Sequence[str]) -> None:
    if record.keys() != set(keys):
        corrupt(f"an object should have the keys {', '.join(keys)}, and no other", CERTIFICATE)


def _ids(value: Any, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        corrupt(f"a list should hold 1 to {most} tokens", CERTIFICATE)
    if not all(type(i) is int and 0 <= i < _MAX_TOKEN_ID for i in value):
        corrupt("a token should be a whole number from 0 on", CERTIFICATE)
    return tuple(value)


def _log_probs(value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        corrupt("there should be a log probability for each token", CERTIFICATE)
    if not all(_is_number(item) and LEAST_LOG_PROB <= item <= 0 for item in value):
        corrupt(f"a log probability should be from {LEAST_LOG_PROB} to 0", CERTIFICATE)
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
