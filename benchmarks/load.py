"""Closed-loop load: a fixed number of workers, each sending its next request when one is done."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.wire import EventReader, HttpClient, WireError

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child",
    "world", "school", "state", "family", "student", "group", "country", "problem",
    "hand", "part", "place", "case", "week", "company", "system", "program", "question",
    "work", "number", "night", "point", "home", "water", "room", "mother", "area",
    "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    model: str
    prompt: list[int] | str


@dataclass(slots=True)
class Outcome:
    """One request measured. Times are seconds of one monotonic clock."""

    model: str
    start_s: float
    end_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)  # when each piece of output arrived
    n_tokens: int = 0
    n_prompt_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first piece of output."""
        return self.chunk_s[0] - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between successive pieces of output."""
        return [late - early for early, late in pairwise(self.chunk_s)]


@dataclass(frozen=True, slots=True)
class Workload:
    """What to send; the same seed gives the same requests.

    assign    ``uniform``: equal shares, every round of ``len(models)`` requests in a new random
              order; ``zipf:A``: the k-th model with probability proportional to ``k ** -A``
    kind      ``ids``: prompts are random token ids within `id_range`; ``text``: random words
    """

    models: Sequence[str]
    assign: str = "uniform"
    prompt_tokens: int = 64
    kind: str = "ids"
    id_range: tuple[int, int] = (1000, 10000)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("at least one model is needed")
        if self.assign != "uniform" and not self.assign.startswith("zipf:"):
            raise ValueError(f"assign must be uniform or zipf:A, got {self.assign!r}")
        if self.kind not in ("ids", "text"):
            raise ValueError(f"kind must be ids or text, got {self.kind!r}")

    def jobs(self) -> Iterator[Job]:
        """Endless requests, all prompts different."""
        rng = np.random.default_rng(self.seed)
        names = self._names(np.random.default_rng(self.seed + 1))
        while True:
            yield Job(next(names), self._prompt(rng))

    def _names(self, rng: np.random.Generator) -> Iterator[str]:
        if self.assign == "uniform":
            while True:
                yield from (self.models[i] for i in rng.permutation(len(self.models)))
        exponent = float(self.assign.removeprefix("zipf:"))
        weights = np.arange(1, len(self.models) + 1) ** -exponent
        while True:
            yield self.models[rng.choice(len(self.models), p=weights / weights.sum())]

    def _prompt(self, rng: np.random.Generator) -> list[int] | str:
        if self.kind == "ids":
            return [int(i) for i in rng.integers(*self.id_range, size=self.prompt_tokens)]
        return " ".join(rng.choice(WORDS, size=self.prompt_tokens))


class LoadClient:
    """Sends jobs to ``/v1/completions`` and measures them."""

    def __init__(
        self, url: str, *, max_tokens: int, stream: bool, timeout_s: float, temperature: float = 0.0
    ) -> None:
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.stream = stream
        self.http = HttpClient(url, timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self.http.close()

    async def models(self) -> list[str]:
        """Every model the server lists."""
        answer = await self.http.get("/v1/models")
        if answer.status != 200:
            raise WireError(f"HTTP {answer.status}: {answer.text[:200]}")
        return [card["id"] for card in answer.json()["data"]]

    async def run(
        self,
        jobs: Iterator[Job],
        *,
        concurrency: int,
        n_requests: int | None = None,
        duration_s: float | None = None,
        at_least: int = 0,
    ) -> list[Outcome]:
        """Keep `concurrency` requests in flight until the count or the time is used up.

        duration_s  requests are started for so long, and until `at_least` have been answered

        Requests that run when the time is up are completed and counted.
        """
        if n_requests is None and duration_s is None:
            raise ValueError("give n_requests or duration_s")
        outcomes: list[Outcome] = []
        started = 0
        end_s = None if duration_s is None else time.perf_counter() + duration_s

        async def worker() -> None:
            nonlocal started
            while n_requests is None or started < n_requests:
                late = end_s is not None and time.perf_counter() >= end_s
                if late and len(outcomes) >= at_least:
                    return
                started += 1
                outcomes.append(await self.send(next(jobs)))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return outcomes

    async def send(self, job: Job) -> Outcome:
        """Send one request; whatever goes wrong becomes the outcome's error."""
        body: dict[str, Any] = {
            "model": job.model,
            "prompt": job.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": self.stream,
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        outcome = Outcome(job.model, time.perf_counter())
        try:
            if self.stream:
                await self._stream(body, outcome)
            else:
                await self._whole(body, outcome)
        except (WireError, ValueError) as error:  # ValueError: what should be JSON is not
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.end_s = time.perf_counter()
        if outcome.error is None and outcome.n_tokens == 0:
            outcome.error = "the server reported no usage"
        return outcome

    async def _whole(self, body: dict[str, Any], outcome: Outcome) -> None:
        answer = await self.http.post("/v1/completions", body)
        if answer.status != 200:
            outcome.error = f"HTTP {answer.status}: {answer.text[:200]}"
            return
        outcome.chunk_s.append(time.perf_counter())
        _read_usage(answer.json(), outcome)

    async def _stream(self, body: dict[str, Any], outcome: Outcome) -> None:
        finished = False

        def read(data: bytes) -> None:
            nonlocal finished
            if data == b"[DONE]":
                finished = True
                return
            event = json.loads(data)
            if "error" in event:
                outcome.error = f"in the stream: {str(event['error'])[:200]}"
            if event.get("choices"):
                outcome.chunk_s.append(time.perf_counter())
            _read_usage(event, outcome)

        answer = await self.http.post("/v1/completions", body, EventReader(read).feed)
        if answer.status != 200:
            outcome.error = f"HTTP {answer.status}: {answer.text[:200]}"
        elif outcome.error is None and not finished:
            outcome.error = "the stream ended without [DONE]"


def _read_usage(event: dict[str, Any], outcome: Outcome) -> None:
    if usage := event.get("usage"):
        outcome.n_tokens = usage["completion_tokens"]
        outcome.n_prompt_tokens = usage["prompt_tokens"]


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Figures of a set of requests; latencies in milliseconds, None where nothing was measured."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    gaps = [gap for outcome in good for gap in outcome.gaps_s]
    tokens = sum(outcome.n_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "prompt_tokens": sum(outcome.n_prompt_tokens for outcome in good),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / wall_s if wall_s > 0 else 0.0,
        "ttft_ms": _percentiles([outcome.ttft_s for outcome in good if outcome.chunk_s]),
        "inter_token_ms": _percentiles(gaps),
        "request_ms": _percentiles([outcome.end_s - outcome.start_s for outcome in good]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "mean": float(values.mean()),
    }
