r"""What tenants feel of each other: a quiet one beside a flood, shares of several floods, weights.

    python -m benchmarks.fairness --base BASE --deltas deploy/demo/deltas

Each policy's server is started in turn, with a tenants file and a key for each tenant, and asked
over HTTP:

    alone    as many requests run as there are places, and nobody waits; the quiet tenant sends one
             every two seconds
    flood    the same, but another tenant keeps 200 requests in the server
    shares   three tenants of equal weight keep a backlog of requests of different shapes: Jain's
             index of the service that each gets, where 1 is perfect and 1/3 is all for one
    weights  two tenants with a backlog, of weights 1 and 3

Service is counted as the server does: a token of a prompt is 1, a new one 2. alone and flood follow
each other in slices, so that both see the same hours of a shared host.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.child import ServerChild, free_port
from benchmarks.stream import machine
from benchmarks.tenants import tenants_text
from benchmarks.wire import EventReader, HttpClient
from server.tenants.keys import new_key

POLICIES = ("fair", "fcfs")
WEIGHTS = {"quiet": 1, "flood": 1, "other": 1, "heavy": 3}
TOKEN_IDS = (1000, 10000)
INPUT_COST, OUTPUT_COST = 1, 2
REST_S = 3.0  # until the server has noticed that a crowd has left


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests of one kind, all prompts different."""

    model: str = "base"
    n_prompt: int = 64
    n_output: int = 64


@dataclass(slots=True)
class Ask:
    """One request. Times are seconds of one monotonic clock."""

    start_s: float
    n_prompt: int
    arrivals_s: list[float] = field(default_factory=list)  # of its tokens

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrivals_s[0] - self.start_s

    def served(self, start_s: float, end_s: float) -> int:
        """What it was served between these times."""
        n_output = sum(start_s <= arrival < end_s for arrival in self.arrivals_s)
        began = bool(self.arrivals_s) and start_s <= self.arrivals_s[0] < end_s
        return INPUT_COST * self.n_prompt * began + OUTPUT_COST * n_output


class Caller:
    """One tenant. `asks` has every request, also those that were cut off."""

    def __init__(self, url: str, key: str, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.asks: list[Ask] = []
        self._http = HttpClient(url, 600.0, key)
        self._rng = np.random.default_rng(seed)

    async def ask(self) -> Ask:
        """Send one request and read its stream to the end. Stops the program if it fails."""
        shape = self.shape
        body = {"model": shape.model, "max_tokens": shape.n_output, "stream": True}
        body |= {"prompt": self._rng.integers(*TOKEN_IDS, size=shape.n_prompt).tolist()}
        body |= {"ignore_eos": True, "temperature": 0.0}
        ask = Ask(time.perf_counter(), shape.n_prompt)
        self.asks.append(ask)
        reader = EventReader(lambda _: ask.arrivals_s.append(time.perf_counter()))
        answer = await self._http.post("/v1/completions", body, reader.feed)
        if answer.status != 200 or not ask.arrivals_s:
            raise SystemExit(f"a request failed: HTTP {answer.status} {answer.text[:300]}")
        ask.arrivals_s.pop()  # [DONE]
        return ask

    async def regularly(self, period_s: float, duration_s: float) -> list[Ask]:
        """Send a request every `period_s`; return them when all have ended."""
        tasks = []
        for _ in range(round(duration_s / period_s)):
            tasks.append(asyncio.create_task(self.ask()))
            await asyncio.sleep(period_s)
        return await asyncio.gather(*tasks)

    @asynccontextmanager
    async def crowd(self, n_open: int) -> AsyncIterator[None]:
        """Keep so many requests in the server."""

        async def worker() -> None:
            while True:
                await self.ask()

        tasks = [asyncio.create_task(worker()) for _ in range(n_open)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(REST_S)
            failed = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
        if failed:
            raise SystemExit(f"a request of the crowd failed: {failed[0]}")

    def served(self, start_s: float, end_s: float) -> int:
        """What the tenant was served between these times."""
        return sum(ask.served(start_s, end_s) for ask in self.asks)


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy measured: times of the quiet tenant by phase, and service by tenant."""

    quiet: dict[str, list[Ask]]
    shares: dict[str, int]
    weights: dict[str, int]

    def ttft_ms(self, phase: str, percent: float) -> float:
        """A percentile of the quiet tenant's time to the first token."""
        return 1e3 * float(np.percentile([ask.ttft_s for ask in self.quiet[phase]], percent))

    def gap_ms(self, phase: str, percent: float) -> float:
        """A percentile of the time between its tokens."""
        asks = self.quiet[phase]
        gaps = [late - early for ask in asks for early, late in pairwise(ask.arrivals_s)]
        return 1e3 * float(np.percentile(gaps, percent))


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1 / n if one has all."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


class Measurement:
    """What is asked of one server."""

    def __init__(self, url: str, keys: dict[str, str], args: argparse.Namespace) -> None:
        self._url, self._keys, self._args = url, keys, args
        self._n_callers = 0

    def caller(self, tenant: str, shape: Shape) -> Caller:
        """Return a client that nobody has used."""
        self._n_callers += 1
        return Caller(self._url, self._keys[tenant], shape, self._n_callers)

    async def run(self) -> Figures:
        """Run all phases; every model is asked for first."""
        for model in self._args.models:
            await self.caller("quiet", Shape(model)).ask()
        quiet: dict[str, list[Ask]] = {"alone": [], "flood": []}
        n_open = {"alone": self._args.alone, "flood": self._args.flood}
        for _ in range(self._args.rounds):
            for phase, asks in quiet.items():
                asks += await self._beside(n_open[phase])
        return Figures(quiet, await self._shares(), await self._weights())

    async def _beside(self, n_open: int) -> list[Ask]:
        args = self._args
        quiet = self.caller("quiet", Shape(args.models[-1], n_output=args.quiet_tokens))
        async with self.caller("flood", Shape(args.models[0])).crowd(n_open):
            await asyncio.sleep(args.settle_s)
            return await quiet.regularly(args.period_s, args.slice_s)

    async def _shares(self) -> dict[str, int]:
        models = self._args.models
        shapes = {
            "quiet": Shape(models[0]),
            "flood": Shape(models[1 % len(models)], 128, 16),
            "other": Shape(models[2 % len(models)], 16, 128),
        }
        return await self._service(shapes)

    async def _weights(self) -> dict[str, int]:
        return await self._service(dict.fromkeys(("flood", "heavy"), Shape(self._args.models[0])))

    async def _service(self, shapes: dict[str, Shape]) -> dict[str, int]:
        """What each tenant gets while all keep a backlog."""
        args = self._args
        callers = {tenant: self.caller(tenant, shape) for tenant, shape in shapes.items()}
        async with AsyncExitStack() as crowds:
            for caller in callers.values():
                await crowds.enter_async_context(caller.crowd(args.flood // len(callers)))
            await asyncio.sleep(args.settle_s)
            start_s = time.perf_counter()
            await asyncio.sleep(args.window_s)
            end_s = time.perf_counter()
        return {tenant: caller.served(start_s, end_s) for tenant, caller in callers.items()}


def write_tenants(path: Path) -> dict[str, str]:
    """Write a tenants file; return each tenant's key."""
    keys = {tenant: new_key() for tenant in WEIGHTS}
    path.write_text(tenants_text(keys, {name: {"weight": WEIGHTS[name]} for name in keys}))
    return keys


def run_server(policy: str, args: argparse.Namespace) -> Figures:
    """Start a server and measure it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="impart-fair-") as folder:
        tenants = Path(folder) / "tenants.toml"
        keys = write_tenants(tenants)
        command = [sys.executable, "-m", "server", "--base", str(args.base.resolve())]
        command += ["--deltas", str(args.deltas.resolve()), "--served-base-name", "base"]
        command += ["--port", str(port), "--tenants", str(tenants)]
        command += ["--scheduling-policy", policy, "--max-num-seqs", str(args.max_num_seqs)]
        with ServerChild(command, url, args.log.resolve()) as child:
            child.wait_ready()
            return asyncio.run(Measurement(url, keys, args).run())


def table(measured: dict[str, Figures]) -> str:
    """A row for each policy and phase, then the shares."""
    lines = [
        "| policy | phase | requests | first token p50 / p90 / p99 ms "
        "| between tokens p50 / p99 ms |",
        "|---|---|---:|---:|---:|",
    ]
    for policy, figures in measured.items():
        lines += [_phase_row(policy, phase, figures) for phase in figures.quiet]
    lines += [
        "",
        "| policy | flood / alone: first token p50 / p99 | between tokens p50 / p99 "
        "| Jain's index of three | 1 : 3 gives 1 : |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(_share_row(policy, one) for policy, one in measured.items())])


def _phase_row(policy: str, phase: str, figures: Figures) -> str:
    ttft = " / ".join(f"{figures.ttft_ms(phase, p):.0f}" for p in (50, 90, 99))
    gaps = " / ".join(f"{figures.gap_ms(phase, p):.0f}" for p in (50, 99))
    return f"| {policy} | {phase} | {len(figures.quiet[phase])} | {ttft} | {gaps} |"


def _share_row(policy: str, figures: Figures) -> str:
    def ratio(of: Callable[[str, float], float], percent: float) -> float:
        return of("flood", percent) / of("alone", percent)

    cells = [
        policy,
        " / ".join(f"{ratio(figures.ttft_ms, p):.2f}" for p in (50, 99)),
        " / ".join(f"{ratio(figures.gap_ms, p):.2f}" for p in (50, 99)),
        f"{jain([float(one) for one in figures.shares.values()]):.4f}",
        f"{figures.weights['heavy'] / figures.weights['flood']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--deltas", type=Path, required=True, help="artifacts of this base")
    add("--models", nargs="+", default=["base", "intent", "slots"], help="the last is the quiet's")
    add("--policy", action="append", choices=POLICIES, help="repeatable; default: both")
    add("--max-num-seqs", type=int, default=64)
    add("--flood", type=int, default=200, help="requests that a flood keeps in the server")
    add("--alone", type=int, default=61, help="the same where nobody waits")
    add("--period-s", type=float, default=2.0, help="between requests of the quiet tenant")
    add("--quiet-tokens", type=int, default=16, help="output of each")
    add("--rounds", type=int, default=3, help="slices of alone and flood")
    add("--slice-s", type=float, default=20.0)
    add("--settle-s", type=float, default=10.0, help="before anything is counted")
    add("--window-s", type=float, default=60.0, help="in which shares are counted")
    add("--log", type=Path, default=Path(".cache/bench/fairness.log"), help="the server's output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the machine."""
    args = parse_args(argv)
    measured = {policy: run_server(policy, args) for policy in args.policy or POLICIES}
    print(table(measured))
    for policy, figures in measured.items():
        print(f"\n{policy}: shares {figures.shares}, weights {figures.weights}")
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
