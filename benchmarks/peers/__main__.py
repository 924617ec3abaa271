"""The same closed-loop load on this server and on its peers, one row per system and load.

    python -m benchmarks.peers --base BASE                  # everything; hours
    python -m benchmarks.peers --base BASE --variants 8 --loads 64x64 --mix uniform --window-s 20

Rows go to OUT.csv as they come, those already there are not measured again, and OUT.md is written
from it after every row. Exit status 1 if a system failed; the others are measured all the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.cells import DEFAULT_DIR, MIXES, Group, Load, groups_of
from benchmarks.peers.errors import PeersError
from benchmarks.peers.measure import Options, measure_group
from benchmarks.peers.report import write_report
from benchmarks.peers.rows import append_row, read_rows
from benchmarks.peers.systems import OURS, SYSTEMS, Site

MAX_LEN = 1024  # the same for all usual loads: vLLM compiles anew for another


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--systems", default=",".join(SYSTEMS), help="of: %(default)s")
    add("--variants", default="8,32,128", help="how many; the base alone is always measured")
    add("--peer-variants", help="how many the other systems serve; the fewest of --variants")
    add("--loads", default="64x64,512x64", help="prompt x output tokens")
    add("--mix", default=",".join(MIXES), help="of requests over variants")
    add("--out", type=Path, default=Path("benchmarks/results/peers"), help=".csv and .md")
    add("--dir", type=Path, default=DEFAULT_DIR, help="environments and variants")
    add("--concurrency", type=int, default=32)
    add(
        "--window-s",
        type=float,
        default=30.0,
        help="the shortest time in which requests are started",
    )
    add("--id-range", default="1000:10000", help="token ids of the prompts, low:high")
    add("--vllm-preload", default="", help="libraries for vLLM's LD_PRELOAD, separated by colons")
    add("--dry-run", action="store_true", help="only say what would be measured")
    return parser.parse_args(argv)


def groups_to_do(args: argparse.Namespace, done: set[tuple[str, int, str, str]]) -> list[Group]:
    """Every group with cells that have no row yet, without those that have."""
    systems = args.systems.split(",")
    for name in systems:
        if name not in SYSTEMS:
            raise PeersError(f"system {name!r} is unknown; known: {', '.join(SYSTEMS)}")
    ours = {int(count) for count in args.variants.split(",")}
    peers = {int(n) for n in args.peer_variants.split(",")} if args.peer_variants else {min(ours)}
    groups = []
    for group in groups_of(
        systems,
        sorted(ours | peers),
        [Load.parse(text) for text in args.loads.split(",")],
        args.mix.split(","),
    ):
        if group.variants and group.variants not in (ours if group.system == OURS else peers):
            continue
        cells = tuple(cell for cell in group.cells if cell.key not in done)
        if cells and (group.variants or SYSTEMS[group.system].alone):
            groups.append(replace(group, cells=cells))
    return groups


def run(args: argparse.Namespace) -> int:
    """Measure what is missing; return the exit status."""
    csv, failures = args.out.with_suffix(".csv"), 0
    groups = groups_to_do(args, {row.key for row in read_rows(csv)})
    low, _, high = args.id_range.partition(":")
    options = Options(window_s=args.window_s, id_range=(int(low), int(high)))
    loads = [Load.parse(text) for text in args.loads.split(",")]
    max_len = max(MAX_LEN, *(load.prompt_tokens + load.max_tokens for load in loads))
    site = Site(args.base.resolve(), args.dir, args.concurrency, max_len, args.vllm_preload)
    for group in groups:
        if args.dry_run:
            print(*(" ".join(map(str, cell.key)) for cell in group.cells), sep="\n")
            continue
        try:
            for row in measure_group(site, group, options, _tell):
                append_row(csv, row)
                write_report(csv)
                _tell(
                    f"{row.system} {row.variants} {row.load} {row.mix}: "
                    f"{row.output_tokens_per_s:.1f} tok/s, {row.requests} requests"
                )
        except PeersError as error:
            failures += 1
            print(f"FAILED {group.system}, {group.variants} variants: {error}", file=sys.stderr)
    return 1 if failures else 0


def _tell(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except PeersError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
