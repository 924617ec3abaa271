"""What the server's engine does: decode steps, prefill, and cold loads while others decode."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.engine import Engine, make_engine
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.random_model import write_random_delta
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.timing import copy_bandwidth, percentile, seconds_of
from compressor.artifact import read_artifact
from server.engine.request import Request
from server.engine.rotary import RotaryAttention
from server.ops.quantize import BaseQuant

NEW_PROMPT = 16  # tokens of the request that asks for a variant that is not resident
MIXED = 8  # resident variants that decode during a load


def serve(
    plan: Plan,
    report: Report,
    codec: Codec,
    *,
    base_quant: BaseQuant | None = None,
    loads: bool = False,
) -> bool:
    """Tables of decode and prefill with 0 .. k variants, and of cold loads if wanted."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "delta"
        write_random_delta(plan.shape, codec, artifact)
        bandwidth = copy_bandwidth(plan)
        engine = make_engine(plan, base_quant)
        keys = [f"v{i}" for i in range(max(plan.variants))]
        engine.fill(read_artifact(artifact), keys)
        describe(engine, report)
        warm_up(engine, keys)
        decode(engine, report, codec, bandwidth, keys)
        if loads:
            cold_loads(engine, report, codec, artifact, keys)
        engine.core.stop()
    return True


def describe(engine: Engine, report: Report) -> None:
    """Whether the fast paths are taken, and the memory of base, cache and resident variants."""
    layers = list(engine.runner.base.store.probed)
    n_fused = sum(isinstance(layer.forward, RotaryAttention) for layer in layers)
    report.line(f"\n{n_fused} of {len(layers)} attention layers fused")
    if engine.plan.device.type == "cuda":
        used, held = torch.cuda.memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        report.line(f"\n{used:.1f} GB of device memory in use, {held:.1f} GB held by torch")


def warm_up(engine: Engine, keys: list[str]) -> None:
    """Compile what prefill and decode need, so that no table counts it."""
    requests, _ = engine.start(engine.plan.batch, keys[: engine.plan.batch // 2])
    engine.core.turn()
    engine.end(requests)


def decode(engine: Engine, report: Report, codec: Codec, bandwidth: float, keys: list[str]) -> None:
    """Steps of the whole engine: schedule, graph, sample, account."""
    plan = engine.plan
    quant = engine.runner.base.residency.base_quant
    report.table(
        f"Engine, {quant or 'bf16'} base, {codec.name}, {plan.context} tokens of context",
        *("variants", "rows", "prefill tokens/s", "step ms", "/ floor", "base only / this"),
    )
    base: dict[int, float] = {}
    for rows, k in plan.mixes:
        requests, prefill_s = engine.start(rows, keys[:k])
        engine.core.turn()  # captures the graph, if it is the first of its size
        before, tokens = engine.runner.counts.static, cached_tokens(requests)
        seconds = percentile(seconds_of(engine.core.turn, plan.n_steps), 0.5)
        assert engine.runner.counts.static == before + plan.n_steps, "every step is a static one"
        engine.end(requests)
        base.setdefault(rows, seconds)
        floor = floor_bytes(plan, codec, quant, k, tokens) / bandwidth
        report.row(
            *(k, rows, f"{rows * plan.context / prefill_s:.0f}", f"{seconds * 1e3:.2f}"),
            *(f"{seconds / floor:.2f}", f"{base[rows] / seconds:.2f}"),
        )


def cached_tokens(requests: list[Request]) -> int:
    return sum(request.n_computed for request in requests)


def floor_bytes(
    plan: Plan, codec: Codec, quant: BaseQuant | None, variants: int, tokens: int
) -> int:
    """Base, deltas of `variants` variants, keys and values: each read once."""
    shape = plan.shape
    base = shape.base_bytes() if quant is None else shape.base_bytes_8bit()
    return base + variants * shape.delta_bytes(codec) + shape.kv_bytes(tokens)


@dataclass
class Load:
    """One cold load. Seconds since it was asked for; those between the others' tokens."""

    read_s: float
    shown_s: float
    first_token_s: float
    intervals: list[float]


def cold_loads(
    engine: Engine, report: Report, codec: Codec, artifact: Path, keys: list[str]
) -> None:
    """A variant from the disk to its first token, by the server's loader, beside running rows."""
    plan = engine.plan
    size = sum(file.stat().st_size for file in artifact.iterdir()) / 1e6
    report.table(
        f"Cold load of {size:.0f} MB ({codec.name}) while {plan.batch} rows decode; "
        "ms between their tokens without it and meanwhile",
        *("load", "read and verified s", "shown s", "first token s", "steps meanwhile"),
        *("p50 without", "p99 without", "p50", "p99", "longest", "p99 / p99 without"),
    )
    for number in range(plan.n_loads):
        requests, _ = engine.start(plan.batch, keys[: min(MIXED, len(keys))])
        engine.core.turn()
        quiet = seconds_of(engine.core.turn, 2 * plan.n_steps)
        load = cold_load(engine, f"new{number}", artifact)
        engine.end(requests)
        before = [percentile(quiet, share) for share in (0.5, 0.99)]
        during = [percentile(load.intervals, share) for share in (0.5, 0.99, 1.0)]
        report.row(
            *(number, f"{load.read_s:.2f}", f"{load.shown_s:.2f}", f"{load.first_token_s:.2f}"),
            *(len(load.intervals), *(f"{seconds * 1e3:.2f}" for seconds in before + during)),
            f"{during[1] / before[1]:.2f}",
        )


def cold_load(engine: Engine, key: str, artifact: Path) -> Load:
    for file in artifact.iterdir():
        forget(file)
    engine.read_from(key, artifact)
    read = engine.readers[key]
    done: list[float] = []

    def timed_read() -> object:
        found = read()
        done.append(time.perf_counter())
        return found

    engine.readers[key] = timed_read  # type: ignore[assignment]
    start = last = time.perf_counter()
    request = engine.submit(key, NEW_PROMPT)
    intervals = []
    while not engine.is_ready(key):
        engine.core.turn()
        now = time.perf_counter()
        intervals.append(now - last)
        last = now
    shown = last - start
    engine.until(lambda: request.request_id in engine.first_tokens)
    first = engine.first_tokens[request.request_id] - start
    engine.core.abort(request)
    engine.core.turn()
    return Load(done[0] - start, shown, first, intervals)


def forget(file: Path) -> None:
    """Drop a file from the page cache, so that reading it reads the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
