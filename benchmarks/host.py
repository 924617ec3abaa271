"""What the host adds to a decode step, beside a device that takes a given time for it.

    python -m benchmarks.host --step-ms 6 --rows 32 64        # the engine alone, both ways in turn
    python -m benchmarks.host --serve BASE --port 8000        # a server, for benchmarks.serve

A GPU decodes while Python schedules, samples and answers; without one, a thread that sleeps stands
in for it: the engine (scheduler, KV block tables, sampler, bookkeeping, over static buffers) is the
server's own, what is computed is not. So tokens are meaningless and times are the host's:
``async_scheduling`` on and off against the device's own time.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engine import Engine, make_engine
from benchmarks.gpu.scope import SMALL
from benchmarks.gpu.timing import seconds_of
from server.engine.core import EngineCore
from server.engine.llm_engine import LLMEngine
from server.engine.request import Request
from server.engine.step.runner import DecodeStep, Runner
from server.engine.step.sampler import Sampled, Sampler
from server.metrics.series import Metrics
from server.process.run import run, run_in_loop
from server.settings import Settings

VOCAB = 64  # of the logits: a GPU finds the largest of 128000 in no time
CONTEXT = 256
SETTLE, STEPS, ROUNDS = 20, 200, 5


class SleepingDevice:
    """Does one step after the other, each in the same time."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._queue: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        self._under_way: list[threading.Event] = []
        threading.Thread(target=self._work, daemon=True).start()

    def launch(self) -> None:
        self._under_way.append(threading.Event())
        self._queue.put(self._under_way[-1])

    def wait(self) -> None:
        """For the oldest step that nobody has waited for."""
        if self._under_way:
            self._under_way.pop(0).wait()

    def _work(self) -> None:
        while True:
            done = self._queue.get()
            time.sleep(self._step_s)
            done.set()


@dataclass(slots=True)
class WaitingSampler(Sampler):
    """Waits where a device would be waited for."""

    device: SleepingDevice = field(default_factory=lambda: SleepingDevice(0.0))

    def outcomes(self, requests: list[Request], chosen: Tensor) -> list[Sampled]:
        self.device.wait()
        return Sampler.outcomes(self, requests, chosen)

    def sample_chunks(self, *args: Any) -> dict[Request, Sampled]:
        self.device.wait()
        return Sampler.sample_chunks(self, *args)


def put_to_sleep(core: EngineCore, step_s: float, max_rows: int) -> None:
    """Let decode steps of this engine be a sleeping device's. Prompts cost nothing."""
    device, runner = SleepingDevice(step_s), core._runner
    logits = torch.zeros(max_rows, VOCAB).index_fill_(1, torch.tensor([40]), 1.0)
    static, forward = runner._static, runner.forward
    assert static is not None

    def decode(batch: Any, with_deltas: bool) -> Tensor:
        device.launch()
        return logits[: batch.lengths.shape[0]]

    def either(step: Any) -> Tensor:
        return forward(step) if isinstance(step, DecodeStep) else logits[: len(step.logit_rows)]

    static._forward = decode
    runner.forward = either  # type: ignore[method-assign]
    core._sampler = core._lookahead._sampler = WaitingSampler(device=device)


def decoding(n_rows: int, step_s: float, *, ahead: bool) -> Engine:
    """An engine with so many rows decoding."""
    scope = replace(SMALL, batch=n_rows, variants=(1,), context=CONTEXT, n_steps=1)
    scope = replace(scope, shape=replace(scope.shape, vocab=VOCAB))
    engine = make_engine(scope)
    engine.core._lookahead.enabled = ahead
    put_to_sleep(engine.core, step_s, n_rows + 8)
    engine.start(n_rows, [])
    for _ in range(SETTLE):
        engine.core.turn()
    return engine


def compare(rows: Sequence[int], step_s: float) -> None:
    """Print a table: medians of rounds, on and off in turn."""
    print(f"device {1e3 * step_s:g} ms a step; median of {ROUNDS} x {STEPS} steps, in turn\n")
    print("| rows | async_scheduling | step ms | / device |\n|---:|---|---:|---:|")
    for n_rows in rows:
        engines = {ahead: decoding(n_rows, step_s, ahead=ahead) for ahead in (True, False)}
        found: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for ahead, engine in engines.items():
                found[ahead].append(statistics.fmean(seconds_of(engine.core.turn, STEPS)))
        for ahead, seconds in found.items():
            step = statistics.median(seconds)
            figures = f"{1e3 * step:.2f} | {step / step_s:.2f}"
            print(f"| {n_rows} | {'on' if ahead else 'off'} | {figures} |")


def serve(base: Path, port: int, n_rows: int, step_s: float, *, ahead: bool) -> None:
    """The server over HTTP, its decode steps a sleeping device's."""
    settings = Settings(
        base=base,
        port=port,
        device="cpu",
        kernels="torch",
        max_num_seqs=n_rows,
        async_scheduling=ahead,
        max_prefill_slowdown=0.0,
        torch_threads=1,
    )

    def over_static_buffers(runner: Runner, settings: Settings) -> None:
        assert settings.max_model_len is not None
        runner.use_static(max_rows=n_rows, max_len=settings.max_model_len)

    engine = LLMEngine.from_settings(settings, choose_steps=over_static_buffers)
    put_to_sleep(engine.core, step_s, n_rows + 8)
    run_in_loop(run(engine, settings, Metrics()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=6.0, help="of the device")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--serve", type=Path, metavar="BASE", help="serve instead, over HTTP")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--off", action="store_true", help="with --serve: no async scheduling")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    step_s = chosen.step_ms / 1e3
    if chosen.serve is None:
        compare(chosen.rows, step_s)
    else:
        serve(chosen.serve, chosen.port, max(chosen.rows), step_s, ahead=not chosen.off)


if __name__ == "__main__":
    main()
