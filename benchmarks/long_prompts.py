"""What long prompts do to running streams: time between tokens with so many arriving per second.

Short requests run in a closed loop; long ones arrive at a fixed rate whether or not the server
keeps up (open loop). Rates are taken in turn, `--repeats` times over, so that a slow minute of the
machine hits all of them. At the end of each phase what is left of the long prompts is cancelled.

Example: ``python -m benchmarks.long_prompts --url http://127.0.0.1:8123 --model base
--spawn "python -m server --base BASE --port 8123" --rate 0 --rate 0.25 --rate 1``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import ChildError
from benchmarks.load import Job, LoadClient, Outcome, Workload
from benchmarks.serve import environment, spawned


@dataclass(slots=True)
class Phase:
    """Everything measured at one rate, over all repeats."""

    rate: float
    wall_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    short_ttft_s: list[float] = field(default_factory=list)
    long_ttft_s: list[float] = field(default_factory=list)
    n_short_tokens: int = 0
    n_long_sent: int = 0
    errors: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Summary; `ratio` is p99 / p50 of the time between tokens of the short requests."""
        gaps = _milliseconds(self.gaps_s)
        return {
            "rate": self.rate,
            "between_tokens_ms": gaps,
            "ratio": None if gaps is None else gaps["p99"] / gaps["p50"],
            "short_tokens_per_s": self.n_short_tokens / self.wall_s,
            "short_ttft_ms": _milliseconds(self.short_ttft_s),
            "long_sent": self.n_long_sent,
            "long_answered": len(self.long_ttft_s),
            "long_ttft_ms": _milliseconds(self.long_ttft_s),
            "errors": sorted(set(self.errors))[:5],
        }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_prompts", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--url", required=True, help="the server's root, for example http://127.0.0.1:8000")
    add("--model", action="append", help="repeatable; default: every model the server lists")
    add("--streams", type=int, default=16, help="short requests in flight")
    add("--prompt-tokens", type=int, default=64, help="of a short request")
    add("--max-tokens", type=int, default=64, help="of a short request, made exactly")
    add("--long-tokens", type=int, default=2048, help="of a long prompt; one token is made")
    add("--rate", type=float, action="append", help="long prompts per second, repeatable; 0: none")
    add("--duration-s", type=float, default=30.0, help="of each phase")
    add("--repeats", type=int, default=1, help="rounds over all rates")
    add("--id-range", default="1000:10000", help="token ids of the random prompts, low:high")
    add("--timeout-s", type=float, default=600.0)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write every figure to this file")
    add("--spawn", help="start this server first, and stop it at the end")
    add("--log", type=Path, default=Path(".cache/bench/server.log"), help="output of --spawn")
    add("--label", default="", help="a name for this run in the output")
    args = parser.parse_args(argv)
    args.rate = args.rate or [0.0, 0.25, 1.0]
    return args


async def measure(args: argparse.Namespace) -> list[Phase]:
    """Warm up, then run every phase."""
    short = LoadClient(args.url, max_tokens=args.max_tokens, stream=True, timeout_s=args.timeout_s)
    long = LoadClient(args.url, max_tokens=1, stream=True, timeout_s=args.timeout_s)
    try:
        low, _, high = args.id_range.partition(":")
        models = args.model or await short.models()
        ids = (int(low), int(high))
        shorts = Workload(models, "uniform", args.prompt_tokens, "ids", ids, args.seed).jobs()
        longs = Workload(models, "uniform", args.long_tokens, "ids", ids, args.seed + 7).jobs()
        await short.run(shorts, concurrency=args.streams, n_requests=args.streams)
        await long.send(next(longs))
        phases = [Phase(rate) for rate in args.rate]
        for phase in list(phases) * args.repeats:
            await _run_phase(args, phase, short, long, shorts, longs)
        return phases
    finally:
        await short.close()
        await long.close()


async def _run_phase(
    args: argparse.Namespace,
    phase: Phase,
    short: LoadClient,
    long: LoadClient,
    shorts: Iterator[Job],
    longs: Iterator[Job],
) -> None:
    start = time.perf_counter()
    sending = asyncio.create_task(_send_at_rate(phase.rate, long, longs, args.duration_s))
    outcomes = await short.run(shorts, concurrency=args.streams, duration_s=args.duration_s)
    end = start + args.duration_s
    answered, n_sent = await sending
    phase.wall_s += args.duration_s
    phase.n_long_sent += n_sent
    phase.errors += [o.error for o in chain(outcomes, answered) if o.error is not None]
    good = [outcome for outcome in outcomes if outcome.error is None]
    for outcome in good:
        inside = [t for t in outcome.chunk_s if t <= end]  # later, there are fewer streams
        phase.gaps_s += np.diff(inside).tolist()
        phase.n_short_tokens += len(inside)
        phase.short_ttft_s.append(outcome.ttft_s)
    phase.long_ttft_s += [o.ttft_s for o in answered if o.error is None and o.chunk_s]


async def _send_at_rate(
    rate: float, client: LoadClient, jobs: Iterator[Job], duration_s: float
) -> tuple[list[Outcome], int]:
    """Outcomes that came in time, and how many were sent; the others are cancelled at the end."""
    if rate <= 0:
        return [], 0
    start = time.perf_counter()
    tasks = []
    for i in range(max(1, int(duration_s * rate))):
        await asyncio.sleep(max(0.0, start + i / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(client.send(next(jobs))))
    done, late = await asyncio.wait(
        tasks, timeout=max(0.0, start + duration_s - time.perf_counter())
    )
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [task.result() for task in done], len(tasks)


def _milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| long prompts/s | between tokens p50 / p99 ms | p99 / p50 | short: tok/s "
        "| short: first token p50 / p99 ms | long: answered | long: first token p50 / p99 s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['rate']:g} | {_pair(row['between_tokens_ms'])} | {ratio} "
            f"| {row['short_tokens_per_s']:.1f} | {_pair(row['short_ttft_ms'])} "
            f"| {row['long_answered']} of {row['long_sent']} "
            f"| {_pair(row['long_ttft_ms'], 1e3, 1)} |"
        )
    errors = sorted({error for row in figures for error in row["errors"]})
    return "\n".join([*lines, *(f"error: {error}" for error in errors)])


def _pair(figure: dict[str, float] | None, unit: float = 1.0, digits: int = 0) -> str:
    if figure is None:
        return "-"
    return f"{figure['p50'] / unit:.{digits}f} / {figure['p99'] / unit:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if any request failed."""
    args = parse_args(argv)
    result: dict[str, Any] = {"label": args.label, "environment": environment()}
    result["config"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    try:
        with spawned(args, result):
            figures = [phase.figures() for phase in asyncio.run(measure(args))]
    except ChildError as error:
        print(error, file=sys.stderr)
        return 1
    result["phases"] = figures
    print(table(figures))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["errors"] for row in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
