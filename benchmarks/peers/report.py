"""The Markdown tables of the measured rows: one per load.

``python -m benchmarks.peers.report benchmarks/results/peers.csv`` rewrites the .md beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.rows import Row, read_rows
from benchmarks.peers.systems import SYSTEMS

HEADER = (
    "| system | variants | mix | requests | output tok/s | / ours, base | / vLLM, base "
    "| first token p50 / p99 ms | between tokens p50 / p99 ms | peak RSS MB "
    "| MB of a variant on disk | in memory |",
    "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
NOTES = """\
`output tok/s`: tokens that arrived while requests were being started, over that time.
`in memory`: growth of the resident memory of the server's processes by the variants, over their
number: where variants are loaded on first use, what the second half of them added; where they are
loaded at the start, against a server of the base alone; `-` where nothing is kept. Pages shared by
several processes count in each.
"""
NAMES = {
    "ours": "ours",
    "transformers": "transformers, checkpoints swapped",
    "peft": "PEFT, mixed adapters",
    "vllm": "vLLM, multi-LoRA",
}
# PEFT cannot run without an adapter; the base alone is the same transformers, the same code.
ALONE = {"peft": "transformers"}


def markdown(rows: Sequence[Row]) -> str:
    """All tables, then what the columns mean."""
    parts = []
    for load in dict.fromkeys(row.load for row in rows):
        prompt, _, output = load.partition("x")
        parts.append(f"{prompt} tokens in, {output} out, {_concurrency(rows)} in flight:\n")
        mine = [row for row in rows if row.load == load]
        parts.append("\n".join([*HEADER, *(_line(row, rows) for row in _ordered(mine))]) + "\n")
    packages = dict.fromkeys((NAMES[row.system].split(",")[0], row.versions) for row in rows)
    parts.append(NOTES)
    parts.append("Versions: " + "; ".join(f"{name}: {text}" for name, text in packages) + ".\n")
    return "\n".join(parts)


def _concurrency(rows: Sequence[Row]) -> str:
    return " or ".join(str(number) for number in dict.fromkeys(row.concurrency for row in rows))


def _ordered(rows: Sequence[Row]) -> list[Row]:
    order = list(SYSTEMS)
    return sorted(rows, key=lambda row: (order.index(row.system), row.variants, row.mix))


def _line(row: Row, rows: Sequence[Row]) -> str:
    name = NAMES[row.system] if row.variants else f"{NAMES[row.system].split(',')[0]}, base only"
    cells = [
        name,
        str(row.variants or ""),
        row.mix,
        str(row.requests),
        f"{row.output_tokens_per_s:.0f}",
        _ratio(row, _base_row(rows, "ours", row.load)),
        _ratio(row, _base_row(rows, "vllm", row.load)),
        f"{row.ttft_p50_ms:.0f} / {row.ttft_p99_ms:.0f}",
        f"{row.itl_p50_ms:.0f} / {row.itl_p99_ms:.0f}",
        f"{row.rss_peak_bytes / 1e6:.0f}",
        f"{row.variant_disk_bytes / 1e6:.1f}" if row.variants else "",
        _memory(row, _base_row(rows, ALONE.get(row.system, row.system), row.load)),
    ]
    return "| " + " | ".join(cells) + " |"


def _base_row(rows: Sequence[Row], system: str, load: str) -> Row | None:
    return next((r for r in rows if r.key == (system, 0, load, "")), None)


def _ratio(row: Row, base: Row | None) -> str:
    if base is None or base.output_tokens_per_s == 0:
        return "-"
    return f"{row.output_tokens_per_s / base.output_tokens_per_s:.2f}"


def variant_memory_bytes(row: Row, alone: Row | None) -> float:
    """Growth of resident memory per variant; NaN where it is not known or there is none.

    alone  the row of the base alone, for systems that load variants at the start
    """
    if not row.variants or row.system == "transformers":
        return math.nan
    if SYSTEMS[row.system].is_lazy:
        return (row.rss_warm_bytes - row.rss_half_bytes) / (row.variants - row.variants // 2)
    if alone is None:
        return math.nan
    return (row.rss_warm_bytes - alone.rss_warm_bytes) / row.variants


def _memory(row: Row, alone: Row | None) -> str:
    if not row.variants:
        return ""
    n_bytes = variant_memory_bytes(row, alone)
    return "-" if math.isnan(n_bytes) else f"{n_bytes / 1e6:.1f}"


def write_report(csv: Path) -> Path:
    """Write the Markdown file beside the CSV file; return its path."""
    out = csv.with_suffix(".md")
    out.write_text(markdown(read_rows(csv)))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.report")
    parser.add_argument("csv", type=Path)
    print(write_report(parser.parse_args(argv).csv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
