"""Closed-loop load on any OpenAI-compatible server: throughput, latency, errors, memory.

Example: ``python -m benchmarks.serve --url http://127.0.0.1:8123 --model intent --model slots
--spawn "python -m server --base BASE --deltas DELTAS --port 8123" --json out.json``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import ChildError, PeakRss, ServerChild
from benchmarks.load import LoadClient, Outcome, Workload, summarise
from compressor.usable_cpus import usable_cpus


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--url", required=True, help="the server's root, for example http://127.0.0.1:8000")
    add("--model", action="append", help="repeatable; default: every model the server lists")
    add("--assign", default="uniform", help="models to requests: uniform or zipf:1.5")
    add("--concurrency", type=int, default=32, help="requests in flight")
    add("--prompt-tokens", type=int, default=64)
    add("--max-tokens", type=int, default=64, help="exactly so many are made (ignore_eos)")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--prompt-kind", choices=("ids", "text"), default="ids")
    add("--id-range", default="1000:10000", help="token ids of random prompts, low:high")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--requests", type=int, help="how many; default: 4 per worker")
    amount.add_argument("--duration-s", type=float, help="start requests for so long instead")
    add("--warmup", type=int, help="requests sent first, not measured; default: --concurrency")
    add("--no-stream", action="store_true", help="whole answers: no time to first token")
    add("--timeout-s", type=float, default=600.0)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write every figure to this file")
    add("--spawn", help="start this server first, and stop it at the end")
    add("--log", type=Path, default=Path(".cache/bench/server.log"), help="output of --spawn")
    add("--label", default="", help="a name for this run in the output")
    return parser.parse_args(argv)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, load the server, and return the figures."""
    client = LoadClient(
        args.url,
        max_tokens=args.max_tokens,
        stream=not args.no_stream,
        temperature=args.temperature,
        timeout_s=args.timeout_s,
    )
    try:
        return await _measure(args, client)
    finally:
        await client.close()


async def _measure(args: argparse.Namespace, client: LoadClient) -> dict[str, Any]:
    low, _, high = args.id_range.partition(":")
    workload = Workload(
        models=args.model or await client.models(),
        assign=args.assign,
        prompt_tokens=args.prompt_tokens,
        kind=args.prompt_kind,
        id_range=(int(low), int(high)),
        seed=args.seed,
    )
    jobs = workload.jobs()
    n_warmup = args.concurrency if args.warmup is None else args.warmup
    warm = await client.run(jobs, concurrency=args.concurrency, n_requests=n_warmup)
    n_requests = None if args.duration_s else args.requests or 4 * args.concurrency
    cpu_before, start = own_cpu_s(), time.perf_counter()
    outcomes = await client.run(
        jobs, concurrency=args.concurrency, n_requests=n_requests, duration_s=args.duration_s
    )
    wall_s = time.perf_counter() - start
    return {
        "wall_s": wall_s,
        "client_cpu_s": own_cpu_s() - cpu_before,
        "warmup_errors": sum(outcome.error is not None for outcome in warm),
        "total": summarise(outcomes, wall_s),
        "models": {
            name: summarise([o for o in outcomes if o.model == name], wall_s)
            for name in workload.models
        },
        "error_examples": _examples([*warm, *outcomes]),
    }


def own_cpu_s() -> float:
    """CPU seconds this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _examples(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({outcome.error for outcome in outcomes if outcome.error})[:5]


@contextlib.contextmanager
def spawned(args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[None]:
    """Run the server of ``--spawn``, if any, around the block; its memory goes to `figures`."""
    if not args.spawn:
        yield
        return
    with ServerChild(shlex.split(args.spawn), args.url, args.log) as child:
        ready_s = child.wait_ready()
        server: dict[str, Any] = {"ready_s": ready_s, "rss_ready_bytes": child.rss_bytes()}
        cpu_before = child.cpu_s()
        with PeakRss(child) as peak:
            yield
        server |= {"rss_peak_bytes": peak.n_bytes, "cpu_s": child.cpu_s() - cpu_before}
        server["rss_end_bytes"] = child.rss_bytes()
        figures["server"] = server


def environment() -> dict[str, Any]:
    """Where this ran."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": usable_cpus().cpus,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table and a line about the server."""
    lines = [
        "| model | requests | errors | output tok/s | first token p50 / p99 ms "
        "| between tokens p50 / p99 ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = dict(figures["models"])
    if len(rows) > 1:
        rows["**all**"] = figures["total"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['requests']} | {row['errors']} | {row['output_tokens_per_s']:.1f} "
            f"| {_pair(row['ttft_ms'])} | {_pair(row['inter_token_ms'])} |"
        )
    lines.append("")
    lines.append(f"wall {figures['wall_s']:.1f} s, load client {figures['client_cpu_s']:.1f} CPU s")
    if server := figures.get("server"):
        lines.append(
            f"server: ready after {server['ready_s']:.1f} s, RSS "
            f"{server['rss_ready_bytes'] / 1e6:.0f} MB ready, "
            f"{server['rss_peak_bytes'] / 1e6:.0f} MB peak, {server['cpu_s']:.1f} CPU s"
        )
    lines += [f"error: {example}" for example in figures["error_examples"]]
    return "\n".join(lines)


def _pair(figure: dict[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['p50']:.1f} / {figure['p99']:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if any request failed."""
    args = parse_args(argv)
    figures: dict[str, Any] = {"label": args.label, "environment": environment()}
    figures["config"] = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    try:
        with spawned(args, figures):
            figures |= asyncio.run(measure(args))
    except ChildError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(figures))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["total"]["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
