"""Every kernel compiled before anything is timed, by as many processes as there are cores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu.ahead import Job, compiled, launches, walks
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from compressor.usable_cpus import usable_cpus
from server.ops.triton.compat import INTERPRET

COMPILE_S = 80.0  # then what is left is the sections' own to compile


@dataclass
class Compiled:
    """keys: of the kernels in triton's cache; failures: `name: why` of kernels and walks."""

    keys: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    n_left: int = 0


def compile_ahead(scope: Scope, report: Report) -> bool:
    """Fill triton's cache for the device that the other sections run on."""
    if INTERPRET:
        report.line("\nNothing to compile ahead: the kernels are interpreted")
        return True
    start = time.monotonic()
    major, minor = torch.cuda.get_device_capability(scope.device)
    n_processes = usable_cpus().cpus
    done = compile_all(scope, 10 * major + minor, n_processes, COMPILE_S)
    for failure in done.failures:
        report.line(f"\nFAILED to compile {failure}")
    report.line(
        f"\n{len(done.keys)} kernels compiled for sm_{major}{minor} by {n_processes} processes in "
        f"{time.monotonic() - start:.0f} s, {done.n_left} left for the sections to compile"
    )
    return not done.failures


def compile_all(scope: Scope, arch: int, n_processes: int, limit_s: float) -> Compiled:
    """Walk and compile at once: the first walks' kernels while later walks go on."""
    end, done = time.monotonic() + limit_s, Compiled()
    seen: set[str] = set()
    # Forked from a server that has neither threads nor the device, but has imported all there is.
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.ahead"])
    pool = ProcessPoolExecutor(n_processes, context, torch.set_num_threads, (1,))
    names: dict[Future[Any], str] = {
        pool.submit(launches, scope, name, arch): f"section {name}" for name in walks(scope)
    }
    while names and time.monotonic() < end:
        ready, _ = wait(names, end - time.monotonic(), FIRST_COMPLETED)
        for future in ready:
            name = names.pop(future)
            if error := future.exception():
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                done.failures.append(f"{name}: {reason}")
            elif isinstance(found := future.result(), str):
                done.keys.add(found)
            else:
                names |= {pool.submit(compiled, job): job.name for job in _new(found, seen)}
    done.n_left = len(names)
    pool.shutdown(wait=False, cancel_futures=True)
    return done


def _new(jobs: list[Job], seen: set[str]) -> Iterator[Job]:
    for job in jobs:
        if repr(job) not in seen:
            seen.add(repr(job))
            yield job
