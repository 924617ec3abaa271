"""The async engine: streams, cancellation, names, the template's deadline, draining."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.artifact.reader import open_artifact, read_terms
from server.engine.llm_engine import LLMEngine
from server.engine.types import OutputChunk, SamplingParams
from server.engine.variant import Variant
from server.errors import (
    ConfigError,
    Draining,
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    TextLimit,
)
from server.ops.precision import host_cpu
from server.settings import Settings
from server.text.detokenizer import Detokenizer
from tests.compressor.artifacts import seal
from tests.server.conftest import PAIR, Served

pytestmark = pytest.mark.usefixtures("shared_text_workers")
PROMPT = "The quick brown fox"
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


@asynccontextmanager
async def running(pair: Served, **settings: Any) -> AsyncIterator[LLMEngine]:
    usual = {"served_base_name": "base", "dtype": "float32", "device": "cpu"}
    fields = usual | {"kv_cache_bytes": 8 << 20, "compile_kernels": "wait"} | settings
    engine = LLMEngine.from_settings(Settings(base=pair.base, deltas=pair.deltas, **fields))
    engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown(0.0)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Torch's number is the process's: put back afterwards."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


async def ask(engine: LLMEngine, name: str, params: SamplingParams | None = None) -> list[int]:
    variant = await engine.open(name)
    prompt = await engine.encode(variant, PROMPT)
    params = params or SamplingParams(max_tokens=12, temperature=0.0)
    return [t async for d in stream(engine, variant, prompt, params) for t in d.token_ids]


async def stream(
    engine: LLMEngine, variant: Variant, prompt: list[int], params: SamplingParams
) -> AsyncIterator[OutputChunk]:
    """What a reader that is always there gets."""
    news = asyncio.Event()
    generation = engine.generate(
        variant, prompt, params, request_id="same-for-all", on_output=news.set
    )
    try:
        while True:
            await news.wait()
            news.clear()
            for chunk in generation.take():
                yield chunk
                if chunk.finish_reason is not None:
                    return
            if generation.error is not None:
                raise generation.error
    finally:
        generation.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def is_empty(engine: LLMEngine) -> bool:
    stats = engine.stats()
    return (
        (stats.n_running, stats.n_waiting, engine.core.n_open) == (0, 0, 0)
        and stats.n_free_kv_blocks == stats.n_kv_blocks
        and all(slot.refs == 0 for slot in stats.resident.values())
    )


# -- generation ----------------------------------------------------------------------------------


async def test_concurrent_requests_for_all_variants_answer_with_their_own_text(
    pair: Served,
) -> None:
    async with running(pair) as engine:
        names = list(pair.checkpoints) * 3  # equal request ids: clients choose them
        answers = await asyncio.gather(*(ask(engine, name) for name in names))
        prompt = await engine.encode(await engine.open("base"), PROMPT)
        assert answers == [pair.truth(name, prompt)[:12] for name in names]
        await until(lambda: is_empty(engine))


async def test_stream_comes_in_pieces_and_ends_with_a_reason(pair: Served) -> None:
    async with running(pair) as engine:
        variant = await engine.open("impart")
        prompt = await engine.encode(variant, PROMPT)
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        events = [event async for event in stream(engine, variant, prompt, params)]
        assert [len(e.token_ids) for e in events] == [1] * 8
        assert [e.finish_reason for e in events] == [None] * 7 + ["length"]
        tokens = [t for e in events for t in e.token_ids]
        assert "".join(e.text for e in events) == await engine.decode(variant, tokens)


async def test_stop_string_ends_the_stream_and_the_engines_request(pair: Served) -> None:
    async with running(pair) as engine:
        variant = await engine.open("impart")
        prompt = await engine.encode(variant, PROMPT)
        plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        whole = "".join([d.text async for d in stream(engine, variant, prompt, plain)])
        stop = whole[len(whole) // 2 :][:3]
        params = replace(LONG, stop=(stop,))
        chunks = [c async for c in stream(engine, variant, prompt, params)]
        assert "".join(c.text for c in chunks) == whole.partition(stop)[0]
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
        await until(lambda: is_empty(engine))


async def test_failure_in_wording_ends_that_stream_only(
    pair: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Detokenizer.push

    def push_or_break(self: Detokenizer, token_id: int, *, check_stop: bool = True) -> str:
        if self.stop == ("break",):
            raise RuntimeError("a bug")
        return push(self, token_id, check_stop=check_stop)

    monkeypatch.setattr(Detokenizer, "push", push_or_break)
    async with running(pair) as engine:
        good = asyncio.create_task(ask(engine, "impart"))
        with pytest.raises(GenerationFailed):
            await ask(engine, "impart", replace(LONG, stop=("break",)))
        prompt = await engine.encode(await engine.open("base"), PROMPT)
        assert await good == pair.truth("impart", prompt)[:12]
        await until(lambda: is_empty(engine))


async def test_closing_the_iterator_aborts(pair: Served) -> None:
    async with running(pair) as engine:
        variant = await engine.open("impart")
        async with aclosing(stream(engine, variant, [5, 6], LONG)) as chunks:
            await anext(aiter(chunks))
            assert not is_empty(engine)
        await until(lambda: is_empty(engine))


async def test_cancelling_the_task_before_the_first_token_aborts(pair: Served) -> None:
    async with running(pair, max_num_seqs=1) as engine:
        tasks = [asyncio.create_task(ask(engine, "blockdiag", LONG)) for _ in range(3)]
        await until(lambda: engine.core.n_open == 3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: is_empty(engine))


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([320], {}, "prompt"),
        ([5] * 500, {"max_tokens": 13}, "max_tokens"),
    ],
)
async def test_generate_refuses_what_cannot_be(
    pair: Served, prompt: list[int], params: dict[str, Any], field: str
) -> None:
    async with running(pair) as engine:
        chosen = SamplingParams(**({"max_tokens": 1} | params))
        variant = await engine.open("base")
        with pytest.raises(InvalidRequest) as caught:
            engine.generate(variant, prompt, chosen, request_id="r", on_output=lambda: None)
        assert caught.value.param == field
        assert is_empty(engine)


# -- names, modes, models ------------------------------------------------------------------------


async def test_open_unknown_model_is_not_found(pair: Served) -> None:
    async with running(pair) as engine:
        with pytest.raises(ModelNotFound):
            await engine.open("nobody")


async def test_concurrent_first_requests_for_a_variant_open_and_read_it_once(
    pair: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []  # what, and by whom

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            read.append((function.__name__, threading.current_thread().name.split("_")[0]))
            return function(*args, **kwargs)

        return noted

    for function in (open_artifact, read_terms):
        monkeypatch.setattr(f"server.engine.catalog.{function.__name__}", noting(function))
    async with running(pair) as engine:
        answers = await asyncio.gather(*(ask(engine, "impart") for _ in range(6)))
        prompt = await engine.encode(await engine.open("base"), PROMPT)
    assert read == [("open_artifact", "opener"), ("read_terms", "delta-reader")]
    assert answers == [pair.truth("impart", prompt)[:12]] * 6


async def test_rescan_while_serving_shows_new_variants(pair: Served, tmp_path: Path) -> None:
    deltas = shutil.copytree(pair.deltas, tmp_path / "deltas")
    async with running(replace(pair, deltas=deltas)) as engine:
        before = await ask(engine, "impart")
        shutil.copytree(deltas / "impart", deltas / "later")
        engine.rescan()
        assert await ask(engine, "later") == before


# -- templates -----------------------------------------------------------------------------------


async def test_template_that_takes_too_long_is_refused_and_others_go_on(
    pair: Served, tmp_path: Path
) -> None:
    deltas = shutil.copytree(pair.deltas, tmp_path / "deltas")
    (deltas / "impart" / "chat_template.jinja").write_text("{{ 7 ** 30000000 % 7 }}")
    seal(deltas / "impart")
    messages = [{"role": "user", "content": "hi"}]
    async with running(replace(pair, deltas=deltas), text_task_cpu_s=0.5) as engine:
        slow, other = await engine.open("impart"), await engine.open("base")
        refused = asyncio.create_task(engine.render_chat(slow, messages))
        assert await ask(engine, "blockdiag")
        assert await engine.render_chat(other, messages)
        with pytest.raises(TextLimit, match="too much processor time"):
            await refused


# -- the end -------------------------------------------------------------------------------------


async def test_shutdown_lets_running_requests_finish_and_refuses_new_ones(pair: Served) -> None:
    async with running(pair) as engine:
        variant = await engine.open("base")
        task = asyncio.create_task(ask(engine, "impart", LONG))
        await until(lambda: engine.stats().n_running == 1)
        ending = asyncio.create_task(engine.shutdown(60.0))
        await until(lambda: engine.core.admission.draining)
        assert not engine.is_ready()
        with pytest.raises(Draining):
            await anext(stream(engine, variant, [5], LONG))
        assert len(await task) == LONG.max_tokens
        await ending
        assert not engine.is_alive()


async def test_shutdown_after_its_time_ends_streams_with_draining(pair: Served) -> None:
    async with running(pair) as engine:
        task = asyncio.create_task(ask(engine, "base", LONG))
        await until(lambda: engine.stats().n_running == 1)
        await engine.shutdown(0.0)
        with pytest.raises(Draining):
            await task


async def test_dead_engine_tells_streams_and_refuses_new_ones(pair: Served) -> None:
    async with running(pair) as engine:
        await ask(engine, "base")
        assert engine.is_alive()
        assert engine.is_ready()

        def broken() -> list[object]:
            raise RuntimeError("a bug in the scheduler")

        task = asyncio.create_task(ask(engine, "base", LONG))
        await until(lambda: engine.stats().n_running == 1)
        engine.core.scheduler.schedule = broken  # type: ignore[method-assign, assignment]
        for waiter in (task, ask(engine, "base")):
            with pytest.raises(EngineDead):
                await waiter
        assert engine.core.dead
        assert not engine.is_alive()
        assert not engine.is_ready()


async def test_heartbeat_stops_when_a_layer_hangs_and_comes_back(pair: Served) -> None:
    async with running(pair, heartbeat_timeout_s=1.0) as engine:
        go = threading.Event()
        layer = next(iter(engine.core._runner.base.store.layers))
        layer.register_forward_hook(lambda *_: go.wait(60) and None)
        task = asyncio.create_task(ask(engine, "base"))
        await until(lambda: not engine.is_alive())
        assert not engine.is_ready()
        go.set()
        await task
        await until(engine.is_alive)


def test_max_model_len_beyond_the_bases_positions_is_refused(pair: Served) -> None:
    with pytest.raises(ConfigError, match="512"):
        LLMEngine.from_settings(Settings(base=pair.base, device="cpu", max_model_len=513))


def test_cache_too_small_for_two_kv_blocks_is_refused(pair: Served) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        LLMEngine.from_settings(Settings(base=pair.base, device="cpu", kv_cache_bytes=1))


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("given", "environ", "text"),
    [
        (None, "1 cgroup limit", "1 thread (cgroup limit)"),
        (3, "1 cgroup limit", "3 threads (--torch-threads)"),
    ],
)
def test_start_sets_torchs_threads_and_says_why(
    pair: Served,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: int | None,
    environ: str,
    text: str,
) -> None:
    monkeypatch.setenv("IMPART_CHOSEN_THREADS", environ)
    settings = Settings(base=pair.base, device="cpu", kv_cache_bytes=8 << 20, torch_threads=given)
    with caplog.at_level(logging.INFO, "server"):
        LLMEngine.from_settings(settings)
    said = "the server computes with "
    (line,) = (line for line in caplog.messages if line.startswith(said))
    assert line == f"{said}{host_cpu().description}; products in float32; {text}"
    assert torch.get_num_threads() == int(text[0])


def test_no_threads_at_all_is_refused(pair: Served) -> None:
    with pytest.raises(ConfigError, match="torch_threads must be above 0"):
        Settings(base=pair.base, torch_threads=0)
