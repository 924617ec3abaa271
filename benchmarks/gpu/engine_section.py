"""What the server's engine does: decode steps, prefill, and cold loads while others decode."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu.disk import folder_on_disk
from benchmarks.gpu.engine import Engine, make_engine
from benchmarks.gpu.load_section import MIXED, NEW_PROMPT, cold_loads
from benchmarks.gpu.predict import step_expected_ms
from benchmarks.gpu.random_model import write_random_delta
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.timing import copy_bandwidth, percentile, seconds_of
from compressor.artifact.reader import read_artifact
from server.engine.request import Request
from server.model.fused_attention import RotaryAttention
from server.ops.quantize import BaseQuant

SHORT_PROMPT = 64  # tokens; of warm-ups that are about decode steps


def serve(
    scope: Scope,
    report: Report,
    codec: Codec,
    *,
    base_quant: BaseQuant | None = None,
    loads: bool = False,
) -> bool:
    """Tables of decode and prefill with 0 .. k variants, and of cold loads if wanted."""
    with folder_on_disk() as folder:
        artifact = folder / "delta"
        write_random_delta(scope.shape, codec, artifact)
        bandwidth = copy_bandwidth(scope)
        engine = make_engine(scope, base_quant)
        keys = make_ready(engine, artifact)
        describe(engine, report)
        decode(engine, report, codec, bandwidth, keys)
        whole = cold_loads(engine, report, codec, artifact, keys) if loads else True
        engine.core.stop()
    return whole


def make_ready(engine: Engine, artifact: Path) -> list[str]:
    """Fill the slots and warm up; keys of the resident variants."""
    keys = [f"v{i}" for i in range(max(engine.scope.variants))]
    engine.fill(read_artifact(artifact), keys)
    warm_up(engine, keys)
    return keys


def describe(engine: Engine, report: Report) -> None:
    """Whether the fast paths are taken, and the memory of base, cache and resident variants."""
    layers = list(engine.runner.base.store.layers)
    n_fused = sum(isinstance(layer.forward, RotaryAttention) for layer in layers)
    report.line(f"\n{n_fused} of {len(layers)} attention layers fused")
    if engine.scope.device.type == "cuda":
        used, held = torch.cuda.memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        report.line(f"\n{used:.1f} GB of device memory in use, {held:.1f} GB held by torch")


def warm_up(engine: Engine, keys: list[str]) -> None:
    """Compile and capture what prefill and decode need, so that no table counts it: one prefill of
    full length, a step or two of every mix, and a short prompt of one more variant among decoding
    rows, as a load brings it.
    """
    scope = engine.scope
    requests, _ = engine.start(scope.batch, keys[: scope.batch // 2])
    engine.core.turn()
    engine.end(requests)
    for rows, k in scope.mixes:
        requests, _ = engine.start(rows, keys[:k], min(SHORT_PROMPT, scope.context))
        engine.core.turn()
        engine.end(requests)
    requests, _ = engine.start(scope.batch, keys[:MIXED])
    late = engine.submit(keys[-1], NEW_PROMPT)
    engine.until(lambda: late.request_id in engine.first_tokens)
    engine.core.turn()
    engine.end([*requests, late])


def decode(engine: Engine, report: Report, codec: Codec, bandwidth: float, keys: list[str]) -> None:
    """Steps of the whole engine: schedule, graph, sample, account."""
    scope = engine.scope
    quant = engine.runner.base.residency.base_quant
    report.table(
        f"Engine, {quant or 'bf16'} base, {codec.name}, {scope.context} tokens of context",
        "variants",
        "rows",
        "prefill tokens/s",
        "step ms",
        "expected ms",
        "/ floor",
        "base only / this",
        "expected",
    )
    base: dict[int, float] = {}
    for rows, k in scope.mixes:
        requests, prefill_s = engine.start(rows, keys[:k])
        engine.core.turn()  # captures the graph, if it is the first of its size
        before, tokens = engine.runner.counts.static, cached_tokens(requests)
        seconds = percentile(seconds_of(engine.core.turn, scope.n_steps), 0.5)
        assert engine.runner.counts.static == before + scope.n_steps, "every step is a static one"
        engine.end(requests)
        base.setdefault(rows, seconds)
        floor = floor_bytes(scope, codec, quant, k, tokens) / bandwidth
        expected_ms, alone_ms = (
            step_expected_ms(scope.shape, codec, rows, n, int8_base=quant is not None)
            for n in (k, 0)
        )
        report.row(
            k,
            rows,
            f"{rows * scope.context / prefill_s:.0f}",
            f"{seconds * 1e3:.2f}",
            f"{expected_ms:.2f}",
            f"{seconds / floor:.2f}",
            f"{base[rows] / seconds:.2f}",
            f"{alone_ms / expected_ms:.2f}",
        )
        report.fact(
            "step",
            **{"ratio": codec.ratio, "quant": quant, "rows": rows, "variants": k},
            **{"per_floor": seconds / floor, "of_base": base[rows] / seconds},
        )


def cached_tokens(requests: list[Request]) -> int:
    return sum(request.n_computed for request in requests)


def floor_bytes(
    scope: Scope, codec: Codec, quant: BaseQuant | None, variants: int, tokens: int
) -> int:
    """Base, deltas of `variants` variants, keys and values: each read once."""
    shape = scope.shape
    base = shape.base_bytes() if quant is None else shape.base_bytes_8bit()
    return base + variants * shape.delta_bytes(codec) + shape.kv_bytes(tokens)
