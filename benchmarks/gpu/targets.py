"""The last table: what the project is to reach on an H200, what is expected, what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.predict import BANDWIDTH, LOAD_S, step_expected_ms, step_floor_ms
from benchmarks.gpu.report import Fact, Report, facts
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.shapes import Codec

FLOOR_TARGET = 1.3  # base-only step / floor
MIX_TARGET = 0.85  # base-only step / step with as many variants as rows
SHARE_TARGET = 0.7  # of the copy bandwidth, of delta kernels at decode
LOAD_TARGET_S = 1.0
P99_TARGET = 1.2
LOAD_RATIO = 32
LOAD_P99 = "1.0 to 1.5"  # expected


@dataclass(frozen=True)
class Target:
    """One row. `measured` is None for what no section got to."""

    name: str
    target: float
    expected: float | str | None
    measured: float | None
    at_most: bool

    def cells(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        return [self.name, f"{sign} {self.target:.2f}", _cell(self.expected), *self._verdict()]

    def _verdict(self) -> tuple[str, str]:
        if self.measured is None:
            return "not measured", ""
        met = self.measured <= self.target if self.at_most else self.measured >= self.target
        return _cell(self.measured), "yes" if met else "NO"


def _cell(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def targets(scope: Scope, report: Path) -> Iterator[Target]:
    """From the facts that the sections have noted beside the report."""
    steps = [fact for fact in facts(report, "step") if fact["quant"] is None]
    yield _floor(scope, steps)
    for codec in scope.served:
        yield _mix(scope, codec, steps)
    kernels = facts(report, "kernel")
    for group in dict.fromkeys(map(_group, kernels)):
        yield from _share(scope, group, kernels)
    loads = [fact for fact in facts(report, "load") if fact["ratio"] == scope.served[0].ratio]
    name = f"cold load at {scope.served[0].ratio}x: "
    shown = [fact["shown_s"] for fact in loads]
    p99 = [fact["p99_ratio"] for fact in loads]
    expected = LOAD_S.get(scope.served[0].ratio)
    worst = f", worst of {len(loads)}"
    yield Target(
        f"{name}s until shown{worst}", LOAD_TARGET_S, expected, max(shown, default=None), True
    )
    yield Target(
        f"{name}p99 / p99 without{worst}", P99_TARGET, LOAD_P99, max(p99, default=None), True
    )


def _floor(scope: Scope, steps: list[Fact]) -> Target:
    codec, rows = scope.served[0], scope.batch
    expected = step_expected_ms(scope.shape, codec, rows, 0) / step_floor_ms(
        scope.shape, codec, rows, 0
    )
    found = [f["per_floor"] for f in steps if f["rows"] == rows and f["variants"] == 0]
    return Target(
        f"base-only step / floor, {rows} rows",
        FLOOR_TARGET,
        expected,
        next(iter(found), None),
        True,
    )


def _mix(scope: Scope, codec: Codec, steps: list[Fact]) -> Target:
    n = scope.batch
    alone, mixed = (step_expected_ms(scope.shape, codec, n, k) for k in (0, n))
    found = [
        fact["of_base"]
        for fact in steps
        if (fact["ratio"], fact["rows"], fact["variants"]) == (codec.ratio, n, n)
    ]
    return Target(
        f"base only / {n} variants, {codec.ratio}x",
        MIX_TARGET,
        alone / mixed,
        next(iter(found), None),
        False,
    )


def _group(kernel: Fact) -> str:
    """Kernels of one codec's setting."""
    return f"{kernel['name'].split()[0]}, {kernel['part']}"


def _share(scope: Scope, group: str, kernels: list[Fact]) -> Iterator[Target]:
    """Bytes of a group's decode kernels over their time. No row for what has none: the layers'
    own.
    """
    chosen = [f for f in kernels if (_group(f), f["variants"]) == (group, scope.batch)]
    if not chosen:
        return
    n_bytes = sum(fact["n_bytes"] for fact in chosen)
    expected = n_bytes / sum(f["expected_s"] for f in chosen) / BANDWIDTH
    measured = n_bytes / sum(f["seconds"] for f in chosen) / chosen[0]["bandwidth"]
    name = f"delta kernels' share of the copy bandwidth, decode, {scope.batch} variants: {group}"
    yield Target(name, SHARE_TARGET, expected, measured, False)


def target_table(scope: Scope, report: Report, path: Path) -> None:
    """Print it."""
    report.table("Targets", "what", "target", "expected", "measured", "met")
    for target in targets(scope, path):
        report.row(*target.cells())
