r"""What cold variants that are asked for at once cost a stream that runs: p99 between its tokens.

    python -m benchmarks.cold_loads --base BASE --deltas deploy/demo/deltas \
        --checkout main=../other-checkout --checkout here=. --rounds 3

Each round starts the server of each checkout, in turn, over the same folder of copies of the
artifacts (their seeds differ, so every copy is a variant of its own). One copy is asked for first,
so that the kernels are there, and a stream of the base runs throughout. Then the gaps between
the stream's tokens are taken in three phases:

    quiet   nobody else asks for anything
    cold    all other copies are asked for at once, one token each; until the last has answered
    warm    the same requests again, now that all are resident, spread over as long a time

cold / quiet is what the stream's reader feels; cold / warm is what loading adds to the work of
serving these requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.child import ServerChild, free_port
from benchmarks.load import Job, LoadClient, Outcome
from benchmarks.stream import Stream, gaps_between, machine, replace_files
from compressor.artifact.files import CHECKSUMS, CONFIG

PHASES = ("quiet", "cold", "warm")
PROMPT_TOKENS = 16
SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Round:
    """One server measured: the gaps of each phase in seconds, and how long the cold ones waited."""

    gaps_s: dict[str, list[float]]
    first_answer_s: float
    last_answer_s: float

    def percentile_ms(self, phase: str, percent: float) -> float:
        """A percentile of the gaps of one phase, in milliseconds."""
        return 1e3 * float(np.percentile(self.gaps_s[phase], percent))

    def ratio(self, other: str) -> float:
        """p99 of the cold phase relative to that of another one."""
        return self.percentile_ms("cold", 99) / self.percentile_ms(other, 99)


def copy_artifacts(source: Path, target: Path, count: int) -> list[str]:
    """Write `count` artifacts of different digests to `target`; return their names."""
    originals = sorted(path for path in source.iterdir() if (path / CHECKSUMS).is_file())
    if not originals:
        raise SystemExit(f"{source} holds no artifacts")
    names = [f"copy-{index}" for index in range(count)]
    for index, name in enumerate(names):
        copy = Path(shutil.copytree(originals[index % len(originals)], target / name))
        config = json.loads((copy / CONFIG).read_bytes())
        config["seed"] = index
        replace_files(copy, {CONFIG: json.dumps(config).encode()})
    return names


async def measure(url: str, names: Sequence[str], quiet_s: float) -> Round:
    """Run the phases against a server that is ready; the first name is only there to warm up."""
    asks = LoadClient(url, max_tokens=1, stream=False, timeout_s=600.0)
    prompt = list(range(1000, 1000 + PROMPT_TOKENS))
    for model in ("base", names[0]):
        check([await asks.send(Job(model, prompt))])
    stream = Stream(url, prompt)
    await asyncio.sleep(SETTLE_S)
    bounds = {"quiet": (time.perf_counter(), time.perf_counter() + quiet_s)}
    await asyncio.sleep(quiet_s)
    start_s = time.perf_counter()
    cold = await asyncio.gather(*(asks.send(Job(name, prompt)) for name in names[1:]))
    bounds["cold"] = (start_s, time.perf_counter())
    check(cold)
    await asyncio.sleep(SETTLE_S)
    start_s, pause_s = time.perf_counter(), (bounds["cold"][1] - bounds["cold"][0]) / len(cold)
    for name in names[1:]:
        _, warm = await asyncio.gather(asyncio.sleep(pause_s), asks.send(Job(name, prompt[::-1])))
        check([warm])
    bounds["warm"] = (start_s, time.perf_counter())
    await stream.leave()
    await asks.close()
    waits = [outcome.end_s - outcome.start_s for outcome in cold]
    gaps = {phase: gaps_between(stream.arrivals_s, *bounds[phase]) for phase in PHASES}
    return Round(gaps, min(waits), max(waits))


def check(outcomes: Sequence[Outcome]) -> None:
    """Stop if a request failed."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise SystemExit(f"a request failed: {errors[0]}")


def run_server(checkout: Path, args: argparse.Namespace, deltas: Path, names: list[str]) -> Round:
    """Start the checkout's server and measure it."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--base", str(args.base.resolve())]
    command += ["--deltas", str(deltas), "--port", str(port), "--served-base-name", "base"]
    url = f"http://127.0.0.1:{port}"
    with ServerChild(command, url, args.log.resolve(), checkout.resolve()) as child:
        child.wait_ready()
        return asyncio.run(measure(url, names, args.quiet_s))


def table(rounds: dict[str, list[Round]]) -> str:
    """Every round, then the medians of each checkout."""
    lines = [
        "| server | round | gaps in cold | quiet p50 / p99 ms | cold p50 / p99 / max ms "
        "| warm p99 ms | cold / quiet | cold / warm | first / last answer s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, measured in rounds.items():
        lines += [_row(label, str(index + 1), [one]) for index, one in enumerate(measured)]
    for label, measured in rounds.items():
        lines.append(_row(f"**{label}**", "median", measured))
    return "\n".join(lines)


def _row(label: str, number: str, rounds: Sequence[Round]) -> str:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def ms(phase: str, percent: float) -> str:
        return f"{median([one.percentile_ms(phase, percent) for one in rounds]):.1f}"

    cells = [
        label,
        number,
        f"{median([len(one.gaps_s['cold']) for one in rounds]):.0f}",
        f"{ms('quiet', 50)} / {ms('quiet', 99)}",
        f"{ms('cold', 50)} / {ms('cold', 99)} / {ms('cold', 100)}",
        ms("warm", 99),
        f"{median([one.ratio('quiet') for one in rounds]):.2f}",
        f"{median([one.ratio('warm') for one in rounds]):.2f}",
        f"{median([one.first_answer_s for one in rounds]):.2f} / "
        f"{median([one.last_answer_s for one in rounds]):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_loads", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--deltas", type=Path, required=True, help="artifacts of this base, copied as needed")
    add("--cold", type=int, default=8, help="variants that are asked for at once")
    add("--checkout", action="append", help="LABEL=FOLDER, repeatable; default: here=.")
    add("--rounds", type=int, default=3)
    add("--quiet-s", type=float, default=4.0)
    add("--log", type=Path, default=Path(".cache/bench/server.log"), help="the server's output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the method's table and the machine."""
    args = parse_args(argv)
    checkouts = {}
    for pair in args.checkout or ["here=."]:
        label, _, folder = pair.partition("=")
        checkouts[label] = Path(folder)
    rounds: dict[str, list[Round]] = {label: [] for label in checkouts}
    with tempfile.TemporaryDirectory(prefix="impart-cold-") as folder:
        names = copy_artifacts(args.deltas, Path(folder), args.cold + 1)
        for number in range(args.rounds):
            order = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
            for label in order:
                rounds[label].append(run_server(checkouts[label], args, Path(folder), names))
    print(table(rounds))
    print(f"\n{args.cold} cold variants at once beside one stream of the base; {machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
