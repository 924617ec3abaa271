"""Rows of requests for tests of the ledger."""

from __future__ import annotations

from typing import Any

from server.ledger.records import RequestRow

NOON = 1_793_534_400.0  # 2026-11-01 12:00 UTC


def request_row(**changes: Any) -> RequestRow:
    fields: dict[str, Any] = {
        "ended_s": NOON,
        "request_id": "r1",
        "tenant": "acme",
        "key_id": "k1",
        "model": "intent",
        "digest": "d" * 64,
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "output_tokens": 7,
        "queue_s": 0.25,
        "first_token_s": 0.5,
        "total_s": 1.0,
        "finish_reason": "stop",
        "status": 200,
    }
    return RequestRow(**(fields | changes))
