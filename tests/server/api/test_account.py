"""Rows of the ledger: one for each generation request, however it ends, with true counts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from server.api import sse
from server.api.app import create_app
from server.errors import (
    DeadlineExceeded,
    DeltaBroken,
    Draining,
    GenerationFailed,
    ServeError,
)
from server.ledger.records import RequestRow
from tests.server.api.call import Call, body, until
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


@dataclass
class Kept:
    """Takes rows in place of a ledger."""

    rows: list[RequestRow] = field(default_factory=list)

    def add(self, row: RequestRow) -> None:
        self.rows.append(row)

    @property
    def row(self) -> RequestRow:
        (row,) = self.rows
        return row


def kept(engine: FakeEngine, **settings: Any) -> tuple[Kept, Any]:
    ledger = Kept()
    return ledger, create_app(engine, make_settings(**settings), ledger=ledger)  # type: ignore[arg-type]


def holding(after: int) -> FakeEngine:
    engine = FakeEngine()
    engine.hold, engine.hold_after = asyncio.Event(), after
    return engine


@pytest.mark.parametrize("stream", [True, False])
async def test_finished_request_is_a_row_with_what_it_used(stream: bool) -> None:
    engine = FakeEngine()
    engine.waited_s, engine.n_cached = 0.25, 3
    ledger, app = kept(engine)
    call = Call(app, "/v1/completions", body(stream, model="alpha", prompt="Hello", max_tokens=6))
    await call.finish()

    row = ledger.row
    assert row.request_id == dict(call.messages[0]["headers"])[b"x-request-id"].decode()
    assert (row.tenant, row.key_id) == ("default", "")
    assert (row.model, row.digest) == ("alpha", "a" * 64)
    assert (row.prompt_tokens, row.cached_tokens, row.output_tokens) == (5, 3, 6)
    assert (row.finish_reason, row.status) == ("length", 200)
    assert row.queue_s == 0.25
    assert 0 < row.first_token_s <= row.total_s
    assert "Hello" not in repr(row)


async def test_prompt_counts_once_whatever_its_choices_and_the_worst_end_is_the_requests() -> None:
    engine = FakeEngine()
    engine.n_cached = 1
    ledger, app = kept(engine)
    asked = body(False, prompt=["ab", "cde"], n=3, max_tokens=7, stop=["4"])
    await Call(app, "/v1/completions", asked).finish()
    row = ledger.row
    assert (row.prompt_tokens, row.cached_tokens, row.output_tokens) == (5, 2, 6 * 5)
    assert row.finish_reason == "stop"
    assert row.digest == ""


@pytest.mark.parametrize("stream", [True, False])
async def test_request_whose_client_leaves_has_the_tokens_that_were_computed(stream: bool) -> None:
    engine = holding(3)
    ledger, app = kept(engine)
    call = Call(app, "/v1/completions", body(stream, prompt="Hello"))
    await until(lambda: engine.n_active == 1)
    if stream:
        await until(lambda: call.text.count("data: ") == 3)
    else:
        await asyncio.sleep(0.01)
    call.gone.set()
    await call.finish()
    row = ledger.row
    assert (row.prompt_tokens, row.output_tokens) == (5, 3)
    assert (row.finish_reason, row.status) == ("abort", 200 if stream else 499)


async def test_request_that_is_cancelled_in_its_prefill_has_the_computed_part_of_its_prompt() -> (
    None
):
    engine = holding(0)
    engine.n_prompt_computed = 2
    ledger, app = kept(engine)
    call = Call(app, "/v1/completions", body(True, prompt="Hello"))
    await until(lambda: engine.n_active == 1)
    call.gone.set()
    await call.finish()
    row = ledger.row
    assert (row.prompt_tokens, row.output_tokens, row.queue_s) == (2, 0, None)
    assert (row.finish_reason, row.status, row.first_token_s) == ("abort", 499, None)


async def test_tokens_that_a_slow_reader_never_took_are_counted() -> None:
    engine = FakeEngine()
    ledger, app = kept(engine)
    call = Call(app, "/v1/completions", body(True, max_tokens=50))
    await call.next()
    call.accept.clear()
    await until(lambda: engine.n_active == 0)
    call.gone.set()
    await call.finish()
    assert ledger.row.output_tokens == 50
    assert ledger.row.finish_reason in ("abort", "length")


async def test_stalled_reader_is_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (0.05,))
    ledger, app = kept(holding(3))
    call = Call(app, "/v1/completions", body(True))
    await call.next()
    call.accept.clear()
    await call.finish()
    assert (ledger.row.finish_reason, ledger.row.status) == ("abort", 200)


@pytest.mark.parametrize("error", [GenerationFailed("Failed."), Draining("Ending.")])
@pytest.mark.parametrize("stream", [True, False])
async def test_request_that_fails_half_way_is_an_error_with_its_tokens(
    error: ServeError, stream: bool
) -> None:
    engine = FakeEngine()
    engine.fail_at, engine.error = 2, error
    ledger, app = kept(engine)
    await Call(app, "/v1/completions", body(stream)).finish()
    row = ledger.row
    assert (row.prompt_tokens, row.output_tokens) == (2, 2)
    assert (row.finish_reason, row.status) == ("error", 200 if stream else error.status)


async def test_unforeseen_failure_is_an_error_of_status_500() -> None:
    engine = FakeEngine()
    ledger, app = kept(engine)
    engine.open_error = RuntimeError("a bug")  # type: ignore[assignment]
    call = Call(app, "/v1/completions", body(False))
    await call.finish()
    assert (call.status, ledger.row.status, ledger.row.finish_reason) == (500, 500, "error")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DeltaBroken("Broken."), "refused"), (DeadlineExceeded("Too late."), "error")],
)
async def test_request_that_never_began_has_no_tokens(error: ServeError, reason: str) -> None:
    engine = FakeEngine()
    engine.open_error = error
    ledger, app = kept(engine)
    await Call(app, "/v1/completions", body(False)).finish()
    row = ledger.row
    assert (row.prompt_tokens, row.output_tokens, row.queue_s) == (0, 0, None)
    assert (row.finish_reason, row.status, row.model) == (reason, error.status, "")


@pytest.mark.parametrize(
    ("asked", "status"),
    [({"model": "nobody's secret"}, 404), ({"n": 0}, 400), ({"prompt": "x" * 5000}, 413)],
)
async def test_refused_request_is_a_row_without_what_the_client_wrote(
    asked: dict[str, Any], status: int
) -> None:
    ledger, app = kept(FakeEngine(), max_body_bytes=1000)
    await Call(app, "/v1/completions", body(False, **asked)).finish()
    row = ledger.row
    assert (row.finish_reason, row.status, row.prompt_tokens) == ("refused", status, 0)
    assert "secret" not in repr(row)


async def test_request_that_meets_a_full_queue_is_a_row() -> None:
    engine = FakeEngine(max_open=1)
    ledger, app = kept(engine)
    with engine.admit(1):
        call = Call(app, "/v1/completions", body(False))
        await call.finish()
    assert (call.status, ledger.row.status, ledger.row.finish_reason) == (503, 503, "refused")


async def test_other_routes_have_no_rows() -> None:
    ledger, app = kept(FakeEngine())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/v1/models")
        await client.get("/v1/completions")
        await client.post("/tokenize", json={"model": BASE, "prompt": "x"})
    assert ledger.rows == []
