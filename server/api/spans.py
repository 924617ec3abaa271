"""What a trace tells of a request: one span, its phases, never a word of prompt or answer.

Attributes have the names of OpenTelemetry's semantic conventions for HTTP and for generative AI,
and beside them vLLM's, under which dashboards look for times and tokens. What is written here is
plain data: `server.process.otel` makes spans of it, where the operator wants traces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.account import CLIENT_LEFT, Account
from server.api.errors import answered_error
from server.api.middleware import BODY_PATHS, METHODS, STATUS, generates
from server.tenants.principal import Principal

GENERATION = "llm_request"  # vLLM's name of the span
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
TRACE_HEADERS = ("traceparent", "tracestate")

Attribute = str | bool | int | float | list[str]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request; times are of `time.monotonic`."""

    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """One request that was answered.

    trace_headers   what its caller sent, which it continues
    first_token_s   when the first token came, if one did
    error           why the server is to blame, "" if it is not
    """

    name: str
    trace_headers: Mapping[str, str]
    began_s: float
    ended_s: float
    attributes: Mapping[str, Attribute]
    phases: tuple[Phase, ...]
    first_token_s: float | None
    error: str


class Tracer(Protocol):
    """Takes spans on the event loop; it sends them elsewhere."""

    def record(self, span: RequestSpan) -> None: ...


class SpanRecorder:
    """Gives the tracer a span for each request for text or tokens, when its answer has ended.

    Behind the authentication: whoever has no key fills no collector.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in BODY_PATHS:
            await self._app(scope, receive, send)
            return
        unsent = CLIENT_LEFT
        try:
            await self._app(scope, receive, send)
        except Exception:
            unsent = 500  # which `RequestContext` answers
            raise
        finally:
            status = scope.get(STATUS, unsent)
            self._tracer.record(span_of(scope, status, time.monotonic()))


def span_of(scope: Scope, status: int, ended_s: float) -> RequestSpan:
    """Say what is known of a request whose answer ended."""
    account = cast("Account | None", scope.get("impart.account"))
    principal: Principal = scope["impart.principal"]
    began_s: float = scope["impart.arrived"]
    method = scope["method"] if scope["method"] in METHODS else "other"
    headers = Headers(scope=scope)
    attributes: dict[str, Attribute] = {
        "http.request.method": method,
        "http.route": scope["path"],
        "http.response.status_code": status,
        "gen_ai.request.id": scope["impart.request_id"],
        "impart.tenant": principal.tenant,
    }
    first_token_s: float | None = None
    phases: tuple[Phase, ...] = ()
    if account is not None and generates(scope):
        first_token_s = account.first_token_at
        phases = tuple(_phases(account, began_s, ended_s))
        attributes |= _model_attributes(scope["path"], account)
        attributes |= _latencies(phases, began_s, ended_s, first_token_s)
    error = _error(scope, status, account)
    if error:
        attributes["error.type"] = error
    return RequestSpan(
        GENERATION if generates(scope) else f"{method} {scope['path']}",
        {name: headers[name] for name in TRACE_HEADERS if name in headers},
        began_s,
        ended_s,
        attributes,
        phases,
        first_token_s,
        error if status >= 500 or (account is not None and account.failed) else "",
    )


def _model_attributes(path: str, account: Account) -> dict[str, Attribute]:
    """What is asked for, and what was used; of a name that is no model's nothing is said."""
    found: dict[str, Attribute] = {
        "gen_ai.operation.name": OPERATIONS[path],
        "gen_ai.provider.name": "impart",
    }
    if not account.model:
        return found
    found |= {
        "gen_ai.request.model": account.model,
        "gen_ai.response.model": account.model,
        "impart.delta.digest": account.digest or "base",
        "gen_ai.usage.input_tokens": account.prompt_tokens,
        "gen_ai.usage.output_tokens": account.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": account.cached_tokens,
        "gen_ai.usage.prompt_tokens": account.prompt_tokens,
        "gen_ai.usage.completion_tokens": account.output_tokens,
        "gen_ai.usage.num_sequences": len(account.choices),
        "gen_ai.response.finish_reasons": [c.finish_reason or "error" for c in account.choices],
    }
    if account.sampling is not None:
        found |= {
            "gen_ai.request.max_tokens": account.sampling.max_tokens,
            "gen_ai.request.temperature": account.sampling.temperature,
            "gen_ai.request.top_p": account.sampling.top_p,
        }
    return found


def _phases(account: Account, began_s: float, ended_s: float) -> Iterator[Phase]:
    """What the choice that began first went through, as far as it came."""
    first = min(account.choices, key=lambda choice: choice.began_s, default=None)
    if first is None:
        yield Phase("prepare", began_s, ended_s)
        return
    yield Phase("prepare", began_s, first.began_s)
    if first.queue_s is None:
        yield Phase("queue", first.began_s, ended_s)
        return
    started_s = first.began_s + first.queue_s
    yield Phase("queue", first.began_s, started_s)
    token_s = ended_s if first.first_at is None else max(first.first_at, started_s)
    yield Phase("prefill", started_s, token_s)
    if first.first_at is not None:
        yield Phase("decode", token_s, max(ended_s, token_s))


def _latencies(
    phases: tuple[Phase, ...], began_s: float, ended_s: float, first_token_s: float | None
) -> dict[str, Attribute]:
    """Under vLLM's names, in seconds."""
    seconds = {phase.name: phase.ended_s - phase.began_s for phase in phases}
    found: dict[str, Attribute] = {"gen_ai.latency.e2e": ended_s - began_s}
    if first_token_s is not None:
        found |= {
            "gen_ai.latency.time_to_first_token": first_token_s - began_s,
            "gen_ai.latency.time_in_queue": seconds["queue"],
            "gen_ai.latency.time_in_model_prefill": seconds["prefill"],
            "gen_ai.latency.time_in_model_decode": seconds["decode"],
            "gen_ai.latency.time_in_model_inference": seconds["prefill"] + seconds["decode"],
        }
    return found


def _error(scope: Scope, status: int, account: Account | None) -> str:
    """The convention's error.type: our error's name, or the status."""
    error = answered_error(scope)
    if error is not None:
        return type(error).__name__
    if account is not None and account.failed:
        return "failed"
    return str(status) if status >= 400 else ""
