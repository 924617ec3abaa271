"""Hostile input: every row ends in a 4xx of our shape, small, without echo; then all is well."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MARK = "zzINPUTzz"  # must never come back
JSON = {"content-type": "application/json"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def http(engine):
    app = create_app(engine, make_settings(max_body_bytes=200_000))
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    common = {"model": BASE, "max_tokens": 2}
    if path == CHAT:
        common["messages"] = [{"role": "user", "content": "Hi"}]
    else:
        common["prompt"] = "Hi"
    return {**common, **fields}


def check_error(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The shape of every error. Its `code` is a string or null: clients show and compare it."""
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 4096
    assert MARK not in answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    if param is not None:
        assert error["param"] == param, error
    return error


async def check_canary(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for model, text in ((BASE, "0123"), ("alpha", "A123")):
        answer = await http.post(COMPLETIONS, json={**body_for(COMPLETIONS), "model": model})
        assert answer.json()["choices"][0]["text"] == text[:2]
    assert engine.n_active == 0


BAD_JSON = {
    "empty": b"",
    "truncated": b'{"model": "tiny-base", ',
    "array root": b'[{"model": "tiny-base"}]',
    "string root": b'"zzINPUTzz"',
    "deep": b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "duplicate keys": b'{"model": "tiny-base", "prompt": "a", "prompt": "zzINPUTzz"}',
    "huge integer": b'{"model": "tiny-base", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"model": "tiny-base", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "tiny-base", "prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"model": "tiny-base", "prompt": "a", "temperature": 1e999}',
    "lone surrogate": b'{"model": "tiny-base", "prompt": "\\ud800zzINPUTzz"}',
    "lone surrogate key": b'{"model": "tiny-base", "prompt": "a", "\\ud800": 1}',
    "not UTF-8": b'{"model": "tiny-base", "prompt": "\xff\xfe"}',
    "bool for int": b'{"model": "tiny-base", "prompt": "a", "max_tokens": true}',
    "string for int": b'{"model": "tiny-base", "prompt": "a", "max_tokens": "3"}',
    "float for int": b'{"model": "tiny-base", "prompt": "a", "max_tokens": 3.0}',
    "null model": b'{"model": null, "prompt": "a"}',
    "no model": b'{"prompt": "a"}',
    "NUL": b'{"model": "tiny-base", "prompt": "a"}\x00',
}


@pytest.mark.parametrize("name", BAD_JSON)
async def test_json_hostile_is_refused(http, engine, name):
    for path in (COMPLETIONS, CHAT):
        check_error(await http.post(path, content=BAD_JSON[name], headers=JSON), 400)
    await check_canary(http, engine)


BEYOND = {
    "n": [-1, 0, 17, 2**31, 2**63],
    "max_tokens": [-1, 2**31, 2**63],
    "top_k": [-2, 1_000_001, 2**31, 2**63],
    "seed": [-(2**63) - 1, 2**63],
    "min_tokens": [-1, 2**31],
    "temperature": [-1, -1e-40, 101, 1e38],
    "top_p": [0, -0.1, 1.01],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 1e-40, 1e38],
    "presence_penalty": [-1e38, 1e38, 2.1],
    "frequency_penalty": [-1e38, 1e38, 2.1],
    "stop": ["", [""], ["a"] * 17, ["a"] * 10_000, "a" * 1025, [1], 3, {"a": 1}, [None]],
    "stop_token_ids": [[-1], [2**31], [300], [1] * 65, "1", [True]],
    "logit_bias": [
        {"-1": 1},
        {"300": 1},
        {"a": 1},
        {"1": 101},
        {"1": "2"},
        {"1": True},
        {"99999999999": 1},
        {str(i): 1 for i in range(1025)},
        [1],
    ],
    "user": ["u" * 513, 3],
    "stream": [1, "true"],
    "model": ["", "m" * 257, 3],
    "ignore_eos": ["yes", 0],
    "stream_options": [{"include_usage": True}, {"foo": 1}, 3],
    "best_of": [2, 0, True],
    "response_format": [{"type": "json_object"}],
    "chat_template": ["{{7*7}}"],
    "chat_template_kwargs": [{"tokenize": True}],
    "prompt_embeds": ["AAAA"],
    "cache_salt": ["", "s" * 257, 3],
}
CASES = [(field, value) for field, values in BEYOND.items() for value in values]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("field", "value"), CASES)
async def test_field_beyond_its_bounds_is_refused_by_name(http, path, field, value):
    answer = await http.post(path, json=body_for(path, **{field: value}))

    error = check_error(answer, 400)
    assert field in error["param"], error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_cache_salt_goes_with_every_choice(engine, http, path):
    answer = await http.post(path, json=body_for(path, cache_salt="tenant 7", n=2))
    assert answer.status_code == 200
    assert engine.salts[-2:] == ["tenant 7", "tenant 7"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_allowed_extremes_give_finite_answers(http, path):
    extremes = [
        {"n": 16},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 1_000_000},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"temperature": 0},
        {"temperature": 1e-40},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 0.01},
        {"logit_bias": {"0": -100, "299": 100}},
        {"stop": ["a"] * 16},
        {"stop": None, "n": None, "temperature": None, "logit_bias": None, "stream": None},
    ]
    for fields in extremes:
        answer = await http.post(path, json=body_for(path, **fields))
        assert answer.status_code == 200, (fields, answer.text)
        json.loads(answer.text, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("", "empty"),
        ([], "empty"),
        ([""], "empty"),
        ([[]], "empty"),
        ([[1], []], "empty"),
        ([-1], "token ids"),
        ([2**31], "token ids"),
        ([300], "token id"),
        ([1, True], "token ids"),
        ([True, 1], "token ids"),
        ([1, "a"], "token ids"),
        (["a", 1], "string"),
        ([[["a"]]], "token ids"),
        (["a"] * 1000, "at most"),
        (["a"] * 257, "at most"),
        ({"text": "a"}, "must be"),
        (3, "must be"),
        (None, "must be"),
        (True, "must be"),
        (["a", None], "empty"),
    ],
)
async def test_prompt_hostile_is_refused(http, engine, prompt, word):
    answer = await http.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=prompt))

    assert word in check_error(answer, 400, "prompt")["message"]
    await check_canary(http, engine)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": MARK, "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", MARK + "!": 1}], "messages[0].<field>"),
        ([{"role": "user", "content": "template fails"}], "messages"),
        ([{"role": "user", "content": "a"}] * 2049, "messages"),
    ],
)
async def test_messages_hostile_are_refused(http, engine, messages, param):
    answer = await http.post(CHAT, json=body_for(CHAT, messages=messages))

    check_error(answer, 400, param)
    await check_canary(http, engine)


async def test_context_limit_exactly_is_accepted_and_one_more_refused(http, engine):
    prompt = [1] * (engine.max_model_len - 2)

    answer = await http.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=prompt))
    assert answer.json()["usage"]["total_tokens"] == engine.max_model_len
    answer = await http.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=[*prompt, 1]))
    message = check_error(answer, 400, "max_tokens")["message"]
    assert "512 tokens" in message
    assert "513 tokens" in message


async def test_context_full_of_prompt_is_refused_but_can_be_scored(http, engine):
    prompt = [65] * engine.max_model_len
    for extra in ({}, {"max_tokens": None}):
        answer = await http.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=prompt, **extra))
        check_error(answer, 400)
    scored = body_for(COMPLETIONS, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    answer = await http.post(COMPLETIONS, json=scored)
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == engine.max_model_len


async def test_default_max_tokens_is_cut_to_the_room_left(http, engine):
    prompt = [1] * (engine.max_model_len - 3)
    body = body_for(COMPLETIONS, prompt=prompt, max_tokens=None)

    assert (await http.post(COMPLETIONS, json=body)).json()["usage"]["completion_tokens"] == 3
    chat = body_for(CHAT, max_tokens=None)
    usage = (await http.post(CHAT, json=chat)).json()["usage"]
    assert usage["total_tokens"] == engine.max_model_len


async def test_default_length_is_that_of_the_generation_config(http, engine):
    engine.defaults["alpha"] = {"max_new_tokens": 5}
    for path in (COMPLETIONS, CHAT):
        body = body_for(path, model="alpha", max_tokens=None)
        assert (await http.post(path, json=body)).json()["usage"]["completion_tokens"] == 5
        body = body_for(path, model="alpha", max_tokens=7)
        assert (await http.post(path, json=body)).json()["usage"]["completion_tokens"] == 7


async def test_text_beyond_any_token_length_is_refused_before_tokenising(http, engine):
    text = "a" * (engine.max_model_len * 256 + 1)

    check_error(
        await http.post(COMPLETIONS, json=body_for(COMPLETIONS, prompt=text)), 400, "prompt"
    )
    message = [{"role": "user", "content": text}]
    check_error(await http.post(CHAT, json=body_for(CHAT, messages=message)), 400, "messages")
    assert engine.n_encoded == 0


async def test_many_bad_fields_give_a_small_answer(http):
    unknown = {f"{MARK}{i} \n": MARK for i in range(5000)}
    check_error(await http.post(COMPLETIONS, json=body_for(COMPLETIONS, **unknown)), 400)
    messages = [{"role": "user", "content": 3}] * 2000
    error = check_error(await http.post(CHAT, json=body_for(CHAT, messages=messages)), 400)
    assert error["param"] == "messages[0].content"  # a list stops at its first wrong item
    assert "messages[1]" not in error["message"]


async def test_body_over_the_cap_is_refused_by_its_declared_length(http, engine):
    answer = await http.post(COMPLETIONS, content=b"x" * 200_001, headers=JSON)

    check_error(answer, 413)
    assert answer.headers["connection"] == "close"
    await check_canary(http, engine)


async def test_body_over_the_cap_without_length_is_refused_early(http, engine):
    sent = 0

    async def chunks():
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    answer = await http.post(COMPLETIONS, content=chunks(), headers=JSON)
    check_error(answer, 413)
    assert sent <= 202_000
    await check_canary(http, engine)


async def test_body_in_one_byte_chunks_is_read(http):
    data = json.dumps(body_for(COMPLETIONS)).encode()

    async def chunks():
        for byte in data:
            yield bytes([byte])

    answer = await http.post(COMPLETIONS, content=chunks(), headers=JSON)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", COMPLETIONS, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/metrics", {}, 405),
        ("POST", COMPLETIONS, {"content-type": "text/plain"}, 415),
        ("POST", COMPLETIONS, {"content-type": "multipart/form-data; boundary=x"}, 415),
        ("POST", COMPLETIONS, {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", COMPLETIONS, {}, 415),
        ("POST", "//v1//completions", JSON, 404),
        ("POST", "/v1/completions/", JSON, 404),
        ("GET", "/v1/models/%2e%2e/%2e%2e/etc/passwd", {}, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/openapi.json", {}, 404),
        ("GET", "/", {}, 404),
        ("BREW", "/v1/models", {}, 405),
    ],
)
async def test_wrong_path_method_or_type_is_refused(http, method, path, headers, status):
    check_error(await http.request(method, path, content=b"{}", headers=headers), status)


async def test_range_header_is_ignored(http):
    answer = await http.get("/v1/models", headers={"range": "bytes=0-1,3-4"})
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 4


@pytest.mark.parametrize("asked", ["a\tb", "x" * 1_000, "a b", "<script>", "", "é"])
async def test_request_id_hostile_is_replaced(http, asked):
    answer = await http.get("/v1/models", headers={"x-request-id": asked.encode()})
    assert answer.headers["x-request-id"] != asked
    assert len(answer.headers["x-request-id"]) == 32


async def test_request_id_of_the_client_names_only_the_answer(http, engine):
    headers = {"x-request-id": "mine-1"}
    for path in (COMPLETIONS, CHAT):
        answer = await http.post(path, json=body_for(path), headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        assert "mine-1" not in answer.text
    assert len(set(engine.finished)) == 2  # the engine's own ids stay unique
    assert not any("mine-1" in name for name in engine.finished)


async def test_special_text_reaches_the_tokenizer_unchanged(http, engine):
    text = "<|eot_id|>{{7*7}}{% for %}</s>"
    await http.post(CHAT, json=body_for(CHAT, messages=[{"role": "user", "content": text}]))
    assert text in bytes(engine.prompts[-1]).decode()


async def test_unforeseen_failure_is_a_constant_500_with_the_request_id(http, engine, caplog):
    async def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(MARK)

    engine.encode = fails
    answer = await http.post(COMPLETIONS, json=body_for(COMPLETIONS))

    error = check_error(answer, 500)
    assert answer.headers["x-request-id"] in error["message"]
    assert MARK in caplog.text  # the log has it


async def test_unknown_models_share_one_metric_series(http):
    for i in range(50):
        body = body_for(COMPLETIONS, model=f"{MARK}{i}")
        assert (await http.post(COMPLETIONS, json=body)).status_code == 404
    assert MARK not in (await http.get("/metrics")).text
