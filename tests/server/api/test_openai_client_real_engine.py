"""The openai client's tests once more, against the real engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from server.engine.llm_engine import LLMEngine
from server.metrics.series import Metrics
from server.settings import Settings
from tests.compressor.artifacts import seal
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
        compile_kernels="wait",
    )
    metrics = Metrics()
    engine = LLMEngine.from_settings(settings, metrics)
    metrics.watch(engine, settings.max_resident_variants)
    with serve(engine, settings, metrics=metrics) as url:
        yield Live(url, engine, "tiny", "tuned")


MIXED = "I like 😊 and 火星 naïve €5 é 🎉!"


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_echoed_tokens_and_offsets_are_those_of_the_text(
    live: Live, as_ids: bool, stream: bool
) -> None:
    def post(path: str, **fields: object) -> httpx.Response:
        return httpx.post(f"{live.url}{path}", json={"model": "tuned", **fields}, timeout=60)

    ids = post("/tokenize", prompt=MIXED).json()["tokens"]
    asked = {"prompt": ids if as_ids else MIXED, "echo": True, "logprobs": 5, "seed": 1}
    answer = post("/v1/completions", **asked, max_tokens=12, ignore_eos=True, stream=stream)
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
    else:
        pieces = answer.json()["choices"]
    text = "".join(piece["text"] for piece in pieces)
    lists = [piece["logprobs"] for piece in pieces]
    tokens, offsets, top = (
        [item for one in lists for item in one[name]]
        for name in ("tokens", "text_offset", "top_logprobs")
    )
    assert text.startswith("<s>" * as_ids + MIXED)
    assert tokens[0] == "<s>"
    assert len(tokens) == len(ids) + 12
    names = {"<s>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    shown = tokens if as_ids else tokens[1:]
    assert "".join(shown[: len(ids) - 1 + as_ids]) == "<s>" * as_ids + MIXED
    for token, start, end in zip(tokens, offsets, [*offsets[1:], len(text)], strict=True):
        assert text[start:end] == token or (token in names and start == end)
    assert all(5 <= len(one) <= 6 for one in top[1:])
    assert all(token in one for token, one in zip(tokens[1:], top[1:], strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_damaged_weights_answer_424_until_they_are_mended(live: Live, stream: bool) -> None:
    deltas = live.engine._settings.deltas
    copy = shutil.copytree(deltas / "tuned", deltas / f"copy-{stream}")
    config = copy / "delta_config.json"
    config.write_bytes(config.read_bytes() + b"\n" * (1 + stream))  # another digest than tuned's
    seal(copy)
    weights = copy / "delta.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    live.engine.rescan()
    body = {"model": copy.name, "prompt": "The", "max_tokens": 2, "stream": stream}

    def answer(**changes: object) -> httpx.Response:
        return httpx.post(f"{live.url}/v1/completions", json=body | changes, timeout=60)

    try:
        for _ in range(2):
            bad = answer()
            assert bad.status_code == 424
            error = bad.json()["error"]
            assert (error["code"], error["param"]) == ("model_unusable", "model")
            assert error["message"].startswith(f"`{copy.name}` cannot be served: Corrupt: ")
            assert "retry-after" not in bad.headers
            assert answer(model="tuned").status_code == 200
        weights.write_bytes(whole)
        assert answer().status_code == 200
    finally:
        shutil.rmtree(copy)
        live.engine.rescan()
