"""Everything there is to measure on one GPU, in one run.

    python -m benchmarks.gpu            # Llama-3-8B shapes on the CUDA device
    python -m benchmarks.gpu --tiny     # on a CPU with TRITON_INTERPRET=1: plumbing only

Prints markdown tables: device and versions, copy bandwidth, every kernel (time, share of that
bandwidth, deviation from float64), decode steps with k variants against base only and the floor,
prefill, and a cold load from disk while others decode.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.gpu.cases import PAGE, Place, Sizes, even_segments
from benchmarks.gpu.decoder import Decoder, random_decoder
from benchmarks.gpu.shapes import LLAMA_8B, TINY, Codec, ModelShape
from benchmarks.gpu.specs import all_specs
from server.deltas.upload import SlotUploader
from server.engine.static_step import DecodeRow, StaticStep
from server.ops.triton.blockdiag import PREFILL_ROWS
from server.ops.triton.compat import INTERPRET
from server.ops.triton.layout import segment_arrays


@dataclass(frozen=True)
class Plan:
    """Sizes of one run."""

    shape: ModelShape
    codecs: tuple[Codec, ...]
    batch: int
    variants: tuple[int, ...]
    context: int
    prefill_rows: int
    repeats: int
    copy_bytes: int
    device: torch.device
    dtype: torch.dtype


FULL = Plan(
    LLAMA_8B,
    (Codec(4, 8), Codec(3, 6), Codec(2, 4), Codec(4, 32), Codec(2, 16)),
    batch=32,
    variants=(1, 8, 32, 64),
    context=1024,
    prefill_rows=2048,
    repeats=50,
    copy_bytes=4 << 30,
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
)
SMALL = Plan(
    replace(TINY, hidden=32, intermediate=32, heads=2, kv_heads=1, layers=1, vocab=32),
    (Codec(4, 2),),
    batch=2,
    variants=(1, 2),
    context=8,
    prefill_rows=40,
    repeats=1,
    copy_bytes=1 << 16,
    device=torch.device("cpu"),
    dtype=torch.float32,
)


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one run: median on the device with a cold L2 cache, plain mean on a CPU."""
    if device.type == "cuda":
        milliseconds = triton.testing.do_bench(run, warmup=20, rep=repeats, return_mode="median")
        return float(milliseconds) / 1e3
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def describe(plan: Plan) -> None:
    cuda = plan.device.type == "cuda"
    name = torch.cuda.get_device_name(plan.device) if cuda else "CPU, interpreter: no measurement"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(f"## {name}\n")
    print(f"torch {torch.__version__}, triton {triton.__version__}, commit {commit or 'unknown'}\n")


def copy_bandwidth(plan: Plan) -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), plan.repeats, plan.device)
    print(f"copy bandwidth: {2 * plan.copy_bytes / seconds / 1e9:.0f} GB/s\n")
    return 2 * plan.copy_bytes / seconds


def kernels(plan: Plan, bandwidth: float) -> bool:
    """Time and check every kernel; whether all are within their bound."""
    print("| kernel | MB | us | of copy | deviation from float64 |\n|---|---:|---:|---:|---:|")
    correct = True
    sizes = Sizes(plan.batch, plan.variants, plan.context, plan.prefill_rows)
    for spec in all_specs(plan.shape, plan.codecs, sizes):
        case = spec.make(Place(plan.device, plan.dtype))
        error = case.error()
        seconds = timed(case.run, plan.repeats, plan.device)
        share = spec.n_bytes / seconds / bandwidth
        correct &= error <= spec.bound
        mark = "" if error <= spec.bound else " WRONG"
        size = spec.n_bytes / 1e6
        print(
            f"| {spec.name} | {size:.2f} | {seconds * 1e6:.1f} | {share:.0%} | {error:.1e}{mark} |"
        )
    print()
    return correct


def rows_for(plan: Plan, batch: int, variants: int, at: int) -> list[DecodeRow]:
    """`batch` sequences of length `at`, shared evenly by `variants` variants (0: base only)."""
    per_row = -(-plan.context // PAGE) + 1
    slots = [-1] * batch
    for segment in even_segments(batch, variants) if variants else []:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    rows = []
    for i, slot in enumerate(slots):
        pages = list(range(i * per_row, i * per_row + -(-at // PAGE)))
        place = pages[(at - 1) // PAGE] * PAGE + (at - 1) % PAGE
        rows.append(DecodeRow(i % plan.shape.vocab, at - 1, place, pages, at, slot))
    return rows


def new_step(plan: Plan, decoder: Decoder, batch: int) -> StaticStep:
    per_row = -(-plan.context // PAGE) + 1
    step = StaticStep(decoder, max_rows=batch, max_pages=per_row, device=plan.device)
    step.prepare()
    return step


def steps(plan: Plan, codec: Codec, bandwidth: float, *, int8_base: bool) -> None:
    """Captured decode steps with 0 .. k variants against base only and the floor."""
    batch = max(plan.batch, *plan.variants)
    n_pages = batch * (-(-plan.context // PAGE) + 1)
    decoder = random_decoder(
        plan.shape,
        codec,
        max(plan.variants),
        n_pages,
        plan.device,
        plan.dtype,
        int8_base=int8_base,
    )
    step = new_step(plan, decoder, batch)
    base_bytes = plan.shape.base_bytes() // (2 if int8_base else 1)
    title = "int8 base" if int8_base else "bf16 base"
    print(f"### Decode step, {title}, {codec.name}, context {plan.context}\n")
    print("| rows | variants | ms | / floor | base only / this |\n|---:|---:|---:|---:|---:|")
    base: dict[int, float] = {}
    for k in (0, *plan.variants):
        for rows in sorted({max(plan.batch, k), batch} if k == 0 else {max(plan.batch, k)}):
            seconds = replay(plan, step, rows_for(plan, rows, k, plan.context))
            base.setdefault(rows, seconds)
            needed = base_bytes + k * plan.shape.delta_bytes(codec)
            floor = (needed + plan.shape.kv_bytes(rows * plan.context)) / bandwidth
            ratio = base[rows] / seconds
            print(f"| {rows} | {k} | {seconds * 1e3:.2f} | {seconds / floor:.2f} | {ratio:.2f} |")
    print()


def replay(plan: Plan, step: StaticStep, rows: list[DecodeRow]) -> float:
    """Seconds per step, host side included, one synchronisation a step as in the engine."""
    times = []
    for _ in range(plan.repeats):
        start = time.perf_counter()
        step.run(rows).argmax(-1).tolist()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def prefill(plan: Plan, codec: Codec) -> None:
    """Linears of a prefill chunk, base only and with one or two variants (attention not in it)."""
    decoder = random_decoder(plan.shape, codec, 2, 1, plan.device, plan.dtype)
    x = torch.randn(plan.prefill_rows, plan.shape.hidden, device=plan.device, dtype=plan.dtype)
    print(f"### Prefill of {plan.prefill_rows} tokens, linears, {codec.name}\n")
    print("| variants | ms | / base only |\n|---:|---:|---:|")
    base = 0.0
    for k in (0, 1, 2):
        parts = even_segments(plan.prefill_rows, k) if k else []
        where = segment_arrays(parts, PREFILL_ROWS, plan.device) if k else None
        with torch.inference_mode():
            seconds = timed(lambda w=where: decoder.linears(x, w), plan.repeats, plan.device)  # type: ignore[misc]
        base = base or seconds
        print(f"| {k} | {seconds * 1e3:.2f} | {seconds / base:.2f} |")
    print()


def cold_load(plan: Plan, codec: Codec) -> None:
    """A packed delta from disk to its slot on a copy stream while the base decodes."""
    decoder = random_decoder(plan.shape, codec, 2, 1024, plan.device, plan.dtype)
    step = new_step(plan, decoder, plan.batch)
    rows = rows_for(plan, plan.batch, 1, min(plan.context, PAGE))
    arrays = dict(slot_arrays(decoder))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "delta.safetensors"
        save_file({name: array[1].cpu().contiguous() for name, array in arrays.items()}, file)
        forget(file)
        quiet = intervals(step, rows, count=plan.repeats * 4)
        loaded: list[float] = []

        def load() -> None:
            start = time.perf_counter()
            uploader = SlotUploader(plan.device)
            with safe_open(file, framework="pt") as source:
                uploads = [
                    uploader.copy([(array[1], source.get_tensor(name))])
                    for name, array in arrays.items()
                ]
            uploads[-1].wait()
            loaded.append(time.perf_counter() - start)

        worker = threading.Thread(target=load)
        worker.start()
        busy: list[float] = []
        while worker.is_alive() or not busy:
            busy += intervals(step, rows, count=1)
        worker.join()
        n_bytes = file.stat().st_size
    if not loaded:
        raise RuntimeError("the load failed; its error is above")
    print(f"### Cold load of {n_bytes / 1e6:.0f} MB ({codec.name})\n")
    print(
        "| load s | p99 ms between tokens, quiet | during the load | ratio |\n|---:|---:|---:|---:|"
    )
    before, during = (sorted(x)[int(0.99 * (len(x) - 1))] * 1e3 for x in (quiet, busy))
    print(f"| {loaded[0]:.2f} | {before:.2f} | {during:.2f} | {during / before:.2f} |\n")


def slot_arrays(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every slot array by name: `[C, ...]`."""
    for i, layer in enumerate(decoder.layers):
        for name, group in layer.groups.items():
            assert group.blocks is not None
            for part in ("codes", "scales", "units"):
                yield f"{i}.{name}.{part}", getattr(group.blocks, part)


def forget(file: Path) -> None:
    """Drop a file from the page cache, so that reading it reads the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def intervals(step: StaticStep, rows: list[DecodeRow], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step.run(rows).argmax(-1).tolist()
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    plan = SMALL if parser.parse_args().tiny else FULL
    if plan is SMALL and not INTERPRET:
        parser.error("--tiny needs TRITON_INTERPRET=1 in the environment")
    if plan is FULL and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on a CPU, benchmarks.gpu.offline compiles only")
    torch.manual_seed(0)
    describe(plan)
    bandwidth = copy_bandwidth(plan)
    correct = kernels(plan, bandwidth)
    first = plan.codecs[0]
    for codec in plan.codecs[:1] + plan.codecs[3:4]:
        steps(plan, codec, bandwidth, int8_base=False)
    steps(plan, first, bandwidth, int8_base=True)
    prefill(plan, first)
    cold_load(plan, first)
    print("all kernels within bounds" if correct else "SOME KERNELS ARE WRONG")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
