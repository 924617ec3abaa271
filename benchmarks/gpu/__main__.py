"""Everything there is to measure on one GPU, in one run of at most ten minutes.

    python -m benchmarks.gpu            # Llama-3-8B shapes on the CUDA device
    python -m benchmarks.gpu --tiny     # on a CPU with TRITON_INTERPRET=1: plumbing only

Markdown tables, to the terminal and line by line to ``--out``: device and versions, the engine's
decode steps and prefill with k variants against base only and the floor, cold loads from disk while
others decode, every kernel (time, share of the copy bandwidth, deviation from float64), the same
with an 8-bit base, and steps of the kernels alone. Each section runs in a process of its own, with
what is left of ``--minutes`` and four of them at most: one that crashes or hangs does not take the
others with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.decoder_section import steps
from benchmarks.gpu.device_section import device
from benchmarks.gpu.engine_section import serve
from benchmarks.gpu.kernel_section import kernels
from benchmarks.gpu.plan import FULL, SMALL, Plan
from benchmarks.gpu.report import Report
from server.ops.triton.compat import INTERPRET

SECTION_S = 240.0  # of wall time, then it is cut off for the others' sake
Section = Callable[[Plan, Report], bool]


def sections(plan: Plan) -> dict[str, Section]:
    """By name, what matters most first. Each returns whether all went right."""
    found: dict[str, Section] = {"device": device}
    first, *others = plan.served
    found["engine"] = partial(serve, codec=first, loads=True)
    found["kernels"] = kernels
    for number, codec in enumerate(others, 2):
        found[f"engine-{number}"] = partial(serve, codec=codec)
    found["engine-int8"] = partial(serve, codec=plan.served[-1], base_quant="int8")
    found["decoder"] = partial(steps, codec=first)
    return found


def run_apart(name: str, arguments: argparse.Namespace, left_s: float) -> bool:
    """One section in a process of its own; False if it failed, and the report says how."""
    report, start = Report(arguments.out), time.monotonic()
    if left_s <= 0:
        report.line(f"\n({name}: CUT OFF, no time left)")
        return False
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
    command += ["--out", str(arguments.out)] + ["--tiny"] * arguments.tiny
    limit_s = left_s if arguments.tiny else min(left_s, SECTION_S)
    try:
        code = subprocess.run(command, timeout=limit_s, check=False).returncode
        ended = "done" if code == 0 else f"FAILED with exit status {code}"
    except subprocess.TimeoutExpired:
        ended = "CUT OFF"
    report.line(f"\n({name}: {ended}, {time.monotonic() - start:.0f} s)")
    return ended == "done"


def parse() -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.md"), help="appended to")
    parser.add_argument("--minutes", type=float, default=9.5, help="of wall time for all sections")
    parser.add_argument("--section", choices=sections(SMALL) | sections(FULL), help="this one only")
    arguments = parser.parse_args()
    if arguments.tiny and not INTERPRET:
        parser.error("--tiny needs TRITON_INTERPRET=1 in the environment")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on a CPU, benchmarks.gpu.offline compiles only")
    return arguments, SMALL if arguments.tiny else FULL


def main() -> int:
    arguments, plan = parse()
    if arguments.section is not None:
        torch.manual_seed(0)
        return 0 if sections(plan)[arguments.section](plan, Report(arguments.out)) else 1
    end = time.monotonic() + 60 * arguments.minutes
    failed = [
        name for name in sections(plan) if not run_apart(name, arguments, end - time.monotonic())
    ]
    Report(arguments.out).line(
        f"\nFailed sections: {', '.join(failed)}" if failed else "\nEvery section went right."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
