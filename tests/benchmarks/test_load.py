"""The load tool against a small real server that speaks the same protocol."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections import Counter
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks.child import ChildError, ServerChild, free_port
from benchmarks.load import LoadClient, Outcome, Workload, summarise
from benchmarks.serve import main
from benchmarks.wire import Answer

# Answers every token id prompt with its own length in tokens; the model "bad" fails.
SERVER = """
import asyncio, json, sys
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()

@app.get("/health")
def health(): return Response()

@app.get("/v1/models")
def models(): return {"data": [{"id": "a"}, {"id": "b"}]}

@app.post("/v1/completions")
async def complete(request: Request):
    body = await request.json()
    if body["model"] == "bad":
        return JSONResponse({"error": {"message": "no such model"}}, 404)
    n = body["max_tokens"]
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}
    if not body["stream"]:
        return {"choices": [{"text": "x" * n}], "usage": usage}
    async def events():
        for _ in range(n):
            yield 'data: {"choices": [{"text": "x"}]}\\n\\n'
            await asyncio.sleep(0.001)
        if body["model"] == "broken":
            yield 'data: {"error": {"message": "lost"}}\\n\\n'
            return
        yield "data: " + json.dumps({"choices": [], "usage": usage}) + "\\n\\n"
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")

uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "fake_server.py"
    path.write_text(SERVER)
    return path


@pytest.fixture(scope="module")
def url(script: Path) -> Any:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(script), str(port)]
    with ServerChild(command, address, script.with_suffix(".log")) as child:
        child.wait_ready(60)
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[LoadClient]:
    client = LoadClient(url, max_tokens=5, stream=True, timeout_s=30)
    yield client
    await client.close()


async def test_run_streamed_counts_tokens_and_every_gap(client: LoadClient) -> None:
    jobs = Workload(["a", "b"], prompt_tokens=7).jobs()
    outcomes = await client.run(jobs, concurrency=3, n_requests=10)
    assert [o.error for o in outcomes] == [None] * 10
    assert Counter(o.model for o in outcomes) == {"a": 5, "b": 5}
    assert all(o.n_tokens == 5 and o.n_prompt_tokens == 7 for o in outcomes)
    assert all(len(o.gaps_s) == 4 and min(o.gaps_s) > 0 for o in outcomes)
    assert all(o.start_s < o.chunk_s[0] <= o.chunk_s[-1] <= o.end_s for o in outcomes)


@pytest.mark.parametrize(
    ("model", "message"), [("bad", "HTTP 404"), ("broken", "in the stream"), ("a", None)]
)
async def test_send_failure_becomes_the_outcomes_error(
    client: LoadClient, model: str, message: str | None
) -> None:
    outcome = await client.send(next(Workload([model]).jobs()))
    if message is None:
        assert outcome.error is None
    else:
        assert outcome.error is not None
        assert message in outcome.error


async def test_send_to_a_closed_port_is_an_error_not_an_exception() -> None:
    client = LoadClient(f"http://127.0.0.1:{free_port()}", max_tokens=1, stream=True, timeout_s=5)
    outcome = await client.send(next(Workload(["a"]).jobs()))
    await client.close()
    assert outcome.error is not None
    assert outcome.error.startswith("WireError: ConnectionRefusedError")


async def test_run_keeps_the_asked_number_in_flight() -> None:
    running = peak = 0

    async def answer(*_: object) -> Answer:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.001)
        running -= 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return Answer(200, json.dumps({"usage": usage}).encode())

    client = LoadClient("http://test", max_tokens=1, stream=False, timeout_s=5)
    client.http.post = answer  # type: ignore[method-assign, assignment]
    outcomes = await client.run(Workload(["a"]).jobs(), concurrency=4, n_requests=20)
    assert len(outcomes) == 20
    assert peak == 4


async def test_run_time_up_goes_on_until_enough_are_answered(client: LoadClient) -> None:
    jobs = Workload(["a"]).jobs()
    outcomes = await client.run(jobs, concurrency=2, duration_s=0.0, at_least=4)
    assert 4 <= len(outcomes) <= 5


def test_workload_same_seed_same_requests_all_different() -> None:
    one, two = (list(islice(Workload(["a", "b"], seed=3).jobs(), 50)) for _ in range(2))
    assert one == two
    assert len({tuple(job.prompt) for job in one}) == 50
    assert one != list(islice(Workload(["a", "b"], seed=4).jobs(), 50))


def test_workload_zipf_prefers_the_first_models() -> None:
    jobs = islice(Workload(list("abcd"), assign="zipf:1.5").jobs(), 2000)
    counts = Counter(job.model for job in jobs)
    weights = [rank**-1.5 for rank in range(1, 5)]
    for name, weight in zip("abcd", weights, strict=True):
        assert counts[name] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)


@pytest.mark.parametrize("setting", [{"assign": "often"}, {"kind": "bits"}, {"models": []}])
def test_workload_bad_setting_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least one"):
        Workload(**({"models": ["a"]} | setting))


def test_summarise_percentiles_by_hand() -> None:
    good = Outcome("a", start_s=1.0, end_s=2.0, chunk_s=[1.1, 1.2, 1.4], n_tokens=3)
    bad = Outcome("a", start_s=1.0, end_s=1.5, error="HTTP 500")
    figures = summarise([good, bad], wall_s=2.0)
    assert figures["errors"] == 1
    assert figures["output_tokens_per_s"] == 1.5
    assert figures["ttft_ms"]["p50"] == pytest.approx(100)
    assert figures["inter_token_ms"]["p50"] == pytest.approx(150)
    assert figures["inter_token_ms"]["mean"] == pytest.approx(150)


def test_main_spawns_measures_and_writes_json(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    out = tmp_path / "out.json"
    status = main(
        [
            "--url", f"http://127.0.0.1:{port}",
            "--spawn", shlex.join([sys.executable, str(script), str(port)]),
            "--concurrency", "2", "--requests", "6", "--max-tokens", "4", "--json", str(out),
            "--log", str(tmp_path / "log"),
        ]
    )  # fmt: skip
    assert status == 0
    figures = json.loads(out.read_text())
    assert figures["total"]["output_tokens"] == 24
    assert set(figures["models"]) == {"a", "b"}
    assert figures["server"]["rss_peak_bytes"] > 1e6
    assert "**all**" in capsys.readouterr().out


def test_main_server_that_dies_shows_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('no model here')")
    status = main(
        [
            "--url", f"http://127.0.0.1:{free_port()}", "--log", str(tmp_path / "log"),
            "--spawn", shlex.join([sys.executable, str(script)]),
        ]
    )  # fmt: skip
    assert status == 1
    assert "no model here" in capsys.readouterr().err


def test_child_port_in_use_is_refused(url: str, tmp_path: Path) -> None:
    child = ServerChild([sys.executable, "-c", "pass"], url, tmp_path / "log")
    with pytest.raises(ChildError, match="already listens"):
        child.start()
