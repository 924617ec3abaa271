"""The openai client against a real server. Assumes nothing about the engine's text, so that the
same tests run against the real engine: import this module's tests and override `live`. A real
engine must run in float32: greedy text alone and in a batch is compared, and bfloat16 rounds
differently for different batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.server.api.conftest import Live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


QUESTION = [{"role": "user", "content": "Say something."}]


def test_models_list_names_base_and_variant_with_parent(client, live):
    cards = {card.id: card for card in client.models.list()}

    assert cards[live.base].parent is None
    assert cards[live.variant].parent == live.base
    assert len(cards[live.variant].digest) == 64
    assert client.models.retrieve(live.variant).id == live.variant


def test_chat_answers_with_usage_and_fingerprint(client, live):
    answer = client.chat.completions.create(
        model=live.variant, messages=QUESTION, max_tokens=8, temperature=0
    )

    assert answer.object == "chat.completion"
    assert answer.model == live.variant
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_headers_name_the_delta_and_the_request(client, live):
    digest = client.models.retrieve(live.variant).digest
    for model, expected in ((live.base, "base"), (live.variant, digest)):
        for stream in (False, True):
            raw = client.completions.with_raw_response.create(
                model=model, prompt="Hi", max_tokens=2, stream=stream
            )
            assert raw.headers["x-impart-delta"] == expected
            assert raw.headers["x-request-id"]
            assert int(raw.headers["openai-processing-ms"]) >= 0


def test_fingerprint_differs_between_base_and_variant(client, live):
    prints = {
        client.completions.create(model=m, prompt="Hi", max_tokens=1).system_fingerprint
        for m in (live.base, live.variant)
    }
    assert len(prints) == 2


def test_chat_streamed_equals_whole(client, live):
    options = {"model": live.variant, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert len({c.id for c in chunks}) == 1


def test_completion_streamed_equals_whole_with_continuous_usage(client, live):
    options = {"model": live.base, "prompt": "Once", "max_tokens": 9, "temperature": 0}
    whole = client.completions.create(**options)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(**options, stream=True, stream_options=usage))

    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == whole.usage.completion_tokens


def test_several_prompts_and_n_keep_their_order(client, live):
    prompts = ["one", "two", "three"]
    single = [
        client.completions.create(
            model=live.variant, prompt=p, max_tokens=6, temperature=0, echo=True
        )
        for p in prompts
    ]
    batch = client.completions.create(
        model=live.variant, prompt=prompts, max_tokens=6, temperature=0, n=2, echo=True
    )

    assert [c.index for c in batch.choices] == list(range(6))
    for i, answer in enumerate(single):
        assert batch.choices[2 * i].text == answer.choices[0].text
        assert batch.choices[2 * i + 1].text == answer.choices[0].text
    assert batch.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in single)


def test_token_ids_prompt_equals_text_prompt(client, live):
    tokens = httpx.post(
        f"{live.url}/tokenize", json={"model": live.variant, "prompt": "Hello there"}
    ).json()
    options = {"model": live.variant, "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt="Hello there", **options)
    by_ids = client.completions.create(prompt=tokens["tokens"], **options)

    assert tokens["count"] == by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_detokenize_returns_the_text(live):
    base = {"model": live.base}
    ids = httpx.post(f"{live.url}/tokenize", json={**base, "prompt": "Hello there"}).json()
    text = httpx.post(f"{live.url}/detokenize", json={**base, "tokens": ids["tokens"]}).json()

    assert text["prompt"].endswith("Hello there")


def test_completion_logprobs_are_parallel_lists(client, live):
    answer = client.completions.create(
        model=live.variant, prompt="Hi", max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    found = answer.choices[0].logprobs
    n_tokens = answer.usage.total_tokens

    assert len(found.tokens) == len(found.token_logprobs) == n_tokens
    assert len(found.top_logprobs) == len(found.text_offset) == n_tokens
    assert "".join(found.tokens).endswith(answer.choices[0].text)
    assert found.text_offset == sorted(found.text_offset)
    for token, start in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert answer.choices[0].text[start:].startswith(token)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    for own, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert own <= 0
        assert 2 <= len(top) <= 3
        assert own <= max(top.values())


def test_echo_without_output_scores_the_prompt(client, live):
    answer = client.completions.create(
        model=live.variant, prompt="A few words", max_tokens=0, echo=True, logprobs=1
    )

    assert answer.choices[0].text == "A few words"
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens


def test_chat_logprobs_have_bytes_and_alternatives(client, live):
    answer = client.chat.completions.create(
        model=live.variant,
        messages=QUESTION,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = answer.choices[0].logprobs.content

    assert len(content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in content)
    joined = b"".join(bytes(token.bytes) for token in content)
    assert joined.decode("utf-8", "replace") == answer.choices[0].message.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content


def test_streamed_logprobs_equal_whole(client, live):
    options = {
        "model": live.variant,
        "prompt": "Hi",
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = client.completions.create(**options).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]

    assert [t for c in chunks for t in c.tokens] == whole.tokens
    assert [o for c in chunks for o in c.text_offset] == whole.text_offset


def test_stop_string_ends_the_text_before_it(client, live):
    options = {"model": live.variant, "prompt": "Hi", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[2:4]
    answer = client.completions.create(**options, stop=[stop]).choices[0]

    assert stop not in answer.text
    assert answer.finish_reason == "stop"


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="Hi")

    assert caught.value.body["message"] == "The model `nobody` does not exist."
    assert caught.value.param == "model"
    assert caught.value.code == "model_not_found"
    assert caught.value.body["type"] == "invalid_request_error"


def test_base_colon_variant_names_the_variant(client, live):
    answer = client.completions.create(
        model=f"{live.base}:{live.variant}", prompt="Hi", max_tokens=1
    )

    assert answer.model == live.variant
    assert client.models.retrieve(f"{live.base}:{live.variant}").id == live.variant
    for wrong in (f"{live.variant}:{live.base}", f"{live.base}:nobody"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(wrong)


def test_head_is_answered_wherever_get_is(live):
    paths = ("/v1/models", f"/v1/models/{live.variant}", "/v1/deltas", "/health", "/health/ready")
    for path in (*paths, "/ping", "/version", "/load", "/metrics"):
        head, get = httpx.head(f"{live.url}{path}"), httpx.get(f"{live.url}{path}")
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(f"{live.url}/v1/models/nobody").status_code == 404
    assert httpx.head(f"{live.url}/v1/completions").status_code == 405


def test_unknown_field_is_refused_by_name(client, live):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=live.base, prompt="Hi", extra_body={"chat_template": "{{7*7}}"}
        )

    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "chat_template")
    assert "7*7" not in str(caught.value.body)


def test_tools_are_refused_by_name(client, live):
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=live.base, messages=QUESTION, tools=[tool])

    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")


def test_neutral_values_of_absent_features_are_accepted(client, live):
    answer = client.chat.completions.create(
        model=live.base,
        messages=[*QUESTION, {"role": "assistant", "content": "x", "tool_calls": None}, *QUESTION],
        max_completion_tokens=2,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        user="someone",
        store=False,
        seed=7,
    )

    assert answer.usage.completion_tokens <= 2


def test_too_long_names_both_numbers_and_the_limit_itself_works(client, live):
    limit = next(card.max_model_len for card in client.models.list() if card.id == live.base)
    options = {"model": live.base, "prompt": [5] * 4, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**options, max_tokens=limit - 3)

    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    assert str(limit) in caught.value.body["message"]
    assert str(limit + 1) in caught.value.body["message"]
    with client.completions.create(**options, max_tokens=limit - 4, stream=True) as stream:
        assert next(iter(stream)).choices  # accepted; leaving the block cancels it


def test_seed_repeats_and_differs_between_choices(client, live):
    options = {"model": live.variant, "prompt": "Hi", "max_tokens": 8, "temperature": 1.0}
    one = client.completions.create(**options, seed=11, n=2)
    two = client.completions.create(**options, seed=11, n=2)

    assert [c.text for c in one.choices] == [c.text for c in two.choices]


def test_mixed_models_at_once_answer_as_alone(client, live):
    def ask(model: str) -> str:
        answer = client.completions.create(
            model=model, prompt="The", max_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.model == model
        return answer.choices[0].text

    models = [live.base, live.variant] * 4
    alone = {model: ask(model) for model in models[:2]}
    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(ask, models)) == [alone[model] for model in models]


def test_health_version_and_metrics_answer(live, client):
    client.completions.create(model=live.variant, prompt="Hi", max_tokens=2)

    for path in ("/health", "/health/live", "/health/ready", "/ping", "/version", "/load"):
        assert httpx.get(f"{live.url}{path}").status_code == 200, path
    text = httpx.get(f"{live.url}/metrics").text
    assert f'vllm:generation_tokens_total{{engine="0",model_name="{live.variant}"}}' in text
    assert "vllm:num_requests_running" in text
    assert "impart_variant_resident_bytes" in text


def test_deltas_list_and_rescan(live):
    listed = httpx.get(f"{live.url}/v1/deltas").json()["data"]
    rescanned = httpx.post(f"{live.url}/v1/deltas/rescan").json()["data"]

    assert live.variant in [delta["id"] for delta in listed]
    assert [d["digest"] for d in rescanned] == [d["digest"] for d in listed]
