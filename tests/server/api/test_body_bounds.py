"""What a body may hold, counted before it is parsed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse

from server.api import body as body_module
from server.api.app import create_app
from server.api.body_bounds import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_STRINGS,
    MAX_VALUES,
    check_bounds,
)
from server.api.errors import MAX_ERRORS
from server.api.middleware import RequestCap, RequestContext
from server.api.schemas import MAX_FIELDS
from server.errors import InvalidRequest
from server.metrics.series import Metrics
from tests.server.api.call import Call, until
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


def lists(n: int) -> bytes:
    return b'{"prompt": [' + b",".join([b"[1]"] * n) + b"]}"


def counts(value: Any) -> tuple[int, int, int, int]:
    """Values (an empty list is two), containers, depth and strings of a parsed value: an oracle."""
    if not isinstance(value, dict | list):
        return 1, 0, 0, int(isinstance(value, str))
    items = list(value.values() if isinstance(value, dict) else value)
    inner = [counts(item) for item in items]
    return (
        1 + max(1, sum(c[0] for c in inner)),
        1 + sum(c[1] for c in inner),
        1 + max((c[2] for c in inner), default=0),
        sum(c[3] for c in inner) + (len(value) if isinstance(value, dict) else 0),
    )


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (lists(MAX_CONTAINERS), "lists and objects"),
        (b'{"tools": [' + b",".join([b"{}"] * 1_000_000) + b"]}", "lists and objects"),
        (b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}", "values"),
        (b'{"prompt": [' + b'"",' * MAX_STRINGS + b'""]}', "strings"),
        (b'"' * (2 * MAX_STRINGS + 2) + b"[" * (MAX_DEPTH + 1), "strings"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deeply"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "deeply"),
        (b"[" * 2_000_000, "lists and objects"),
    ],
)
def test_body_beyond_a_bound_is_refused_unparsed(
    raw: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module.jiter, "from_json", pytest.fail)
    with pytest.raises(InvalidRequest, match=says):
        body_module.parse_json(raw)


@pytest.mark.parametrize(
    "raw",
    [
        lists(MAX_CONTAINERS - 2),
        b'{"prompt": [' + b"1," * (MAX_VALUES - 10) + b"1]}",
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        json.dumps({"prompt": '[{,\\"' * 200_000}).encode(),
        json.dumps({"prompt": "\\" * 100_001, "x": "[" * 100_000}).encode(),
        json.dumps({"prompt": '"' * 300_000 + "[" * 100_000}).encode(),
        json.dumps({"prompt": '\\"' * 100_000 + "\\" * 7, "x": '[\\"{,' * 99}).encode(),
        json.dumps({"prompt": "é[" * 100_000}, ensure_ascii=False).encode(),
    ],
)
def test_body_within_the_bounds_is_parsed_to_what_it_says(raw: bytes) -> None:
    assert body_module.parse_json(raw) == json.loads(raw)


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    if kind == 5:
        names = ["a", "[", '"', "\\", "\\\\", '\\"{', "é,"]
        return {rng.choice(names): random_value(rng, depth - 1) for _ in range(rng.randrange(5))}
    return [1, None, '"]}\\', "{[,:"][kind]


def test_count_agrees_with_the_parsed_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bounds of exactly what a value has it is taken, with one less it is not."""
    rng = random.Random(0)
    module = "server.api.body_bounds"
    n_tried = 0
    for _ in range(1500):
        value = random_value(rng, 6)
        raw = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        n_values, n_containers, depth, n_strings = counts(value)
        if depth < 2 or n_containers == depth:  # never more than a few: not looked at closely
            continue
        n_tried += 1
        exact = {"MAX_CONTAINERS": n_containers, "MAX_DEPTH": depth, "MAX_STRINGS": n_strings}
        monkeypatch.setattr(f"{module}.MAX_VALUES", n_values)
        for name, number in exact.items():
            monkeypatch.setattr(f"{module}.{name}", number)
        check_bounds(raw)
        for name in exact:
            monkeypatch.setattr(f"{module}.{name}", exact[name] - 1)
            with pytest.raises(InvalidRequest):
                check_bounds(raw)
            monkeypatch.setattr(f"{module}.{name}", exact[name])
    assert n_tried > 30


async def post(path: str, data: bytes) -> httpx.Response:
    app = create_app(FakeEngine(), make_settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        headers = {"content-type": "application/json"}
        return await http.post(path, content=data, headers=headers)


ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
HOSTILE = {
    "lists": lists(1_000_000),
    "unknown keys": b"{" + b",".join(b'"k%d":0' % i for i in range(330_000)) + b"}",
    "lists of tools": b'{"model":"tiny-base","tools":[' + b"[]," * 1_300_000 + b"[]]}",
    "numbers": b'{"model":"tiny-base","tokens":[' + b"1," * 2_000_000 + b"1]}",
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", HOSTILE)
async def test_large_hostile_body_is_a_small_400_at_every_route(path: str, name: str) -> None:
    assert len(HOSTILE[name]) < make_settings().max_body_bytes
    answer = await post(path, HOSTILE[name])
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 4096


async def test_large_body_is_parsed_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []
    inner = body_module.parse_json

    def noted(raw: bytes) -> object:
        threads.append(threading.current_thread())
        return inner(raw)

    monkeypatch.setattr(body_module, "parse_json", noted)
    for n_chars in (10, body_module.INLINE_BYTES):
        body = {"model": BASE, "prompt": "x" * n_chars, "max_tokens": 1}
        await post("/v1/completions", json.dumps(body).encode())
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, False]


async def test_unknown_fields_are_named_without_a_list_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from server.api.schemas import CompletionRequest

    monkeypatch.setattr(CompletionRequest, "model_validate", pytest.fail)
    fields = {f"field_{i}": i for i in range(MAX_STRINGS - 2)}
    answer = await post("/v1/completions", json.dumps({"model": BASE, **fields}).encode())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "field_0")
    assert error["message"].count("Extra inputs are not permitted") == MAX_ERRORS
    assert f"and {len(fields) - MAX_ERRORS} more" in error["message"]


@pytest.mark.parametrize("where", ["messages", "stream_options"])
async def test_object_with_too_many_fields_is_refused(where: str) -> None:
    many = {str(i): i for i in range(MAX_FIELDS)}
    message = {"role": "user", "content": "a"}
    inner = {"messages": [message], "stream": True, "stream_options": {}} | (
        {"messages": [message | many]} if where == "messages" else {where: many | {"a": 1}}
    )
    answer = await post("/v1/chat/completions", json.dumps({"model": BASE, **inner}).encode())
    assert answer.status_code == 400
    assert f"more than {MAX_FIELDS} fields" in answer.json()["error"]["message"]


async def test_route_without_a_body_takes_a_small_one_only() -> None:
    for path, status in (("/v1/deltas/rescan", 413), ("/nowhere", 413), ("/tokenize", 400)):
        assert (await post(path, b"{" + b" " * (70 << 10))).status_code == status


async def test_bodies_of_all_requests_together_have_a_bound_and_free_it() -> None:
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await JSONResponse({})(scope, receive, send)

    body = {"prompt": "x" * 500}
    n_bytes = len(json.dumps(body))
    cap = RequestContext(RequestCap(app, n_bytes, max_held_bytes=2 * n_bytes), Metrics())
    waiting = [Call(cap, "/tokenize", body) for _ in range(2)]
    await until(lambda: all(call.read for call in waiting))
    one_more = Call(cap, "/tokenize", body)
    await one_more.finish()
    assert one_more.status == 503
    assert dict(one_more.messages[0]["headers"])[b"retry-after"] in (b"6", b"7")
    waiting[0].gone.set()
    await waiting[0].finish()
    another = Call(cap, "/tokenize", body)
    await until(lambda: another.read)
    go_on.set()
    for call in (waiting[1], another):
        await call.finish()
        assert call.status == 200
