"""Where an engine step's time goes: the core alone, without HTTP, with timers around its parts.

Example: ``python -m benchmarks.profile --base BASE --deltas DELTAS --variants 8``. Requests are
kept in flight as by `benchmarks.serve`. Speed is measured first without timers, with ``--in-turn``
run by run beside that of the base alone, so that a host whose speed changes does so for both;
shares are of the time inside a second, timed run, each part's own (what other parts take within it
is theirs).
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from server.engine.build import build_engine, device_of, use_threads
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore
from server.engine.lifecycle import Events
from server.engine.request import Request
from server.engine.types import SamplingParams
from server.ops.blockdiag import BlockDiagOp
from server.ops.choose import choose_kernels
from server.ops.joined import JoinedTerms
from server.ops.kernels import Kernels
from server.ops.linear import LinearOp
from server.ops.packed import PackedBlocks
from server.settings import Settings

ID_RANGE = (1000, 10000)
LINEARS, DELTAS = "base linears", "delta products"
JOINED = "linears with terms"
# Kernels' operations by the part they belong to.
OPERATIONS = {
    "decode_": "decode attention",
    "rotate_and_decode_": "decode attention",
    "prefill_": "prefill attention",
    "rotate_and_write_": "rotary embedding and cache",
    "rms_norm": "norms and the MLP's gate",
    "add_rms_norm": "norms and the MLP's gate",
    "silu_mul": "norms and the MLP's gate",
}
# What is left inside a module once the kernels it calls are taken out.
MODULES = {
    "Attention": "attention: views, Python",
    "RotaryEmbedding": "rotary embedding and cache",
    "DecoderLayer": "residuals",
    "DeltaEmbedding": "embeddings",
    "MLP": "MLP: views, Python",
    "DeltaNorm": "norms and the MLP's gate",
    "DeltaLinear": "linears: grouping, Python",
}


class Clock:
    """Adds up the time of nested parts, each without those inside it."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.on = False
        self._inner: list[float] = []

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted under `part`."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            self._inner.append(0.0)
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                whole = self.now() - start
                self.seconds[part] += whole - self._inner.pop()
                self.calls[part] += 1
                if self._inner:
                    self._inner[-1] += whole

        return timed


class TimedLinear(LinearOp):
    """A `LinearOp` on the clock."""

    def __init__(self, op: LinearOp, clock: Clock) -> None:
        self._product = clock.wrap(LINEARS, op.__call__)
        self.inner = op

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LinearOp`."""
        y: Tensor = self._product(x, bias)
        return y

    def dense(self) -> Tensor:
        """See `LinearOp`."""
        return self.inner.dense()


class TimedBlockDiag:
    """A `BlockDiagOp` on the clock."""

    def __init__(self, op: BlockDiagOp, clock: Clock) -> None:
        self.inner = op
        self.add_ = clock.wrap(DELTAS, op.add_)


class TimedTerms:
    """`JoinedTerms` on the clock."""

    def __init__(self, terms: JoinedTerms, clock: Clock) -> None:
        self._terms = terms
        self.product = clock.wrap(JOINED, terms.product)

    def use(self, linear: LinearOp) -> None:
        """See `JoinedTerms`. They must see their own kind of linear."""
        self._terms.use(getattr(linear, "inner", linear))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terms, name)


class TimedKernels:
    """`Kernels` on the clock: the operations of `OPERATIONS`, linears and deltas."""

    def __init__(self, inner: Kernels, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._clock.wrap(OPERATIONS[name], found) if name in OPERATIONS else found

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        """See `Kernels`."""
        return TimedBlockDiag(self._inner.blockdiag(blocks), self._clock)

    def joined_terms(
        self, linear: LinearOp, n_outputs: int, dtype: torch.dtype
    ) -> JoinedTerms | None:
        """See `Kernels`."""
        terms = self._inner.joined_terms(linear, n_outputs, dtype)
        return None if terms is None else TimedTerms(terms, self._clock)

    def linear(self, weight: Tensor) -> LinearOp:
        """See `Kernels`."""
        return TimedLinear(self._inner.linear(weight), self._clock)


@dataclass(frozen=True)
class Load:
    """A closed loop: `concurrency` requests in flight, greedy, random prompts, no early end."""

    models: Sequence[str]
    n_requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int


@dataclass
class Bench:
    """An engine core driven on this thread."""

    core: EngineCore
    catalog: VariantCatalog
    now: Callable[[], float]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    n_running: int = 0

    def run(self, load: Load) -> float:
        """Return output tokens per second."""
        start = self.now()
        sent = 0
        while sent < load.n_requests or self.n_running:
            while sent < load.n_requests and self.n_running < load.concurrency:
                self._submit(load.models[sent % len(load.models)], load)
                sent += 1
            self.core.turn()
        return load.n_requests * load.max_tokens / (self.now() - start)

    def _submit(self, model: str, load: Load) -> None:
        variant = self.catalog.open(model)
        params = SamplingParams(max_tokens=load.max_tokens, temperature=0.0, ignore_eos=True)
        prompt = [int(i) for i in self.rng.integers(*ID_RANGE, size=load.prompt_tokens)]
        self.n_running += 1
        self.core.submit(
            Request(
                request_id=f"r{time.monotonic_ns()}",
                variant=variant,
                prompt_ids=prompt,
                params=params,
                deliver=self._deliver,
            )
        )

    def _deliver(self, event: Any) -> None:
        if isinstance(event, Exception):
            raise event
        self.n_running -= event.finish_reason is not None


def make_bench(settings: Settings, clock: Clock) -> Bench:
    """Load the base with kernels on the clock; nothing is counted until `clock.on`."""
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    # The compute dtype is the checkpoint's; kernels for bfloat16 suit any the CPU has.
    kernels = TimedKernels(choose_kernels(settings.kernels, device_of(settings), dtype), clock)
    parts = build_engine(
        settings,
        _deliver_all,
        kernels=kernels,
        choose_steps=lambda runner, settings: None,  # timers see nothing inside a graph
    )
    for module in parts.base.model.modules():
        _time_module(module, clock)
    return Bench(parts.core, parts.catalog, clock.now)


def _deliver_all(events: Events) -> None:
    for request, event in events:
        request.deliver(event)


def _time_module(module: nn.Module, clock: Clock) -> None:
    name = type(module).__name__
    for ending, part in MODULES.items():
        if name.endswith(ending):
            module.forward = clock.wrap(part, module.forward)


def timed_engine(bench: Bench, clock: Clock) -> ExitStack:
    """Put the engine's own steps on the clock while the returned context is open."""
    core: Any = bench.core
    stack = ExitStack()
    for owner, name, part in (
        (core, "step", "engine: the rest"),
        (core.scheduler, "schedule", "scheduling and batch building"),
        (core._runner, "prepare_inputs", "scheduling and batch building"),
        (core._runner, "forward", "model: the rest"),
        (core._accounting.post, "chunk", "events"),
        (type(core._sampler), "sample_chunks", "sampling"),
    ):
        stack.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
    return stack


def table(clock: Clock) -> str:
    """Shares of the time inside steps, largest first."""
    whole = sum(clock.seconds.values())
    rows = sorted(clock.seconds.items(), key=lambda item: -item[1])
    lines = ["| part | share | seconds | calls | us a call |", "|---|---:|---:|---:|---:|"]
    for part, seconds in rows:
        n = clock.calls[part]
        lines.append(
            f"| {part} | {seconds / whole:.1%} | {seconds:.2f} | {n} | {seconds / n * 1e6:.0f} |"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--deltas", type=Path, help="directory of delta artifacts")
    add("--variants", type=int, default=0, help="how many of them are mixed; 0: the base alone")
    add("--kernels", choices=("auto", "torch", "numba", "triton"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--requests", type=int, default=64)
    add("--concurrency", type=int, default=32)
    add("--prompt-tokens", type=int, default=64)
    add("--max-tokens", type=int, default=64)
    add("--repeats", type=int, default=1, help="runs without timers")
    add("--in-turn", action="store_true", help="each of them after one of the base alone")
    add("--threads", type=int, help="CPU threads; default: as the server's")
    add("--cpu-time", action="store_true", help="of this thread: for one thread on a busy machine")
    return parser.parse_args(argv)


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print output tokens per second and the table."""
    logging.basicConfig(level=logging.WARNING)
    args = parse_args(argv)
    settings = Settings(
        base=args.base,
        deltas=args.deltas,
        served_base_name="base",
        device="cpu",
        torch_threads=args.threads,
        kernels=args.kernels,
        dtype=args.dtype,
        max_prefill_slowdown=0,  # steps that depend on the time they take cannot be compared
    )
    use_threads(settings)
    clock = Clock(time.thread_time if args.cpu_time else time.perf_counter)
    bench = make_bench(settings, clock)
    names = [delta.name for delta in bench.catalog.registry.all()][: args.variants] or ["base"]
    if args.variants > len(names):
        raise SystemExit(f"{args.deltas} holds {len(names)} variants only")
    load = Load(names, args.requests, args.concurrency, args.prompt_tokens, args.max_tokens)
    try:
        bench.run(Load(names, len(names), args.concurrency, args.prompt_tokens, 4))  # warms up
        alone = replace(load, models=["base"])
        pairs = [
            (bench.run(alone) if args.in_turn else 0.0, bench.run(load))
            for _ in range(args.repeats)
        ]
        print(
            f"{len(names)} model(s), {args.requests} requests of {args.prompt_tokens} in and "
            f"{args.max_tokens} out, {args.concurrency} in flight: "
            f"{_spread([rate for _, rate in pairs], '.0f')} output tok/s"
        )
        if args.in_turn:
            print(f"of the base alone: {_spread([rate / base for base, rate in pairs], '.3f')}")
        with timed_engine(bench, clock):
            clock.on = True
            rate = bench.run(load)
        print(f"with timers: {rate:.0f} output tok/s, {clock.calls['model: the rest']} steps\n")
        print(table(clock))
    finally:
        bench.core.loader.close()


if __name__ == "__main__":
    main()
