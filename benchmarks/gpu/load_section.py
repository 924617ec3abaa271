"""Cold loads: a variant from the disk to its first token while others decode."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.disk import IN_MEMORY, file_system, forget, read_seconds
from benchmarks.gpu.engine import Engine
from benchmarks.gpu.predict import LOAD_S
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.timing import percentile, seconds_of
from server.engine.request import Request, Status

NEW_PROMPT = 16  # tokens of the request that asks for a variant that is not resident
MIXED = 8  # resident variants that decode during a load


@dataclass
class Load:
    """One cold load.

    read_s, shown_s, first_token_s  since it was asked for
    intervals    seconds between the others' tokens until it was shown
    moved        whether slot arrays grew for it, so that graphs were captured again
    undisturbed  whether all the others still decoded when it was shown
    """

    read_s: float
    shown_s: float
    first_token_s: float
    intervals: list[float]
    moved: bool
    undisturbed: bool


def cold_loads(
    engine: Engine, report: Report, codec: Codec, artifact: Path, keys: list[str]
) -> bool:
    """Loads by the server's loader, beside running rows. False if rows ended during one: what it
    then shows of the others is of fewer.
    """
    scope = engine.scope
    size = sum(file.stat().st_size for file in artifact.iterdir())
    where, seconds = file_system(artifact), read_seconds(artifact)
    memory = ": IN MEMORY, NO DISK IS READ" if where in IN_MEMORY else ""
    report.line(
        f"\nThe artifact's file system is {where}{memory}; reading its {size / 1e6:.0f} MB alone "
        f"takes {seconds:.2f} s"
    )
    report.table(
        f"Cold load of {size / 1e6:.0f} MB ({codec.name}) while {scope.batch} rows decode; "
        "ms between their tokens without it and meanwhile",
        "load",
        "read and verified s",
        "shown s",
        "expected s",
        "first token s",
        "arrays grew",
        "steps meanwhile",
        "p50 without",
        "p99 without",
        "p50",
        "p99",
        "longest",
        "p99 / p99 without",
    )
    expected = LOAD_S.get(codec.ratio)
    whole = True
    for number in range(scope.n_loads):
        requests, _ = engine.start(scope.batch, keys[:MIXED])
        engine.core.turn()
        quiet = seconds_of(engine.core.turn, 2 * scope.n_steps)
        load = cold_load(engine, f"new{number}", artifact, requests)
        engine.end(requests)
        before = [percentile(quiet, share) for share in (0.5, 0.99)]
        during = [percentile(load.intervals, share) for share in (0.5, 0.99, 1.0)]
        ratio = during[1] / before[1]
        report.row(
            number,
            f"{load.read_s:.2f}",
            f"{load.shown_s:.2f}",
            expected or "",
            f"{load.first_token_s:.2f}",
            "yes" if load.moved else "no",
            len(load.intervals),
            *(f"{seconds * 1e3:.2f}" for seconds in before + during),
            f"{ratio:.2f}{'' if load.undisturbed else ' ROWS ENDED BEFORE THE LOAD'}",
        )
        if load.undisturbed:
            report.fact("load", ratio=codec.ratio, shown_s=load.shown_s, p99_ratio=ratio)
        whole &= load.undisturbed
    return whole


def cold_load(engine: Engine, key: str, artifact: Path, others: list[Request]) -> Load:
    """One load that `others` see; they go on decoding."""
    forget(artifact)
    engine.read_from(key, artifact)
    read = engine.readers[key]
    done: list[float] = []

    def timed_read() -> object:
        found = read()
        done.append(time.perf_counter())
        return found

    engine.readers[key] = timed_read  # type: ignore[assignment]
    version = engine.version
    start = last = time.perf_counter()
    request = engine.submit(key, NEW_PROMPT)
    intervals = []
    while not engine.is_ready(key):
        engine.core.turn()
        now = time.perf_counter()
        intervals.append(now - last)
        last = now
    shown, moved = last - start, engine.version != version
    undisturbed = all(other.status is Status.RUNNING for other in others)
    engine.until(lambda: request.request_id in engine.first_tokens)
    first = engine.first_tokens[request.request_id] - start
    engine.core.abort(request)
    engine.core.turn()
    return Load(done[0] - start, shown, first, intervals, moved, undisturbed)
