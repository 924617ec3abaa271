"""Small parts alone: sampling, metrics, schema of deltas, imports."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from server.api.app import create_app
from server.api.sampling import output_budget, sampling_params
from server.api.schemas import CompletionRequest
from server.engine.types import SamplingParams
from server.errors import InvalidRequest
from server.metrics.series import OTHER, Metrics
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


def params(defaults=None, child=0, **fields) -> SamplingParams:
    body = CompletionRequest(model="m", prompt="p", **fields)
    return sampling_params(body, defaults or {}, max_tokens=10, child=child, logprobs=None)


def test_sampling_without_anything_is_openais_default():
    assert params() == SamplingParams(max_tokens=10)


def test_sampling_takes_generation_config_where_the_request_is_silent():
    defaults = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "eos_token_id": 2,
    }
    found = params(defaults, top_p=1.0, top_k=-1)

    assert (found.temperature, found.min_p, found.repetition_penalty) == (0.6, 0.1, 1.1)
    assert (found.top_p, found.top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("asked", "used"), [(0, 0.0), (1e-40, 0.0), (1e-3, 0.01), (0.5, 0.5), (100, 100.0)]
)
def test_temperature_near_zero_is_greedy_or_raised(asked, used):
    assert params(temperature=asked).temperature == used


def test_seed_differs_by_child_and_stays_in_range():
    assert [params(seed=5, child=i).seed for i in range(3)] == [5, 6, 7]
    for seed in (-(2**63), 2**63 - 1):
        assert 0 <= params(seed=seed, child=1).seed < 2**63
    assert params(child=1).seed is None


def test_min_tokens_beyond_what_may_be_generated_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        params(min_tokens=11)
    assert caught.value.param == "min_tokens"


def test_output_budget_at_its_borders():
    assert output_budget(10, None, None, 16) == 6
    assert output_budget(10, None, 4, 16) == 4
    assert output_budget(10, None, 40, 16) == 6
    assert output_budget(10, 6, 4, 16) == 6
    for arguments in ((10, 7, None, 16), (16, None, None, 16), (16, 1, 1, 16)):
        with pytest.raises(InvalidRequest, match="16 tokens"):
            output_budget(*arguments)


def test_api_imports_no_torch():
    code = "import sys, server.api.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_import_no_fastapi_and_no_torch():
    code = (
        "import sys, server.metrics.series; sys.exit(bool({'torch', 'fastapi'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_give_series_to_a_bounded_number_of_names():
    metrics = Metrics(max_models=3)
    for i in range(10):
        metrics.sequence(f"v{i}", 5, 0.0).finish("stop")
        metrics.on_loaded(f"v{i}", 0.1)
    text = metrics.render().decode()

    assert 'model_name="v2"' in text
    assert 'model_name="v3"' not in text
    assert f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{OTHER}"}} 7'


def test_metrics_have_the_names_that_gateways_read():
    metrics, engine = Metrics(), FakeEngine()
    metrics.watch(engine, 8)
    waiting, running = metrics.sequence("alpha", 5, 0.0), metrics.sequence("beta", 5, 0.0)
    running.tokens(1)
    text = metrics.render().decode()

    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{engine="0",model_name="{BASE}"}}' in text or (
            f'vllm:{name}{{model_name="{BASE}",engine="0"}}' in text
        )
    info = 'max_lora="8",running_lora_adapters="beta",waiting_lora_adapters="alpha"'
    assert f"vllm:lora_requests_info{{{info}}}" in text
    assert 'impart_variant_resident_bytes{model_name="alpha"} 500.0' in text
    assert 'impart_variant_state{model_name="broken",state="failed"} 1.0' in text
    waiting.finish("abort")
    running.finish("stop")
    assert 'running_lora_adapters="",waiting_lora_adapters=""' in metrics.render().decode()


async def test_health_follows_engine_and_gate():
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def statuses() -> tuple[int, int]:
            live = await http.get("/health")
            ready = await http.get("/health/ready")
            return live.status_code, ready.status_code

        assert await statuses() == (200, 200)
        app.state.api.gate.drain()
        assert await statuses() == (200, 503)
        engine.alive = False
        assert await statuses() == (503, 503)


async def test_deltas_show_state_and_error_and_rescan_calls_the_engine():
    engine = FakeEngine()
    transport = httpx.ASGITransport(create_app(engine, make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        listed = (await http.get("/v1/deltas")).json()["data"]
        assert (await http.post("/v1/deltas/rescan")).status_code == 200

    assert engine.rescans == 1
    states = {delta["id"]: (delta["state"], delta["error"]) for delta in listed}
    assert states == {
        "alpha": ("ready", None),
        "beta": ("ready", None),
        "broken": ("failed", "Corrupt"),
    }


async def test_tokenize_renders_conversations_and_names_tokens():
    transport = httpx.ASGITransport(create_app(FakeEngine(), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        message = {"role": "user", "content": "Hi"}
        body = {"model": BASE, "messages": [message], "return_token_strs": True}
        found = (await http.post("/tokenize", json=body)).json()
        assert "".join(found["token_strs"]) == "<user>Hi\n<assistant>"
        assert found["count"] == len(found["tokens"])
        bad = {**body, "continue_final_message": True}
        assert (await http.post("/tokenize", json=bad)).status_code == 400
        assert (
            await http.post("/detokenize", json={"model": BASE, "tokens": [300]})
        ).status_code == 400
