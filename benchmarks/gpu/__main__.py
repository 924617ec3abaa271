"""Everything there is to measure on one GPU, in one run of at most ten minutes.

    python -m benchmarks.gpu            # Llama-3-8B shapes on the CUDA device
    python -m benchmarks.gpu --tiny     # on a CPU with TRITON_INTERPRET=1: plumbing only

Markdown tables, to the terminal and line by line to ``--out``: device and versions, the engine's
decode steps and prefill with k variants against base only and the floor, cold loads from disk while
others decode, every kernel (time, share of the copy bandwidth, deviation from float64), the same
with an 8-bit base, steps of the kernels alone, and last what was measured beside the targets. Each
section runs in processes of its own, with what is left of ``--minutes`` and its own limit at most:
one that crashes or hangs does not take the others with it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.compile_section import compile_ahead
from benchmarks.gpu.decoder_section import steps
from benchmarks.gpu.device_section import device
from benchmarks.gpu.engine_section import serve
from benchmarks.gpu.kernel_section import kernels, parts
from benchmarks.gpu.report import Report, facts_path
from benchmarks.gpu.scope import FULL, SMALL, Scope
from benchmarks.gpu.targets import target_table
from server.ops.triton.compat import INTERPRET

ENGINE_S, KERNELS_S, OTHER_S = 170.0, 75.0, 100.0


@dataclass(frozen=True)
class Section:
    """One part of the run.

    run      returns whether all went right
    limit_s  of wall time, then it is cut off for the others' sake
    """

    run: Callable[[Scope, Report], bool]
    limit_s: float


def sections(scope: Scope) -> dict[str, Section]:
    """By name; after what all of them need, what matters most first."""
    first, *others = scope.served
    found = {"compile": Section(compile_ahead, OTHER_S), "device": Section(device, OTHER_S)}
    found["engine"] = Section(partial(serve, codec=first, loads=True), ENGINE_S)
    for part in parts(scope):
        found[f"kernels-{part}"] = Section(partial(kernels, part=part), KERNELS_S)
    for number, codec in enumerate(others, 2):
        found[f"engine-{number}"] = Section(partial(serve, codec=codec), ENGINE_S)
    int8 = partial(serve, codec=scope.served[-1], base_quant="int8")
    found["engine-int8"] = Section(int8, ENGINE_S)
    found["decoder"] = Section(partial(steps, codec=first), OTHER_S)
    return found


def run_apart(
    name: str, arguments: argparse.Namespace, left_s: float, limit_s: float = OTHER_S
) -> bool:
    """One section in a process of its own; False if it failed, and the report says how."""
    report, start = Report(arguments.out), time.monotonic()
    if left_s <= 0:
        report.line(f"\n({name}: CUT OFF, no time left)")
        return False
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
    command += ["--out", str(arguments.out)] + ["--tiny"] * arguments.tiny
    limit_s = left_s if arguments.tiny else min(left_s, limit_s)
    process = subprocess.Popen(command, process_group=0)
    try:
        code = process.wait(limit_s)
        ended = "done" if code == 0 else f"FAILED with exit status {code}"
    except subprocess.TimeoutExpired:
        ended = "CUT OFF"
    finally:
        end_group(process)
    report.line(f"\n({name}: {ended}, {time.monotonic() - start:.0f} s)")
    return ended == "done"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a section goes on beside the next: its own processes, if any, end with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse() -> tuple[argparse.Namespace, Scope]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.md"), help="appended to")
    parser.add_argument("--minutes", type=float, default=9.0, help="of wall time for all sections")
    parser.add_argument("--section", choices=sections(SMALL) | sections(FULL), help="this one only")
    arguments = parser.parse_args()
    if arguments.tiny and not INTERPRET:
        parser.error("--tiny needs TRITON_INTERPRET=1 in the environment")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on a CPU, benchmarks.gpu.offline compiles only")
    return arguments, SMALL if arguments.tiny else FULL


def main() -> int:
    arguments, scope = parse()
    if arguments.section is not None:
        torch.manual_seed(0)
        section = sections(scope)[arguments.section]
        return 0 if section.run(scope, Report(arguments.out)) else 1
    facts_path(arguments.out).unlink(missing_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    failed = [
        name
        for name, section in sections(scope).items()
        if not run_apart(name, arguments, end - time.monotonic(), section.limit_s)
    ]
    report = Report(arguments.out)
    report.line(
        f"\nFailed sections: {', '.join(failed)}" if failed else "\nEvery section went right."
    )
    target_table(scope, report, arguments.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
