"""Series: how many there may be, their names, what computing them loads."""

from __future__ import annotations

import subprocess
import sys

from server.metrics.series import OTHER, Metrics
from tests.server.api.fake import BASE, FakeEngine


def test_metrics_import_no_fastapi_and_no_torch():
    code = (
        "import sys, server.metrics.series; sys.exit(bool({'torch', 'fastapi'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_give_series_to_a_bounded_number_of_names():
    metrics = Metrics(max_models=3)
    for i in range(10):
        metrics.sequence(f"v{i}", "t", 5, 0.0).finish("stop")
        metrics.on_loaded(f"v{i}", 0.1)
    text = metrics.render().decode()

    assert 'model_name="v2"' in text
    assert 'model_name="v3"' not in text
    ended = (
        f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{OTHER}"}} 7.0'
    )
    assert ended in text


def test_metrics_have_the_names_that_gateways_read():
    metrics, engine = Metrics(), FakeEngine()
    metrics.watch(engine, 8)
    waiting, running = (metrics.sequence(name, "t", 5, 0.0) for name in ("gamma", "beta"))
    running.tokens(1)
    text = metrics.render().decode()

    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{engine="0",model_name="{BASE}"}}' in text or (
            f'vllm:{name}{{model_name="{BASE}",engine="0"}}' in text
        )
    info = 'max_lora="8",running_lora_adapters="alpha,beta",waiting_lora_adapters="gamma"'
    assert f"vllm:lora_requests_info{{{info}}}" in text
    geometry = 'block_size="16",engine="0",num_gpu_blocks="10"'
    assert f"vllm:cache_config_info{{{geometry}}} 1.0" in text.replace(
        'block_size="16",num_gpu_blocks="10",engine="0"', geometry
    )
    assert "vllm:max_gpu_lora_adapters" in text
    assert "vllm:gpu_prefix_cache_hits_total" in text
    assert 'impart_kernel_state{state="compiled"} 1.0' in text
    assert 'impart_variant_resident_bytes{model_name="alpha"} 500.0' in text
    assert 'impart_variant_state{model_name="broken",state="failed"} 1.0' in text
    waiting.finish("abort")
    running.finish("stop")
    assert 'adapters="alpha,beta",waiting_lora_adapters=""' in metrics.render().decode()
