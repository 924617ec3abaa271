"""The openai client's tests once more, against the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from server.engine.llm_engine import LLMEngine
from server.metrics.series import Metrics
from server.settings import Settings
from tests.server.api.conftest import Live, serve
from tests.server.api.test_openai_client import *  # noqa: F403


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory) -> Iterator[Live]:
    deltas = tmp_path_factory.mktemp("deltas")
    compress(tiny_llama, tiny_llama_ft, deltas / "tuned", Options(codec="blockdiag", ratio=9))
    settings = Settings(
        base=tiny_llama,
        deltas=deltas,
        served_base_name="tiny",
        device="cpu",
        dtype="float32",
        kv_cache_bytes=16 << 20,
    )
    metrics = Metrics()
    engine = LLMEngine.from_settings(settings, metrics)
    metrics.watch(engine, settings.max_variants_per_step)
    with serve(engine, settings, metrics=metrics) as url:
        yield Live(url, engine, "tiny", "tuned")
